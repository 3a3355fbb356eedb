"""The model for decoding small batches on a GPU: linear layers by skinny_linear, from 16-bit, int8 or int4 weights.

A layer of the plain kind is five launches: norm + qkv, attention, out + residual, norm + up + activation, down + residual.
More are: token shift, rotary positions and a sandwich norm's second LayerNorm, each by PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast import backends, torch_backend, weights
from dalle_fast.backends import Call
from dalle_fast.config import ModelConfig
from dalle_fast.cpu_engine import WeightFile, _floats, _last_rows, _norm
from dalle_fast.linear import MAX_ROWS, skinny_linear
from dalle_fast.model import Block, DalleModel, rotate
from dalle_fast.packing import KINDS, PackedWeight, pack
from dalle_fast.passes import Pass
from dalle_fast.quantize import Int4, Int8, Quantized

LINEAR = ("qkv", "out", "up", "down")
# More rows than this, a caption's, are multiplied by a dense copy of the weight, made for the call; fewer, 64 at a time.
MAX_SKINNY_ROWS = 4 * MAX_ROWS

State = Mapping[str, "Tensor | Quantized"]
Norm = tuple[Tensor, Tensor]


def why_not(kind: str, device: str, backend: str = "auto") -> str | None:
    """None if a GPU multiplies by packed weights of this kind by this backend, else the reason."""
    if kind not in KINDS:
        return f"it holds weights as {', '.join(KINDS)}, got {kind}"
    if backend not in ("auto", "cuda"):
        return f"only the cuda backend multiplies by packed weights at their speed, got {backend}"
    return backends.why_not("cuda", Call("skinny_linear", device, _activations(kind), 0))


def _activations(kind: str) -> torch.dtype:
    return torch.float16 if kind == "float16" else torch.bfloat16


class PackedModel(DalleModel):
    """A DalleModel that draws, and only that: its linear layers are packed, text logits and gradients are not to be had.

    state   a DalleModel, or a mapping from its parameter names to tensors, read one at a time and not kept; values may be
            quantize.Int8 or Int4 already
    kind    how weights are held, one of packing.KINDS; with "int4" the head is int8
    dtype   of activations and cache; None: float16 for kind "float16", else bfloat16

    Raises ValueError for another kind, and what the mapping raises.
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
        with torch.device("meta"):
            super().__init__(config)
        for block in self.blocks:
            for name in LINEAR:
                delattr(block, name)
        del self.head
        kept = {name: _floats(state[name]).to(device, dtype) for name in self.state_dict() if name != "rotary"}
        self.load_state_dict(kept, strict=False, assign=True)
        if self.rotary is not None:
            self.rotary = _floats(state["rotary"]).to(device)
        self.requires_grad_(False).eval()
        self.layers = [PackedLayer(block, state, kind, device) for block in self.blocks if isinstance(block, Block)]
        last = _norm(state, f"final_norms.{config.final_norms - 1}.")
        head = _last_rows(state["head.weight"], config.image_vocab)
        bias = _floats(state["head.bias"])[config.text_logits :]
        packed = pack(_on(head, device), bias, kind="int8" if kind == "int4" else kind)
        self.packed_head = PackedLinear(packed, _pair(last, device), config.norm_eps)

    @classmethod
    def load_packed(
        cls, folder: str | Path, *, kind: str = "bfloat16", device: torch.device | str = "cpu"
    ) -> PackedModel:
        """Reads what DalleModel.save wrote, one tensor at a time. Raises as DalleModel.load does."""
        config = ModelConfig.from_json(weights.read_text(Path(folder) / "config.json"))
        with WeightFile(Path(folder) / "model.safetensors", config) as state:
            return cls(state, config, kind=kind, device=device)

    def run_blocks(self, x: Tensor, run: Pass) -> Tensor:
        if self.config.reversible:
            a = b = x
            for layer in self.layers:
                a = layer.attention(b, a, run)
                b = layer.mlp(a, b, run)
            return self.finish((a + b) / 2)
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


