"""Weights of linear layers as csrc/skinny_linear.cu reads them, and back.

Those of 16 bits stay as nn.Linear has them, so that cuBLAS can multiply many rows by the same memory. Quantized ones are put
in the order in which they are streamed. A block of threads computes BLOCK = 128 outputs, a warp 16 of them: the A operand of
mma.m16n8k16, whose B operand are the rows of x. Weights lie as [block of 128 outputs][stage][warp][record]: a record is what
one warp reads at a time, 1024 bytes (two 16-byte loads a lane), and a whole block's work is one unbroken range of memory.

    kind   inputs a stage   a lane's 16 bytes
    int8   64               two tiles; bytes 0, 2 of a word are one register, 1, 3 the next
    int4   128, one group   four tiles, a word each; nibbles r, r + 4 are register r. Then 16 float32 scales

Within 32 inputs lane t of a quad owns inputs 8t … 8t + 7, four for each of two tiles, so that it reads x by one 16-byte load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast.quantize import GROUP, Int8, Quantized, quantize

BLOCK, TILE, WARPS = 128, 16, 8  # outputs of a block and of a warp; kernels in csrc/skinny_linear.cu agree
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STAGES = {"int8": 64, "int4": GROUP}  # inputs a stage
KINDS = (*FLOATS, *STAGES)
RECORD = 1024  # bytes a warp reads at a stage, without int4's scales


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer of `inputs` inputs and `outputs` outputs.

    data      16 bits: [rows, inputs], dense. Quantized: uint8 [blocks, stages, 8, record], see above, where what is beyond
              the real inputs and outputs is zero
    scale     float32, [rows] or [blocks * 128] in the order of data, or None: multiplies an output's sum before the bias
    bias      float32, in the same order, or None
    counters  int32 [blocks * 8], none for a dense weight, zero between calls: how many parts of a warp's sum are done. Because
              of them a weight may be used on one stream at a time
    kind      one of KINDS; geglu: rows are values, then gates; of packed ones 8 values, then their 8 gates, and so on
    """

    data: Tensor
    scale: Tensor | None
    bias: Tensor | None
    counters: Tensor
    kind: str
    inputs: int
    outputs: int
    geglu: bool

    @property
    def dense(self) -> bool:
        return self.data.ndim == 2

    def nbytes(self) -> int:
        """Bytes that a call reads."""
        return sum(x.nbytes for x in (self.data, self.scale, self.bias) if x is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, inputs]: the weight as multiplied by, rows in the order of nn.Linear (geglu: values, then gates)."""
        weight = (self.data if self.dense else _unpack(self)).to(dtype)
        if self.scale is not None:
            weight = weight * self.scale.to(dtype)[:, None]
        return self.rows(weight)[:, : self.inputs]

    def rows(self, x: Tensor) -> Tensor:
        """Brings what is in packed order, [blocks * 128, …], into the order of nn.Linear."""
        if self.dense:
            return x
        if not self.geglu:
            return x[: self.outputs]
        pairs = x.view(-1, 2, TILE // 2, *x.shape[1:]).transpose(0, 1).flatten(1, 2)  # [2, blocks * 64, …]
        return pairs[:, : self.outputs].flatten(0, 1)


class Branch(NamedTuple):
    """What joins the rows x that a weight multiplies, first: x becomes x + layer_norm(rows), and is written to `sum`."""

    rows: Tensor  # like x
    weight: Tensor  # [K]
    bias: Tensor  # [K]
    sum: Tensor  # like x, overwritten


def pack(
    weight: Tensor | Quantized,
    bias: Tensor | None = None,
    *,
    kind: str,
    geglu: bool = False,
    output_scale: Tensor | None = None,
) -> PackedWeight:
    """weight [O, K] of a floating type to be held as `kind` (one of KINDS), or already quantized; bias [O] or None;
    output_scale [O] or None multiplies result and bias. geglu: the rows are values, then gates, and `outputs` is O / 2.
    A weight that already is of the 16-bit type asked for, and contiguous, is not copied.

    Raises ValueError for other types or shapes; of 16 bits K must be a multiple of 8, 16 bytes.
    """
    if kind not in KINDS:
        raise ValueError(f"got kind {kind!r}, expected one of {', '.join(KINDS)}")
    if isinstance(weight, Tensor):
        if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
            raise ValueError(
                f"got a weight {list(weight.shape)} {weight.dtype}, expected two dimensions of a floating type"
            )
        weight = weight.detach()
        weight = weight.to(FLOATS[kind]) if kind in FLOATS else quantize(weight, kind)
    elif kind != ("int8" if isinstance(weight, Int8) else "int4"):
        raise ValueError(f"got a weight quantized as {type(weight).__name__} for kind {kind!r}")
    rows, inputs = weight.shape
    if geglu and rows % 2:
        raise ValueError(f"got {rows} rows with geglu, expected an even number: values, then gates")
    for name, vector in (("bias", bias), ("output_scale", output_scale)):
        if vector is not None and vector.shape != (rows,):
            raise ValueError(f"got {name} {list(vector.shape)} for a weight {[rows, inputs]}, expected [{rows}]")
    device = weight.device if isinstance(weight, Tensor) else weight.scale.device
    factor, bias = (None if v is None else v.detach().to(device, torch.float32) for v in (output_scale, bias))
    if bias is not None and factor is not None:
        bias = bias * factor
    outputs = rows // 2 if geglu else rows
    if isinstance(weight, Tensor):
        if inputs % 8:
            raise ValueError(f"got a weight {[rows, inputs]} for kind {kind!r}, expected a multiple of 8 inputs")
        none = torch.zeros(0, dtype=torch.int32, device=device)
        return PackedWeight(weight.contiguous(), factor, bias, none, kind, inputs, outputs, geglu)
    values, scale, groups = _values(weight)
    if factor is not None:
        scale = factor if scale is None else scale * factor
    order = _order(rows, geglu).to(device)
    stage = STAGES[kind]
    padded = F.pad(_pick(values, order), (0, -inputs % stage), value=8 if kind == "int4" else 0)
    records = _records(padded, kind)
    if groups is not None:  # [rows, stages] -> [blocks, stages, 8 warps, 8, 2]
        scales = _pick(groups, order).view(-1, WARPS, 2, 8, groups.shape[1]).permute(0, 4, 1, 3, 2).contiguous()
        records = torch.cat([records, scales.flatten(3).view(torch.uint8)], dim=3)
    return PackedWeight(
        records,
        None if scale is None else _pick(scale, order),
        None if bias is None else _pick(bias, order),
        torch.zeros(len(order) // TILE, dtype=torch.int32, device=device),
        kind,
        inputs,
        outputs,
        geglu,
    )


def record_bytes(kind: str) -> int:
    return RECORD + (4 * TILE if kind == "int4" else 0)


def _values(weight: Quantized) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values to pack, a scale a row, scales a group."""
    if isinstance(weight, Int8):
        return weight.values, weight.scale.float(), None
    nibbles = torch.stack([weight.packed & 15, weight.packed >> 4], dim=-1).flatten(1)[:, : weight.inputs]
    return nibbles, None, weight.scale.float()


