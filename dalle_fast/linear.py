"""skinny_linear: linear layers for up to 64 rows, whose whole cost is reading the weights. Inference only.

The weights are packed once (packing.py for the op; cpu_backend.PackedLinear for the kernels in csrc/cpu).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_fast import backends, cpu_backend
from dalle_fast.backends import Call
from dalle_fast.cpu_backend import EPILOGUES, PackedLinear
from dalle_fast.ops import FLOATS
from dalle_fast.packing import BLOCK, STAGES, TILE, Branch, PackedWeight, record_bytes
from dalle_fast.packing import FLOATS as FLOATS_BY_NAME

MAX_ROWS = 64  # of a launch

torch.library.define(
    "dalle_fast::skinny_linear",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor counters, Tensor? residual, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor? branch, Tensor? branch_weight, Tensor? branch_bias, Tensor(a!)? total, str kind,"
    " int outputs, float norm_eps, str epilogue, int parts) -> Tensor",
)


def skinny_linear(
    x: Tensor,
    weight: PackedWeight | PackedLinear,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-5,
    epilogue: str = "none",
    residual: Tensor | None = None,
    parts: int | None = None,
    branch: Branch | None = None,
) -> Tensor:
    """epilogue(layer_norm(x) Wᵀ + bias) + residual for a few rows; sums in float32.

    x [B, K] with 1 <= B <= 64; norm: (weight [K], bias [K]) of the LayerNorm, or None for none; epilogue "none",
    "gelu_tanh", "gelu", or "geglu" for a weight packed so, and only then; residual [B, O] of x's type.
    Returns [B, O] of x's type; with `parts`, [parts, B, O / parts]: say queries, keys and values, one after the other.
    branch: x becomes x + layer_norm(branch.rows), with the same norm_eps, and is written to branch.sum.
    Raises ValueError with the shapes, types or devices it got and expected.
    """
    if isinstance(weight, PackedLinear) and parts is None and branch is None:
        return cpu_backend.skinny_linear(x, weight, norm=norm, norm_eps=norm_eps, epilogue=epilogue, residual=residual)
    divided = parts is not None and (parts < 1 or weight.outputs % parts or (parts > 1 and residual is not None))
    if isinstance(weight, PackedLinear) or divided:
        raise ValueError(
            f"got parts={parts} and {'a' if branch else 'no'} branch for {weight.outputs} outputs packed as "
            f"{type(weight).__name__}, expected a divisor, no residual, and for either a PackedWeight"
        )
    if epilogue not in EPILOGUES or weight.geglu != (epilogue == "geglu"):
        raise ValueError(
            f"got epilogue {epilogue!r} for a weight {'with' if weight.geglu else 'without'} gates, expected one of "
            + ("geglu" if weight.geglu else ", ".join(EPILOGUES[:3]))
        )
    if x.ndim != 2 or x.dtype not in FLOATS or x.shape[1] != weight.inputs or not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(
            f"got x {list(x.shape)} {x.dtype}, expected [1 to {MAX_ROWS}, {weight.inputs}] of a floating type"
        )
    norm_weight, norm_bias = (None, None) if norm is None else norm
    tensors = [("weight", weight.data), ("norm weight", norm_weight), ("norm bias", norm_bias), ("residual", residual)]
    if branch is not None:
        names = ("branch", "branch norm weight", "branch norm bias", "sum")
        tensors += zip(names, branch, strict=True)
    for name, y in tensors:
        if y is not None and y.device != x.device:
            raise ValueError(f"got {name} on {y.device}, expected {x.device}")
    vectors = [("norm weight", norm_weight), ("norm bias", norm_bias)]
    if branch is not None:
        vectors += [("branch norm weight", branch.weight), ("branch norm bias", branch.bias)]
        for name, rows in (("branch", branch.rows), ("sum", branch.sum)):
            if rows.shape != x.shape or rows.dtype != x.dtype:
                raise ValueError(f"got {name} {list(rows.shape)} {rows.dtype}, expected {list(x.shape)} {x.dtype}")
    for name, y in vectors:
        if y is not None and y.shape != (weight.inputs,):
            raise ValueError(f"got {name} {list(y.shape)}, expected [{weight.inputs}]")
    shape = (x.shape[0], weight.outputs)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(f"got residual {list(residual.shape)} {residual.dtype}, expected {list(shape)} {x.dtype}")
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, residual, *(norm or ()))):
        raise ValueError(
            "skinny_linear is inference only: got an input that requires a gradient, expected torch.no_grad()"
        )
    out: Tensor = torch.ops.dalle_fast.skinny_linear(
        x, weight.data, weight.scale, weight.bias, weight.counters, residual, norm_weight, norm_bias,
        *(branch or (None,) * 4), weight.kind,
        weight.outputs, norm_eps, epilogue, parts or 1,
    )  # fmt: skip
    return out if parts else out[0]


def join(x: Tensor, norm: tuple[Tensor, Tensor], norm_eps: float, branch: Branch | None = None) -> Tensor:
    """layer_norm(x) of rows [B, K], however many; a branch joins first, as in skinny_linear. Inference only."""
    module: Any = backends.choose(Call("skinny_linear", x.device.type, x.dtype, 0))
    y: Tensor = module.join(x, *norm, norm_eps, branch)
    return y


def why_not(weight: PackedWeight, x_dtype: torch.dtype, backend: str) -> str | None:
    """None if a backend multiplies rows of this type by this weight, else the reason."""
    return backends.why_not(backend, Call("skinny_linear", weight.data.device.type, x_dtype, 0))


@torch.library.impl("dalle_fast::skinny_linear", "default")
def _linear(
    x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None, counters: Tensor, residual: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, branch: Tensor | None, branch_weight: Tensor | None,
    branch_bias: Tensor | None, total: Tensor | None, kind: str, outputs: int, norm_eps: float, epilogue: str, parts: int,
) -> Tensor:  # fmt: skip
    if kind in STAGES:
        fits = data.ndim == 4 and data.shape[2:] == (BLOCK // TILE, record_bytes(kind))
    else:
        fits = data.ndim == 2 and data.dtype == FLOATS_BY_NAME.get(kind)
    if not fits:
        raise ValueError(f"got a weight {list(data.shape)} packed as {kind!r}, expected packing.pack's")
    module: Any = backends.choose(Call("skinny_linear", x.device.type, x.dtype, 0))
    weight = PackedWeight(data, scale, bias, counters, kind, x.shape[1], outputs, epilogue == "geglu")
    joined = None
    if branch is not None and branch_weight is not None and branch_bias is not None and total is not None:
        joined = Branch(branch, branch_weight, branch_bias, total)
    y: Tensor = module.skinny_linear(x, weight, residual, norm_weight, norm_bias, norm_eps, epilogue, parts, joined)
    return y.contiguous()


@torch.library.register_fake("dalle_fast::skinny_linear")  # type: ignore[untyped-decorator]
def _linear_fake(
    x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None, counters: Tensor, residual: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, branch: Tensor | None, branch_weight: Tensor | None,
    branch_bias: Tensor | None, total: Tensor | None, kind: str, outputs: int, norm_eps: float, epilogue: str, parts: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(parts, x.shape[0], outputs // parts)
