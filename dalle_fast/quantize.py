"""Weights in 8 or 4 bits, for every backend that multiplies by them. Symmetric, rounded to nearest.

int8: one scale an output channel. int4: one scale a group of 128 consecutive inputs of a channel, 4.25 bits a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 128  # inputs that share an int4 scale
_CHUNK = 1 << 22  # weights quantized at a time: bounds the memory that a large matrix takes besides itself


class Int8(NamedTuple):
    """weight[o, i] = scale[o] * values[o, i]."""

    values: Tensor  # [O, I] int8, -127 … 127
    scale: Tensor  # [O] float32

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantize(self) -> Tensor:
        """[O, I] float32."""
        return self.values.float() * self.scale[:, None]


class Int4(NamedTuple):
    """weight[o, i] = scale[o, i // 128] * (nibble(o, i) - 8); of each byte the low nibble is the even input."""

    packed: Tensor  # [O, ceil(I / 2)] uint8
    scale: Tensor  # [O, ceil(I / 128)] float32
    inputs: int  # I

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.packed.shape[0], self.inputs))

    def dequantize(self) -> Tensor:
        """[O, I] float32."""
        nibbles = torch.stack([self.packed & 15, self.packed >> 4], dim=-1).flatten(1)[:, : self.inputs]
        return (nibbles.float() - 8) * self.scale.repeat_interleave(GROUP, dim=1)[:, : self.inputs]


Quantized = Int8 | Int4


def quantize(weight: Tensor, dtype: str) -> Quantized:
    """[O, I] of a floating type, finite -> "int8" or "int4". Raises ValueError for another shape, type or dtype."""
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"got a weight {list(weight.shape)} {weight.dtype}, expected two dimensions of a floating type"
        )
    if dtype not in _QUANTIZERS:
        raise ValueError(f"got dtype {dtype!r}, expected one of {', '.join(_QUANTIZERS)}")
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [_QUANTIZERS[dtype](part.float()) for part in torch.split(weight.detach(), rows)]
    values, scale = (torch.cat([part[i] for part in parts]) for i in range(2))
    return Int8(values, scale) if dtype == "int8" else Int4(values, scale, weight.shape[1])


def floats(x: Tensor | Quantized) -> Tensor:
    """What a parameter stands for, in float32."""
    return (x.detach() if isinstance(x, Tensor) else x.dequantize()).float().contiguous()


def norm_vectors(state: Mapping[str, Tensor | Quantized], prefix: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the LayerNorm whose parameters' names begin so, in float32."""
    return floats(state[f"{prefix}weight"]), floats(state[f"{prefix}bias"])


def last_rows(weight: Tensor | Quantized, count: int) -> Tensor | Quantized:
    """The last `count` output channels."""
    if isinstance(weight, Int8):
        return Int8(weight.values[-count:], weight.scale[-count:])
    if isinstance(weight, Int4):
        return Int4(weight.packed[-count:], weight.scale[-count:], weight.inputs)
    return weight[-count:]


def relative_error(weight: Tensor, quantized: Quantized) -> float:
    """‖weight - dequantized‖ / ‖weight‖ (Frobenius): about 0.8 % in int8 and 10 % in int4 for normally distributed weights."""
    exact = weight.detach().double()
    norm = float(exact.norm())
    return float((exact - quantized.dequantize()).norm()) / norm if norm else 0.0


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    padding = -inputs % GROUP
    groups = torch.nn.functional.pad(weight, (0, padding)).view(outputs, -1, GROUP)  # [O, G, 128]
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # with its sign
    # 16 levels, -8 … 7: the largest weight may become -8 (of a scale with its opposite sign), 12 % finer than ±7, but then
    # a weight as large of the other sign is cut to 7. The better of the two by squared error, group by group.
    best, error = torch.zeros_like(groups), torch.full_like(largest, torch.inf)
    scale = torch.ones_like(largest)
    for candidate in (largest / -8, largest / 7):
        candidate = torch.where(candidate != 0, candidate, 1.0)
        levels = (groups / candidate).round_().clamp_(-8, 7)
        its_error = (levels * candidate - groups).square_().sum(dim=2, keepdim=True)
        better = its_error < error
        best, error, scale = (
            torch.where(better, new, old) for new, old in ((levels, best), (its_error, error), (candidate, scale))
        )
    nibbles = (best + 8).to(torch.uint8).view(outputs, -1)[:, : inputs + inputs % 2]
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale.view(outputs, -1)


_QUANTIZERS = {"int8": _int8, "int4": _int4}
