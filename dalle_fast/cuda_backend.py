"""The ops in CUDA C++ (csrc/*.cu), for NVIDIA GPUs from compute capability 8.0, on the current stream."""

from __future__ import annotations

import contextlib
import importlib
import math
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle_fast.backends import Call
from dalle_fast.masks import Mask
from dalle_fast.packing import Branch, PackedWeight
from dalle_fast.torch_backend import many_rows

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
DECODES = ("decode_attention", "decode_attention_fp8")
HEAD_DIMS = {64: 104, 128: 140}  # of decode_attention: KiB of shared memory, as csrc/decode_attention.cuh counts it
MAX_VOCAB = 32768  # a thread block holds a row of logits in shared memory
SPARE = 1 << 18  # counters set aside for CUDA graphs, 1 MiB


def kernels_why_not() -> str | None:
    """None if the CUDA kernels are there, else the reason."""
    try:
        built = importlib.import_module("dalle_fast._C").has_cuda
    except ImportError as error:
        return f"the kernels are not built ({error}); dalle-fast info says why"
    return None if built else "the CUDA kernels are not built; dalle-fast info says why, and how to get them"


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The module of CUDA kernels. Raises ImportError or AttributeError where they were not built."""
    return importlib.import_module("dalle_fast._C").cuda


def why_not(call: Call) -> str | None:
    if call.device != "cuda":
        return f"it computes on an NVIDIA GPU, got tensors on {call.device}"
    if torch.version.hip:
        return "it computes on an NVIDIA GPU, got an AMD one"
    if reason := kernels_why_not():
        return reason
    if not torch.cuda.is_available():
        return "there is no CUDA device, or no driver for it"
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"it needs compute capability 8.0, got {'.'.join(map(str, capability))}"
    if reason := unsupported(call):
        return reason
    limit = describe(torch.device("cuda", torch.cuda.current_device())).shared_limit >> 10
    if call.op in DECODES and limit < (needed := HEAD_DIMS[call.head_dim]):
        return f"it needs {needed} KiB of shared memory a thread block for a head dim of {call.head_dim}, got {limit}"
    return None


def unsupported(call: Call) -> str | None:
    """Why the kernels themselves do not serve the call, on any machine, or None."""
    types = tuple(DTYPES) if call.op in ("sample", "draw") else (torch.bfloat16, torch.float16)
    if call.dtype not in types:
        names = " and ".join(DTYPES[dtype] for dtype in types)
        return f"it computes in {names}, got {str(call.dtype).removeprefix('torch.')}"
    if call.op in DECODES and call.head_dim not in HEAD_DIMS:
        return f"it needs a head dim of {' or '.join(map(str, HEAD_DIMS))}, got {call.head_dim}"
    return None


class Device(NamedTuple):
    multiprocessors: int
    dependent_launch: bool  # a kernel may start before the one ahead of it has ended
    shared_limit: int  # bytes of shared memory that a thread block may have


@lru_cache(maxsize=8)
def describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(4, True, 227 << 10)  # the kernels run in tests, compiled for the CPU
    properties = torch.cuda.get_device_properties(device)
    limit = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return Device(properties.multi_processor_count, properties.major >= 9, limit)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's device the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0


def dense(x: Tensor) -> Tensor:
    """Contiguous and on a multiple of 16 bytes, as the kernels read."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


