"""The ops in C++ (csrc/cpu), without gradients, for float32 and bfloat16 on a CPU. torch.set_num_threads decides how many
threads they use."""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_fast.backends import Call
from dalle_fast.logits import ending_with
from dalle_fast.masks import Mask
from dalle_fast.quantize import Int4, Int8, Quantized, quantize

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
WEIGHT_DTYPES = ("float32", "bfloat16", "int8", "int4")
EPILOGUES = ("none", "gelu_tanh", "gelu", "geglu")


def kernels_why_not() -> str | None:
    """None if the C++ kernels are there, else the reason."""
    try:
        importlib.import_module("dalle_fast._C")
    except ImportError as error:
        return f"the C++ kernels are not built ({error}); dalle-fast info says why"
    return None


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The module of C++ kernels. Raises ImportError where they were not built."""
    return importlib.import_module("dalle_fast._C").cpu


def why_not(call: Call) -> str | None:
    if call.device != "cpu":
        return f"it computes on the CPU, got tensors on {call.device}"
    if call.dtype not in DTYPES and not (call.op in ("sample", "draw") and call.dtype == torch.float16):
        return f"it computes in float32 and bfloat16, got {str(call.dtype).removeprefix('torch.')}"
    if call.op == "skinny_linear":
        return "it multiplies by weights in its own order, a PackedLinear"
    if call.op.endswith("_attention") and not (call.head_dim % 16 == 0 and 16 <= call.head_dim <= 256):
        return f"it needs a head dim that is a multiple of 16 up to 256, got {call.head_dim}"
    return kernels_why_not()


@lru_cache(maxsize=64)
def _tables(mask: str, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.from_numpy(table.copy()) for table in Mask.parse(mask).decode_tables(slots))  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _neighbours(mask: str) -> tuple[Tensor, Tensor]:
    """[cells, most] and how many of them count, int32."""
    cells, counts = Mask.parse(mask).neighbours()
    return torch.from_numpy(cells.astype(np.int32)), torch.from_numpy(counts.astype(np.int32))


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: str) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    cells, counts = _neighbours(mask)
    q = q if q.stride(3) == 1 else q.contiguous()
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3])
    module = kernels()
    module.sparse_attention(
        [x.data_ptr() for x in (q, k, v, out, lse, cells, counts)], [*q.stride()[:3], *k.stride()[:3]],
        [batch, heads, length, Mask.parse(mask).layout.text_len, dim, cells.shape[1]], 1 / math.sqrt(dim),
        getattr(module.DType, DTYPES[q.dtype]), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor,
    position: Tensor, mask: str,
) -> Tensor:  # fmt: skip
    batch, heads, n, dim = q.shape
    prompts, text, slots = prefix_k.shape[0], prefix_k.shape[2], tail_k.shape[2]
    tables = _tables(mask, slots)
    q, k, v, prefix_k, prefix_v = (x.contiguous() for x in (q, k, v, prefix_k, prefix_v))
    kept_k, kept_v = tail_k.contiguous(), tail_v.contiguous()
    out = torch.empty_like(q)
    module = kernels()
    module.decode_attention(
        *(x.data_ptr() for x in (q, k, v, prefix_k, prefix_v, kept_k, kept_v, out)),
        int(position),
        *(x.data_ptr() for x in tables),
        [batch, prompts, heads, n, dim, text, slots, *tables[1].shape],
        1 / math.sqrt(dim),
        getattr(module.DType, DTYPES[q.dtype]),
        torch.get_num_threads(),
    )
    for tail, kept in ((tail_k, kept_k), (tail_v, kept_v)):
        if kept is not tail:
            tail.copy_(kept)
    return out


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, candidates: Tensor, position: Tensor
) -> Tensor:  # fmt: skip
    logits, candidates = logits.float().contiguous(), candidates.contiguous()
    batch, vocab = logits.shape
    tokens = torch.empty(batch, dtype=torch.int64)
    kernels().sample(
        logits.data_ptr(), candidates.data_ptr(), int(position), tokens.data_ptr(), batch, vocab, top_k,
        temperature, top_p, seed, torch.get_num_threads(),
    )  # fmt: skip
    return tokens


draw = ending_with(sample)


class PackedLinear:
    """A linear layer's weight in the order in which the kernels read it.

    weight [O, I] float32, bfloat16 or float16 to be held as `dtype` (one of WEIGHT_DTYPES), or already quantized;
    bias [O] or None; output_scale [O] or None multiplies result and bias. geglu: the rows are values, then gates.
    Raises ValueError for other types or shapes.
    """

    def __init__(
        self,
        weight: Tensor | Quantized,
        bias: Tensor | None = None,
        *,
        dtype: str = "bfloat16",
        geglu: bool = False,
        output_scale: Tensor | None = None,
    ) -> None:
        source = pack_arguments(weight, bias, dtype, geglu, output_scale)
        self.inputs, self.outputs = source["inputs"], source["rows"] // (2 if geglu else 1)
        self.geglu = geglu
        self.packed = kernels().PackedLinear(source, torch.get_num_threads())

    def nbytes(self) -> int:
        return int(self.packed.nbytes)


def pack_arguments(
    weight: Tensor | Quantized, bias: Tensor | None, dtype: str, geglu: bool = False, output_scale: Tensor | None = None
) -> dict[str, Any]:
    """What the C++ side wants to know of a weight; "keep" holds the tensors whose addresses it gives."""
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"got weight dtype {dtype!r}, expected one of {', '.join(WEIGHT_DTYPES)}")
    if isinstance(weight, Tensor) and dtype in ("int8", "int4"):
        weight = quantize(weight, dtype)
    types, scale = kernels().DType, None
    if isinstance(weight, (Int8, Int4)):
        kind = "int8" if isinstance(weight, Int8) else "int4"
        data, scale, source_type = weight[0].contiguous(), weight.scale.float().contiguous(), kind
    else:
        kind = dtype
        data = weight.detach().contiguous()
        if data.dtype not in DTYPES:
            data = data.float()
        source_type = DTYPES[data.dtype]
    rows, inputs = weight.shape
    vectors = [None if x is None else x.detach().float().contiguous() for x in (bias, output_scale)]
    for name, vector in zip(("bias", "output_scale"), vectors, strict=True):
        if vector is not None and vector.shape != (rows,):
            raise ValueError(f"got {name} {list(vector.shape)} for a weight {[rows, inputs]}, expected [{rows}]")
    return {
        "dtype": getattr(types, kind),
        "source_dtype": getattr(types, source_type),
        "data": data.data_ptr(),
        "scale": 0 if scale is None else scale.data_ptr(),
        "bias": 0 if vectors[0] is None else vectors[0].data_ptr(),
        "output_scale": 0 if vectors[1] is None else vectors[1].data_ptr(),
        "rows": rows,
        "inputs": inputs,
        "geglu": geglu,
        "keep": (data, scale, *vectors),
    }


def skinny_linear(
    x: Tensor,
    weight: PackedLinear,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-5,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """epilogue(layer_norm(x) Wᵀ + bias) + residual for a few rows.

    x [B, I] float32; norm: (weight [I], bias [I]) of the LayerNorm, or None for none; epilogue one of EPILOGUES ("geglu"
    for a weight packed so, and only then); residual [B, O] float32. Returns [B, O] float32, where a row's result does not
    depend on the other rows. Raises ValueError with the shapes it got and expected.
    """
    if x.ndim != 2 or x.shape[1] != weight.inputs or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"got x {list(x.shape)} {x.dtype} on {x.device}, expected [B, {weight.inputs}] float32 on cpu")
    if epilogue not in EPILOGUES or weight.geglu != (epilogue == "geglu"):
        raise ValueError(
            f"got epilogue {epilogue!r} for a weight {'with' if weight.geglu else 'without'} gates, expected one of "
            + ("geglu" if weight.geglu else ", ".join(EPILOGUES[:3]))
        )
    shape = (x.shape[0], weight.outputs)
    if residual is not None and (residual.shape != shape or residual.dtype != torch.float32):
        raise ValueError(f"got residual {list(residual.shape)} {residual.dtype}, expected {list(shape)} float32")
    vectors = [] if norm is None else [y.detach().float().contiguous() for y in norm]
    if any(y.shape != (weight.inputs,) for y in vectors):
        raise ValueError(f"got norm vectors {[list(y.shape) for y in vectors]}, expected [{weight.inputs}] twice")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y = torch.empty(shape)
    if shape[0]:
        kernels().skinny_linear(
            x.data_ptr(), weight.packed, 0 if residual is None else residual.data_ptr(),
            *([v.data_ptr() for v in vectors] or [0, 0]), y.data_ptr(), shape[0], norm_eps,
            getattr(kernels().Epilogue, epilogue), torch.get_num_threads(),
        )  # fmt: skip
    return y
