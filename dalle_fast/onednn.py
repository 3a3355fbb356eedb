"""The plain model for decoding on a CPU through PyTorch: linear layers whose weights oneDNN has laid out once, for itself.

F.linear on a few rows reads a weight at a fraction of the memory's speed and, in float32, through a library that is slow on
some processors. These are the operators that torch.compile calls for frozen weights; here without a compiler. Measured on two
Zen 4 cores, 4096 x 512, weights from memory: 8 rows in float32 439 µs against 902, in bfloat16 193 against 347; one row 437
against 824 and 209 against 299.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle_fast.model import Block, DalleModel

# The layout is made for so many rows, and serves any. With AMX, the one for 8 rows is faster than that for 1 wherever there are
# more (bfloat16, 512 x 2048: 8 rows 81 µs against 110, 32 rows 85 against 184). For one row neither was faster in all runs, and
# with AVX-512 alone there is no difference.
ROWS = 8
LINEAR = ("qkv", "out", "up", "down")


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


class PackedLinear(nn.Module):
    """x [..., K] -> x Wᵀ + b [..., O]. Holds the weight in oneDNN's own layout only. Inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.bias = None if bias is None else bias.detach().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class OneDnnModel(DalleModel):
    """A DalleModel that draws, and only that. It shares all tensors of `model` but those of the linear layers, which it holds
    packed; whoever lets go of `model` holds them once."""

    def __init__(self, model: DalleModel) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._modules = dict(model._modules)
        self._modules["blocks"] = nn.ModuleList(_packed(block) for block in model.blocks if isinstance(block, Block))
        text = model.config.text_logits
        self.image_head = PackedLinear(model.head.weight[text:], model.head.bias[text:])

    def image_logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.image_head(self.final_norms(x))
        return logits


def _packed(block: Block) -> Block:
    twin = Block.__new__(Block)
    nn.Module.__init__(twin)
    twin.__dict__.update(block.__dict__)
    twin._modules = dict(block._modules)
    for name in LINEAR:
        linear = getattr(block, name)
        twin._modules[name] = PackedLinear(linear.weight, linear.bias)
    return twin
