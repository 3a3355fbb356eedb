"""The model for decoding on a GPU: linear layers by skinny_linear, from 16-bit, int8 or int4 weights; 16-bit ones stay as they
are, and many rows of them go to cuBLAS.

A layer is five launches: norm + qkv, attention, out + residual, norm + up + activation, down + residual. A sandwich norm's
second LayerNorm and its residual are part of the next launch. Token shift and rotary positions are PyTorch's own operations,
several more, and so is the second LayerNorm where token shift or a reversible layer stands between.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast import backends, cuda_backend, torch_backend
from dalle_fast.backends import Call
from dalle_fast.config import ModelConfig
from dalle_fast.linear import MAX_ROWS, join, skinny_linear
from dalle_fast.model import Block, DalleModel, open_weights
from dalle_fast.packing import FLOATS, KINDS, Branch, PackedWeight, pack
from dalle_fast.passes import Pass, rotate
from dalle_fast.quantize import Int4, Int8, Quantized, floats, last_rows, norm_vectors

LINEAR = ("qkv", "out", "up", "down")
# More rows than this, a caption's, are multiplied by a dense copy of the weight, made for the call; fewer, 64 at a time.
MAX_SKINNY_ROWS = 4 * MAX_ROWS

State = Mapping[str, "Tensor | Quantized"]
Norm = tuple[Tensor, Tensor]
Waiting = tuple[Tensor, Norm]  # what a branch gave, and the norm after which it joins the residual stream


def why_not(kind: str, device: str, backend: str = "auto") -> str | None:
    """None if a GPU multiplies by packed weights of this kind by this backend, else the reason."""
    if kind not in KINDS:
        return f"it holds weights as {', '.join(KINDS)}, got {kind}"
    if backend not in ("auto", "cuda"):
        return f"only the cuda backend multiplies by packed weights at their speed, got {backend}"
    return backends.why_not("cuda", Call("skinny_linear", device, _activations(kind), 0))


def _activations(kind: str) -> torch.dtype:
    return torch.float16 if kind == "float16" else torch.bfloat16


def fused(model: DalleModel, backend: str = "auto") -> DalleModel:
    """The same model as its steps are fastest on a GPU: a PackedModel of its own 16-bit weights, which are not copied (biases
    and the vectors of LayerNorms are: who changes those makes a new one). Itself where there is no such thing."""
    weight, config = model.image_embedding.weight, model.config
    kind = str(weight.dtype).removeprefix("torch.")
    if backend == "auto":
        backend = backends.asked_for() or backend
    if isinstance(model, PackedModel) or kind not in FLOATS or why_not(kind, weight.device.type, backend):
        return model
    if any(size % 8 for size in (config.dim, config.hidden, config.heads * config.head_dim)):
        return model
    return PackedModel(model, kind=kind, device=weight.device)


class PackedModel(DalleModel):
    """A DalleModel that draws, and only that: its linear layers are packed, text logits and gradients are not to be had.

    state   a DalleModel, or a mapping from its parameter names to tensors, read one at a time and not kept; values may be
            quantize.Int8 or Int4 already
    kind    how weights are held, one of packing.KINDS; with "int4" the head is int8. Those of 16 bits are shared with `state`
            where it has them so on the device
    dtype   of activations and cache; None: float16 for kind "float16", else bfloat16

    Raises ValueError for another kind, or of 16 bits a width that is no multiple of 8, and what the mapping raises.
    """

    def __init__(
        self,
        state: DalleModel | State,
        config: ModelConfig | None = None,
        *,
        kind: str = "bfloat16",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(state, DalleModel):
            config, state = state.config, dict(state.state_dict())
        if config is None:
            raise ValueError("got weights without a config, expected a ModelConfig beside them")
        if kind not in KINDS:
            raise ValueError(f"got kind {kind!r}, expected one of {', '.join(KINDS)}")
        dtype = dtype or _activations(kind)
        hold = Holder(kind, device)
        with torch.device("meta"):
            super().__init__(config)
        for block in self.blocks:
            for name in LINEAR:
                delattr(block, name)
        del self.head
        kept = {name: _float(state[name]).to(device, dtype) for name in self.state_dict() if name != "rotary"}
        self.load_state_dict(kept, strict=False, assign=True)
        if self.rotary is not None:
            self.rotary = floats(state["rotary"]).to(device)
        self.requires_grad_(False).eval()
        self.layers = [PackedLayer(block, state, hold) for block in self.blocks if isinstance(block, Block)]
        last = norm_vectors(state, f"final_norms.{config.final_norms - 1}.")
        head = last_rows(state["head.weight"], config.image_vocab)
        bias = floats(state["head.bias"])[config.text_logits :]
        packed = hold._replace(kind="int8")(head, bias) if kind == "int4" else hold(head, bias)
        self.packed_head = PackedLinear(packed, _pair(last, device), config.norm_eps)

    @classmethod
    def load_packed(
        cls, folder: str | Path, *, kind: str = "bfloat16", device: torch.device | str = "cpu"
    ) -> PackedModel:
        """Reads what DalleModel.save wrote, one tensor at a time. Raises as DalleModel.load does."""
        config, file = open_weights(folder)
        with file as state:
            return cls(state, config, kind=kind, device=device)

    def run_blocks(self, x: Tensor, run: Pass) -> Tensor:
        if self.config.reversible:
            a = b = x
            for layer in self.layers:
                a = layer.attention(b, a, run)
                b = layer.mlp(a, b, run)
            return self.finish((a + b) / 2)
        if self.config.sandwich_norm and not self.config.token_shift:
            waiting: Waiting | None = None
            for layer in self.layers:
                x, waiting = layer.sandwich(x, waiting, run)
            assert waiting is not None
            return self.finish(x + layer_norm(*waiting, self.config.norm_eps))
        for layer in self.layers:
            x = layer.attention(x, x, run)
            x = layer.mlp(x, x, run)
        return self.finish(x)

    def image_logits(self, x: Tensor) -> Tensor:
        for norm in list(self.final_norms.children())[:-1]:
            x = norm(x)
        return self.packed_head(x)

    def text_logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a PackedModel holds no text head: use the DalleModel that it was made from")

    def weight_nbytes(self) -> int:
        """Bytes of packed weights, all of which a step reads."""
        linears = [getattr(layer, name) for layer in self.layers for name in LINEAR]
        return sum(linear.weight.nbytes() for linear in [*linears, self.packed_head])


class Holder(NamedTuple):
    """How weights are held."""

    kind: str
    device: torch.device | str

    def __call__(self, weight: Tensor | Quantized, bias: Tensor | None, **options: Any) -> PackedWeight:
        if self.kind in FLOATS:
            weight = _float(weight)
        return pack(_on(weight, self.device), bias, kind=self.kind, **options)


class PackedLinear:
    """epilogue(norm(x) Wᵀ + b) (+ residual) over the last dimension of x, for any number of rows."""

    def __init__(
        self, weight: PackedWeight, norm: Norm | None = None, norm_eps: float = 1e-5, epilogue: str = "none"
    ) -> None:
        self.weight, self.norm, self.norm_eps, self.epilogue = weight, norm, norm_eps, epilogue
        if weight.dense:
            self.few = cuda_backend.few_rows(weight.inputs, weight.data.device)
            self.bias = None if weight.bias is None else weight.bias.to(weight.data.dtype)  # as cuBLAS wants it

    def __call__(self, x: Tensor, residual: Tensor | None = None, parts: int | None = None) -> Tensor:
        """[..., K] -> [..., O]; with parts -> [parts, rows, O / parts]."""
        rows = x.reshape(-1, x.shape[-1])
        y = self._rows(rows, None if residual is None else residual.reshape(len(rows), -1), parts, None)
        return y if parts else y[0].view(*x.shape[:-1], -1)

    def after(self, x: Tensor, waiting: Waiting | None, parts: int | None = None) -> tuple[Tensor, Tensor]:
        """(x + norm(branch), this layer of it) for waiting = (branch, its norm)."""
        if waiting is None:
            return x, self(x, parts=parts)
        rows = x.reshape(-1, x.shape[-1])
        total = torch.empty_like(rows)
        y = self._rows(rows, None, parts, Branch(waiting[0].reshape(rows.shape), *waiting[1], total))
        return total.view(x.shape), y if parts else y[0].view(*x.shape[:-1], -1)

    def _many(self, x: Tensor, residual: Tensor | None, parts: int, branch: Branch | None) -> Tensor:
        """_rows of a dense weight by cuBLAS; skinny_linear would cast the bias each time."""
        if self.norm is not None:
            x = join(x, self.norm, self.norm_eps, branch)
        return torch_backend.many_rows(x, self.weight, self.bias, residual, self.epilogue, parts)

    def _rows(self, x: Tensor, residual: Tensor | None, parts: int | None, branch: Branch | None) -> Tensor:
        """[rows, K] -> [parts, rows, O / parts]."""
        if self.weight.dense and len(x) > self.few and x.dtype == self.weight.data.dtype:
            return self._many(x, residual, parts or 1, branch)
        if len(x) > MAX_SKINNY_ROWS:
            weight, bias = self.norm or (None, None)
            return torch_backend.skinny_linear(
                x, self.weight, residual, weight, bias, self.norm_eps, self.epilogue, parts or 1, branch
            )
        pieces = []
        for first in range(0, len(x), MAX_ROWS):
            of = slice(first, first + MAX_ROWS)
            joined = None if branch is None else Branch(branch.rows[of], branch.weight, branch.bias, branch.sum[of])
            piece = skinny_linear(
                x[of], self.weight, norm=self.norm, norm_eps=self.norm_eps, epilogue=self.epilogue, branch=joined,
                residual=None if residual is None else residual[of], parts=parts or 1,
            )  # fmt: skip
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class PackedLayer:
    """model.Block with packed weights; the residual is added inside."""

    def __init__(self, block: Block, state: State, hold: Holder) -> None:
        self.block, self.config = block, block.config
        config, prefix = block.config, f"blocks.{block.index}."

        def linear(name: str, branch: str) -> PackedLinear:
            first, last = name in ("qkv", "up"), name in ("out", "down")
            gated = name == "up" and config.activation == "geglu"
            bias = floats(state[f"{prefix}{name}.bias"]) if name != "qkv" or config.qkv_bias else None
            # A sandwich norm stands between the product and LayerScale, which then scales the norm's vectors.
            scaled = last and config.layer_scale and not config.sandwich_norm
            scale = floats(state[f"{prefix}{branch}_scale"]) if scaled else None
            packed = hold(state[f"{prefix}{name}.weight"], bias, geglu=gated, output_scale=scale)
            norm = norm_vectors(state, f"{prefix}{branch}_norm.") if first and not config.token_shift else None
            return PackedLinear(
                packed, _pair(norm, hold.device), config.norm_eps, config.activation if name == "up" else "none"
            )

        def norm_out(branch: str) -> Norm | None:
            if not config.sandwich_norm:
                return None
            weight, bias = norm_vectors(state, f"{prefix}{branch}_norm_out.")
            scale = floats(state[f"{prefix}{branch}_scale"]) if config.layer_scale else torch.ones(())
            return _pair((weight * scale, bias * scale), hold.device)

        self.qkv, self.out = linear("qkv", "attention"), linear("out", "attention")
        self.up, self.down = linear("up", "mlp"), linear("down", "mlp")
        self.attention_norm_out, self.mlp_norm_out = norm_out("attention"), norm_out("mlp")

    def attention(self, x: Tensor, residual: Tensor, run: Pass) -> Tensor:
        if self.config.token_shift:
            x = run.shift(2 * self.block.index, self.block.attention_norm(x))
        return self._add(self.out, self._attend(self.qkv(x, parts=3), x, run), residual, self.attention_norm_out)

    def _attend(self, qkv: Tensor, x: Tensor, run: Pass) -> Tensor:
        config, (batch, n, _) = self.config, x.shape
        # Three blocks, so that of a single cell queries, keys and values are contiguous, as attention wants them.
        q, k, v = qkv.view(3, batch, n, config.heads, config.head_dim).transpose(2, 3).unbind(0)
        if run.rotary is not None:
            q, k, v = (rotate(y, run.rotary) for y in (q, k, v))
        return run.attend(self.block.index, q, k, v).transpose(1, 2).reshape(batch, n, -1)

    def mlp(self, x: Tensor, residual: Tensor, run: Pass) -> Tensor:
        if self.config.token_shift:
            x = run.shift(2 * self.block.index + 1, self.block.mlp_norm(x))
        return self._add(self.down, self.up(x), residual, self.mlp_norm_out)

    def sandwich(self, x: Tensor, waiting: Waiting | None, run: Pass) -> tuple[Tensor, Waiting]:
        """The layer of a model with sandwich norms: each branch joins where the next one starts."""
        assert self.attention_norm_out is not None and self.mlp_norm_out is not None
        x, qkv = self.qkv.after(x, waiting, parts=3)
        x, h = self.up.after(x, (self.out(self._attend(qkv, x, run)), self.attention_norm_out))
        return x, (self.down(h), self.mlp_norm_out)

    def _add(self, last: PackedLinear, h: Tensor, residual: Tensor, norm_out: Norm | None) -> Tensor:
        if norm_out is None:
            return last(h, residual)
        return residual + layer_norm(last(h), norm_out, self.config.norm_eps)


def _float(x: Tensor | Quantized) -> Tensor:
    return x if isinstance(x, Tensor) else x.dequantize()


def _on(weight: Tensor | Quantized, device: torch.device | str) -> Tensor | Quantized:
    if isinstance(weight, Int8):
        return Int8(weight.values.to(device), weight.scale.to(device))
    if isinstance(weight, Int4):
        return Int4(weight.packed.to(device), weight.scale.to(device), weight.inputs)
    return weight.to(device)


def layer_norm(x: Tensor, norm: Norm, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], *norm, eps).to(x.dtype)


def _pair(norm: Norm | None, device: torch.device | str) -> Norm | None:
    """In float32, as the kernels read them: a cast would be a launch of its own in every step."""
    return None if norm is None else (norm[0].to(device, torch.float32), norm[1].to(device, torch.float32))