class _Counters:
    """Zeroed counters, which kernels leave zeroed. Launches that may overlap get different ones: a stream has its own, and
    in a CUDA graph each launch, out of what was set aside before, so that no graph has to zero them."""

    def __init__(self) -> None:
        self.of_stream: dict[tuple[torch.device, int], Tensor] = {}
        self.spare: dict[torch.device, Tensor] = {}

    def __call__(self, x: Tensor, count: int) -> Tensor:
        device = x.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if device not in self.spare or len(self.spare[device]) < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            taken, self.spare[device] = self.spare[device][:count], self.spare[device][count:]
            return taken
        if device.type == "cuda" and (device not in self.spare or len(self.spare[device]) < SPARE // 4):
            self.spare[device] = torch.zeros(SPARE, dtype=torch.int32, device=device)
        key = (device, stream(x))
        if key not in self.of_stream or len(self.of_stream[key]) < count:
            self.of_stream[key] = torch.zeros(count, dtype=torch.int32, device=device)
        return self.of_stream[key]


counters = _Counters()


@lru_cache(maxsize=64)
def _reads(mask: str, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """slot_of_cell [cells], neighbours [cells, width] as cell | slot << 16, counts [cells]; int32 on the device."""
    parsed = Mask.parse(mask)
    tables = parsed.decode_tables(slots)
    both = parsed.neighbours()[0].astype(np.int32) | tables.slots << 16
    arrays = (tables.slot_of_cell, both, tables.counts)
    return tuple(torch.from_numpy(np.array(x, dtype=np.int32)).to(device) for x in arrays)  # type: ignore[return-value]


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As they are, if channels are next to each other, on multiples of 16 bytes, and all have the same strides, as parts of one
    projection have; else dense."""
    strides = tensors[0].stride()
    fit = strides[-1] == 1 and all(s % 8 == 0 and s < 2**31 for s in strides[:-1])
    same = all(x.stride() == strides and x.data_ptr() % 16 == 0 for x in tensors)
    return tensors if fit and same else tuple(dense(x) for x in tensors)


class Shape(NamedTuple):
    """How decode_attention is shared out: rows of a thread block, thread blocks a prefix."""

    rows: int
    splits: int


def share_out(multiprocessors: int, prompts: int, heads: int, queries: int, dim: int) -> Shape:
    """queries: of all candidates of a prompt. Large tiles read the prefix less often, but only if they are enough for all
    multiprocessors; of very few queries four thread blocks share a prefix, if there is room. (Measured on an H100.)"""
    rows = 64 if queries > 32 and prompts * heads * -(-queries // 64) >= multiprocessors else 16
    room = multiprocessors * (2 if dim == 64 else 1)
    return Shape(rows, 4 if queries < 8 and 4 * prompts * heads <= room else 1)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor,
    position: Tensor, mask: str, *, scales: tuple[Tensor, Tensor] | None = None, shape: Shape | None = None,
) -> Tensor:  # fmt: skip
    """ops.decode_attention says what it computes; with scales, tails hold e4m3 codes."""
    batch, heads, n, dim = q.shape
    prompts, prefix = prefix_k.shape[:3:2]
    q, k, v = alike(q, k, v)
    prefix_k, prefix_v = dense(prefix_k), dense(prefix_v)
    if scales is not None:
        tail_k, tail_v = tail_k.view(torch.uint8), tail_v.view(torch.uint8)
    kept_k, kept_v = dense(tail_k), dense(tail_v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    device = describe(q.device)
    rows, splits = shape or share_out(device.multiprocessors, prompts, heads, batch // prompts * n, dim)
    programs = prompts * heads * -(-(batch // prompts * n) // rows)
    partial = arrived = None
    if splits > 1:
        partial = torch.empty(programs, splits, rows, dim + 2, dtype=torch.float32, device=q.device)
        arrived = counters(q, programs)
    tables = _reads(mask, tail_k.shape[2], q.device)
    tensors = (
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        kept_k,
        kept_v,
        out,
        position,
        *tables,
        partial,
        arrived,
        *(scales or (None, None)),
    )
    with on(q):
        kernels().decode_attention(
            [0 if x is None else x.data_ptr() for x in tensors],
            [batch, prompts, heads, n, dim, prefix, tail_k.shape[2], *tables[1].shape, rows, splits, *q.stride()[:3]],
            1 / math.sqrt(dim), DTYPES[q.dtype], device.dependent_launch, stream(q),
        )  # fmt: skip
    for tail, kept in ((tail_k, kept_k), (tail_v, kept_v)):
        if kept is not tail:
            tail.copy_(kept)
    return out


def decode_attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor, scale_k: Tensor,
    scale_v: Tensor, position: Tensor, mask: str, *, shape: Shape | None = None,
) -> Tensor:  # fmt: skip
    scales = (scale_k.contiguous(), scale_v.contiguous())
    return decode_attention(q, k, v, prefix_k, prefix_v, tail_k, tail_v, position, mask, scales=scales, shape=shape)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, candidates: Tensor, position: Tensor
) -> Tensor:  # fmt: skip
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _sample(logits, temperature, top_k, top_p, 1.0, seed, candidates, position, tokens)
    return tokens


def draw(
    logits: Tensor, temperature: float, top_k: int, top_p: float, guidance_scale: float, seed: int, candidates: Tensor,
    given: Tensor, position: Tensor, first_cell: int, x: Tensor, table: Tensor, rows: Tensor | None,
    columns: Tensor | None, first_place: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One launch."""
    tokens = torch.empty(len(candidates), dtype=torch.int64, device=logits.device)
    log_p = torch.empty(len(candidates), dtype=torch.float64, device=logits.device)
    kept, rest = x.contiguous(), (given.contiguous(), log_p)
    tables = [None if of is None else of.contiguous() for of in (table, rows, columns)]
    places = [0 if of is None else len(of) for of in (rows, columns)]
    _sample(
        logits, temperature, top_k, top_p, guidance_scale, seed, candidates, position, tokens, *rest, kept, *tables,
        sizes=(table.shape[1], *places, first_cell, first_place),
    )  # fmt: skip
    if kept is not x:
        x.copy_(kept)
    return tokens, log_p


def _sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, guidance_scale: float, seed: int, candidates: Tensor,
    position: Tensor, tokens: Tensor, *rest: Tensor | None, sizes: tuple[int, ...] = (0, 0, 0, 0, 0),
) -> None:  # fmt: skip
    """Fills tokens [N], and what csrc/params.h says of `rest`: given, log_p, x, table, rows, columns."""
    batch, vocab = len(tokens), logits.shape[1]
    device = describe(logits.device)
    if vocab > MAX_VOCAB:
        raise ValueError(f"got {vocab} logits a row, expected at most {MAX_VOCAB} on the cuda backend")
    logits, candidates = logits.contiguous(), candidates.contiguous()
    tensors = (logits, candidates, position, tokens, *(rest or (None,) * 6))
    if batch:
        with on(logits):
            kernels().sample(
                [0 if of is None else of.data_ptr() for of in tensors], [batch, vocab, top_k, *sizes], temperature, top_p,
                guidance_scale, seed & 0xFFFFFFFFFFFFFFFF, DTYPES[logits.dtype], device.dependent_launch, stream(logits),
            )  # fmt: skip


def few_rows(inputs: int, device: torch.device) -> int:
    """How many rows skinny_linear multiplies by a dense weight: they lie in shared memory whole, beside what is in flight."""
    room = min(64 << 10, describe(device).shared_limit - (80 << 10))
    return min(8, room // (2 * -(-inputs // 32) * 32))


def join(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float, branch: Branch | None
) -> Tensor:  # fmt: skip
    """One launch; linear.join says what it computes. Rows of a multiple of 8 channels."""
    y = torch.empty_like(x)
    vectors = (norm_weight, norm_bias, *((branch.weight, branch.bias) if branch else (None, None)))
    norm = [None if v is None else v.float().contiguous() for v in vectors]
    rows, total = (dense(branch.rows), branch.sum) if branch else (None, None)
    tensors = (dense(x), *norm[:2], y, rows, *norm[2:], total)
    with on(x):
        kernels().join(
            [0 if t is None else t.data_ptr() for t in tensors], *x.shape, norm_eps, DTYPES[x.dtype],
            describe(x.device).dependent_launch, stream(x),
        )  # fmt: skip
    return y


def skinny_linear(
    x: Tensor,
    weight: PackedWeight,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    epilogue: str,
    parts: int,
    branch: Branch | None = None,
) -> Tensor:
    """One launch; two where LayerNorm is one of its own: for many rows, and inputs that are no multiple of 8. A dense weight
    and more than few_rows: cuBLAS, and what stands around the product by PyTorch."""
    if weight.kind not in ("int8", "int4", DTYPES[x.dtype]):
        raise ValueError(
            f"got x {x.dtype} for a weight of {weight.kind}, expected {weight.kind}, or int8 or int4 weights"
        )
    if weight.dense and len(x) > few_rows(weight.inputs, x.device):
        if norm_weight is not None or branch is not None:
            x = join(x, norm_weight, norm_bias, norm_eps, branch)
        bias = None if weight.bias is None else weight.bias.to(x.dtype)
        return many_rows(x, weight, bias, residual, epilogue, parts)
    device = describe(x.device)
    y = torch.empty(parts, x.shape[0], weight.outputs // parts, dtype=x.dtype, device=x.device)
    sizes = [x.shape[0], weight.inputs, weight.outputs, parts, device.multiprocessors, device.shared_limit]
    names = (epilogue, DTYPES[x.dtype], weight.kind)
    needed = kernels().skinny_linear_workspace(sizes, norm_weight is not None or branch is not None, *names)
    workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
    joined: tuple[Tensor | None, ...] = (None,) * 4
    if branch is not None:
        assert branch.sum.is_contiguous()
        joined = (dense(branch.rows), branch.weight.float(), branch.bias.float(), branch.sum)
    norm = [None if v is None else v.float().contiguous() for v in (norm_weight, norm_bias)]
    tensors = (
        dense(x), weight.data, weight.bias, None if residual is None else residual.contiguous(), *norm, y, weight.scale,
        weight.counters, workspace, *joined,
    )  # fmt: skip
    with on(x):
        kernels().skinny_linear(
            [0 if t is None else t.data_ptr() for t in tensors],
            sizes,
            norm_eps,
            *names,
            device.dependent_launch,
            stream(x),
        )
    return y