def _order(rows: int, geglu: bool) -> Tensor:
    """The row of the weight at each packed row, or `rows` for none."""
    if not geglu:
        return F.pad(torch.arange(rows), (0, -rows % BLOCK), value=rows)
    half = rows // 2
    values, gates = (
        F.pad(torch.arange(half) + first, (0, -half % (BLOCK // 2)), value=rows).view(-1, TILE // 2)
        for first in (0, half)
    )
    return torch.stack([values, gates], dim=1).flatten()


def _pick(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x by index, zero where there is none. (Such an int4 row is -8 everywhere, of scale zero.)"""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[order]


# The axes of a weight: block, warp, half h (rows g or g + 8), row g, stage, unit of 32 inputs u, lane of a quad t, tile j,
# pair of inputs p, element e. Register r of the A operand holds half r % 2 and pair r // 2.


def _records(x: Tensor, kind: str) -> Tensor:
    """[rows, inputs], padded -> uint8 [blocks, stages, 8, 1024]."""
    blocks, stages = x.shape[0] // BLOCK, x.shape[1] // STAGES[kind]
    x = x.view(blocks, WARPS, 2, 8, stages, STAGES[kind] // 32, 4, 2, 2, 2)  # b w h g s u t j p e
    if kind == "int8":
        x = x.permute(0, 4, 1, 5, 3, 6, 7, 8, 9, 2).contiguous()  # b s w u g t j p e h
    else:  # b s w l g t u j e p h: two loads l of two units u
        x = x.view(*x.shape[:5], 2, 2, *x.shape[6:]).permute(0, 4, 1, 5, 3, 7, 6, 8, 10, 9, 2)
        x = x[..., 0] | x[..., 1] << 4
    return x.contiguous().view(torch.uint8).view(blocks, stages, WARPS, RECORD)


def _unpack(packed: PackedWeight) -> Tensor:
    """The inverse of _records, with int4's group scales: [rows, inputs], padded, float32."""
    blocks, stages = packed.data.shape[:2]
    data = packed.data[..., :RECORD].contiguous()
    if packed.kind == "int8":
        x = data.view(torch.int8).view(blocks, stages, WARPS, 2, 8, 4, 2, 2, 2, 2)  # b s w u g t j p e h
        x = x.permute(0, 2, 9, 4, 1, 3, 5, 6, 7, 8).float()
    else:
        x = torch.stack([data & 15, data >> 4], dim=-1).view(blocks, stages, WARPS, 2, 8, 4, 2, 2, 2, 2, 2)
        x = x.permute(0, 2, 10, 4, 1, 3, 6, 5, 7, 9, 8).float() - 8  # from b s w l g t u j e p h
        scales = packed.data[..., RECORD:].contiguous().view(torch.float32).view(blocks, stages, WARPS, 8, 2)
        x = x * scales.permute(0, 2, 4, 3, 1)[..., None, None, None, None, None, None]
    return x.reshape(blocks * BLOCK, -1)