class PackedLinear:
    """epilogue(norm(x) Wᵀ + b) (+ residual) over the last dimension of x, for any number of rows."""

    def __init__(
        self, weight: PackedWeight, norm: Norm | None = None, norm_eps: float = 1e-5, epilogue: str = "none"
    ) -> None:
        self.weight, self.norm, self.norm_eps, self.epilogue = weight, norm, norm_eps, epilogue

    def __call__(self, x: Tensor, residual: Tensor | None = None, parts: int | None = None) -> Tensor:
        """[..., K] -> [..., O]; with parts [rows, K] -> [parts, rows, O / parts]."""
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(len(rows), -1)
        if len(rows) > MAX_SKINNY_ROWS:
            weight, bias = self.norm or (None, None)
            y = torch_backend.skinny_linear(
                rows, self.weight, added, weight, bias, self.norm_eps, self.epilogue, parts or 1
            )
            return y if parts else y[0].view(*x.shape[:-1], -1)
        pieces = [
            skinny_linear(
                piece, self.weight, norm=self.norm, norm_eps=self.norm_eps, epilogue=self.epilogue, parts=parts,
                residual=None if added is None else added[i * MAX_ROWS : i * MAX_ROWS + len(piece)],
            )
            for i, piece in enumerate(torch.split(rows, MAX_ROWS))
        ]  # fmt: skip
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1 if parts else 0)
        return y if parts else y.view(*x.shape[:-1], -1)


class PackedLayer:
    """model.Block with packed weights; the residual is added inside."""

    def __init__(self, block: Block, state: State, kind: str, device: torch.device | str) -> None:
        self.block, self.config = block, block.config
        config, prefix = block.config, f"blocks.{block.index}."

        def linear(name: str, branch: str) -> PackedLinear:
            first, last = name in ("qkv", "up"), name in ("out", "down")
            gated = name == "up" and config.activation == "geglu"
            bias = _floats(state[f"{prefix}{name}.bias"]) if name != "qkv" or config.qkv_bias else None
            # A sandwich norm stands between the product and LayerScale, which then scales the norm's vectors.
            scaled = last and config.layer_scale and not config.sandwich_norm
            scale = _floats(state[f"{prefix}{branch}_scale"]) if scaled else None
            packed = pack(
                _on(state[f"{prefix}{name}.weight"], device), bias, kind=kind, geglu=gated, output_scale=scale
            )
            norm = _norm(state, f"{prefix}{branch}_norm.") if first and not config.token_shift else None
            return PackedLinear(
                packed, _pair(norm, device), config.norm_eps, config.activation if name == "up" else "none"
            )

        def norm_out(branch: str) -> Norm | None:
            if not config.sandwich_norm:
                return None
            weight, bias = _norm(state, f"{prefix}{branch}_norm_out.")
            scale = _floats(state[f"{prefix}{branch}_scale"]) if config.layer_scale else torch.ones(())
            dtype = block.attention_norm.weight.dtype
            return (weight * scale).to(device, dtype), (bias * scale).to(device, dtype)

        self.qkv, self.out = linear("qkv", "attention"), linear("out", "attention")
        self.up, self.down = linear("up", "mlp"), linear("down", "mlp")
        self.attention_norm_out, self.mlp_norm_out = norm_out("attention"), norm_out("mlp")

    def attention(self, x: Tensor, residual: Tensor, run: Pass) -> Tensor:
        config, (batch, n, _) = self.config, x.shape
        if config.token_shift:
            x = run.shift(2 * self.block.index, self.block.attention_norm(x))
        # Three blocks, so that of a single cell queries, keys and values are contiguous, as attention wants them.
        q, k, v = self.qkv(x, parts=3).view(3, batch, n, config.heads, config.head_dim).transpose(2, 3).unbind(0)
        if run.rotary is not None:
            q, k, v = (rotate(y, run.rotary) for y in (q, k, v))
        h = run.attend(self.block.index, q, k, v).transpose(1, 2).reshape(batch, n, -1)
        return self._add(self.out, h, residual, self.attention_norm_out)

    def mlp(self, x: Tensor, residual: Tensor, run: Pass) -> Tensor:
        if self.config.token_shift:
            x = run.shift(2 * self.block.index + 1, self.block.mlp_norm(x))
        return self._add(self.down, self.up(x), residual, self.mlp_norm_out)

    def _add(self, last: PackedLinear, h: Tensor, residual: Tensor, norm_out: Norm | None) -> Tensor:
        if norm_out is None:
            return last(h, residual)
        h = last(h)
        return residual + F.layer_norm(h, h.shape[-1:], *norm_out, self.config.norm_eps)


def _on(weight: Tensor | Quantized, device: torch.device | str) -> Tensor | Quantized:
    if isinstance(weight, Int8):
        return Int8(weight.values.to(device), weight.scale.to(device))
    if isinstance(weight, Int4):
        return Int4(weight.packed.to(device), weight.scale.to(device), weight.inputs)
    return weight.to(device)


def _pair(norm: Norm | None, device: torch.device | str) -> Norm | None:
    return None if norm is None else (norm[0].to(device), norm[1].to(device))
