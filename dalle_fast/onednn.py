"""The plain model for decoding on a CPU through PyTorch: linear layers whose weights are laid out for the rows of a step.

F.linear on a few rows reads a weight at a fraction of the memory's speed and, in float32, through a library that is slow on
some processors. TiledLinear calls what torch.compile calls for frozen weights, here without a compiler: oneDNN, on a layout of
its own. Measured on two Zen 4 cores, 4096 x 512, weights from memory: 8 rows in float32 439 µs against 902, in bfloat16 193
against 347; one row 437 against 824 and 209 against 299.

Where AMX is, oneDNN multiplies a single row as if it were a tile of sixteen. SummedLinear takes it for what it is, a weighted
sum of the rows of Wᵀ, which PyTorch has as embedding_bag (FBGEMM's, which streams). Both, and the other products that PyTorch
has, through all linear layers of a model on two cores of a Xeon: bench/results/2026-11-30-torch-linear-layers.json.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.model import Block, DalleModel

# oneDNN's layout is made for so many rows, and serves any. With AMX, the one for 8 rows is faster than that for 1 wherever
# there are more (bfloat16, 512 x 2048: 8 rows 81 µs against 110, 32 rows 85 against 184); with AVX-512 alone there is no
# difference.
ROWS = 8
BAG = 256  # columns; with 64, 128 and 512 a step took longer, as the file above shows
GELU = {"gelu_tanh": "tanh", "gelu": "none"}  # the models' names of it -> PyTorch's


def why_not(weight: Tensor) -> str | None:
    """None if oneDNN serves weights of this kind here, else the reason."""
    if weight.device.type != "cpu":
        return f"it computes on the CPU, got weights on {weight.device}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return "this PyTorch was built without oneDNN"
    if weight.dtype == torch.float32:
        return None
    if weight.dtype != torch.bfloat16:
        return f"it computes in float32 and bfloat16, got {str(weight.dtype).removeprefix('torch.')}"
    supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return None if supported else "oneDNN has no bfloat16 on this processor"


def sums_rows() -> bool:
    """Whether a single row is multiplied by summing up the rows of Wᵀ."""
    return "fbgemm" in torch.backends.quantized.supported_engines and torch.cpu._is_amx_tile_supported()


class TiledLinear:
    """activation(x Wᵀ + b) of x [B, ..., K]: [B, ..., O], fastest for several rows: oneDNN's layout. Inference only.

    No nn.Module, like the other: calling one costs as much as some of what a step computes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: str | None) -> None:
        """gelu: "tanh" or "none", as F.gelu's approximate; None for no activation."""
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.bias = None if bias is None else bias.detach().contiguous()
        self.gelu = gelu
        self.activation: tuple[str, list[float], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def dense(self) -> Tensor:
        """The weight [O, K]."""
        return self.packed.to_dense()

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, *self.activation)
        return y


class SummedLinear:
    """The same, fastest for one row: a sum of the rows of Wᵀ, of which each of N bags has O / N columns."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: str | None) -> None:
        outputs, self.inputs = weight.shape
        self.count = next(n for n in range(max(1, outputs // BAG), 0, -1) if outputs % n == 0)  # N
        tables = weight.detach().view(self.count, -1, self.inputs).transpose(1, 2)
        self.rows = tables.reshape(self.count * self.inputs, -1).contiguous()  # [N * K, O / N]
        self.bias = None if bias is None else bias.detach().contiguous()
        self.gelu = gelu
        self.bags = _bags(self.count, self.inputs)

    def tables(self) -> Tensor:
        """[N, K, O / N]"""
        return self.rows.view(self.count, self.inputs, -1)

    def dense(self) -> Tensor:
        """The weight [O, K]."""
        return self.tables().transpose(1, 2).flatten(0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        if x.numel() == self.inputs:
            weights = x.expand(self.count, *x.shape[1:]).reshape(-1)
            y = torch._embedding_bag_forward_only(self.rows, *self.bags, per_sample_weights=weights)[0].view(*shape, -1)
        else:
            y = (x.reshape(-1, self.inputs) @ self.tables()).transpose(0, 1).reshape(*shape, -1)
        if self.bias is not None:
            y.add_(self.bias)
        return y if self.gelu is None else F.gelu(y, approximate=self.gelu)


@lru_cache(maxsize=64)
def _bags(count: int, inputs: int) -> tuple[Tensor, Tensor]:
    """What each bag sums up, the rows of its own table one after the other, and where it begins: [N * K] and [N]."""
    return torch.arange(count * inputs, dtype=torch.int32), torch.arange(0, count * inputs, inputs, dtype=torch.int32)


class OneDnnModel(DalleModel):
    """A DalleModel that draws, and only that. It shares all tensors of `model` but those of the linear layers, which it holds
    laid out; whoever lets go of `model` holds them once."""

    def __init__(self, model: DalleModel) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._modules = dict(model._modules)
        self._modules["blocks"] = nn.ModuleList(_twin(block) for block in model.blocks if isinstance(block, Block))
        text = model.config.text_logits
        self.image_head = TiledLinear(model.head.weight[text:], model.head.bias[text:], None)

    def image_logits(self, x: Tensor) -> Tensor:
        return self.image_head(self.final_norms(x))

    def lay_out(self, rows: int) -> None:
        """Makes steps of so many rows as fast as can be. Steps of others compute the same."""
        kind = SummedLinear if rows == 1 and sums_rows() else TiledLinear
        for holder in (*self.blocks, self):
            for name, x in list(holder.__dict__.items()):
                if isinstance(x, SummedLinear | TiledLinear) and not isinstance(x, kind):
                    holder.__dict__[name] = kind(x.dense(), x.bias, x.gelu)


def _twin(block: Block) -> Block:
    """Its linear layers and norms are plain callables."""
    twin = Block.__new__(Block)
    nn.Module.__init__(twin)
    twin.__dict__.update(block.__dict__)
    twin._modules = {}
    gelu = GELU.get(block.config.activation)
    layers = {"qkv": "qkv", "out": "out", "up" if gelu is None else "hidden": "up", "down": "down"}
    for name, source in layers.items():
        linear = getattr(block, source)
        twin.__dict__[name] = TiledLinear(linear.weight, linear.bias, gelu if name == "hidden" else None)
    for name, norm in block._modules.items():
        if isinstance(norm, nn.LayerNorm):
            shape = norm.normalized_shape
            twin.__dict__[name] = partial(
                torch.layer_norm, normalized_shape=shape, weight=norm.weight, bias=norm.bias, eps=norm.eps
            )
    return twin
