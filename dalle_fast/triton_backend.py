"""The ops in Triton (kernels/), for GPUs; with TRITON_INTERPRET=1, and asked for by name, also on a CPU, slowly, for tests."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from dalle_fast import backends
from dalle_fast.backends import Call
from dalle_fast.kernels import configs
from dalle_fast.kernels import decode_attention as decode_kernels
from dalle_fast.kernels import sample as sample_kernels
from dalle_fast.kernels import sparse_attention as sparse_kernels
from dalle_fast.kernels.configs import Tile
from dalle_fast.logits import ending_with
from dalle_fast.masks import Mask

LOG2_E = math.log2(math.e)
MAX_VOCAB = 32768  # one program holds a row of logits in registers
INTERPRETED = not hasattr(sample_kernels.sample, "device_caches")  # decided when the kernels were defined
SPLIT_TARGET = 4  # programs a multiprocessor that a launch should have


def why_not(call: Call) -> str | None:
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, got {str(call.dtype).removeprefix('torch.')}"
    if call.op not in ("sample", "draw") and call.head_dim not in configs.HEAD_DIMS:
        return f"it needs a head dim of {', '.join(map(str, configs.HEAD_DIMS))}, got {call.head_dim}"
    if call.device == "cpu":
        if not INTERPRETED:
            return "it computes on a GPU (on a CPU only with TRITON_INTERPRET=1, for tests), got tensors on cpu"
        if "triton" not in (backends._forced.get(), os.environ.get("DALLE_FAST_BACKEND")):
            return "on a CPU the Triton interpreter serves tests, and must be asked for by name"
        if call.dtype == torch.bfloat16 and call.op not in ("sample", "draw"):
            return "the Triton interpreter multiplies bfloat16 matrices wrongly; use float16 or float32"
        return None
    if call.device != "cuda":
        return f"it computes on a GPU, got tensors on {call.device}"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set: kernels would run on the CPU"
    if not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0, got {'.'.join(map(str, torch.cuda.get_device_capability()))}" + (
            "; this GPU has no bfloat16, use float16 on the torch backend" if call.dtype == torch.bfloat16 else ""
        )
    return None


@lru_cache(maxsize=8)
def _device(device: torch.device) -> tuple[str, int]:
    """Architecture and multiprocessors."""
    if device.type == "cpu":
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _tile(op: str, x: Tensor) -> Tile:
    tile = configs.tile(_device(x.device)[0], op, x.shape[-1])
    # Four bytes a value: half the stages, or a 64 x 128 tile of keys and values would not fit twice.
    return tile._replace(stages=1) if x.element_size() == 4 else tile


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _rows(x: Tensor) -> Tensor:
    """With the channels next to each other, which the kernels rely on."""
    return x if x.stride(-1) == 1 else x.contiguous()


# Whole sequences.


class _Lists(NamedTuple):
    """A plan on the device. By query block, and by key block, full tiles before partial ones (kernels/sparse_attention.py)."""

    order: Tensor
    bits: Tensor
    by_query: tuple[Tensor, Tensor, Tensor, Tensor]  # offsets, split, blocks, mask_ids
    by_key: tuple[Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=64)
def _lists(mask: str, block_q: int, block_k: int, device: torch.device) -> _Lists:
    plan = Mask.parse(mask).block_plan(block_q, block_k)

    def put(x: Any) -> Tensor:
        return torch.from_numpy(np.array(x, dtype=np.int32)).to(device)

    def full_first(offsets: Any, blocks: Any, mask_ids: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        order = np.lexsort((blocks, mask_ids >= 0, owner))
        full = np.bincount(owner[mask_ids < 0], minlength=len(offsets) - 1)
        return put(offsets), put(offsets[:-1] + full), put(blocks[order]), put(mask_ids[order])

    bits = plan.bits if len(plan.bits) else np.zeros((1, *plan.bits.shape[1:]), dtype=np.int32)
    return _Lists(
        put(plan.order),
        put(bits),
        full_first(plan.offsets, plan.blocks, plan.mask_ids),
        full_first(plan.key_offsets, plan.key_blocks, plan.mask_ids[plan.key_entries]),
    )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: str, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    tile = tile or _tile("sparse_attention", q)
    layout, (batch, heads, length, dim) = Mask.parse(mask).layout, q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    lists = _lists(mask, tile.block_q, tile.block_k, q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    blocks = triton.cdiv(layout.cells, tile.block_q) + triton.cdiv(layout.text_len, tile.block_q)
    if out.numel():
        with _on(q):
            sparse_kernels.forward[blocks, batch * heads](
                q, k, v, out, lse, lists.order, *lists.by_query, lists.bits,
                heads, layout.text_len, layout.cells, length, LOG2_E / math.sqrt(dim), *_strides(q, k, v),
                BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, D=dim, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out, lse


def sparse_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str, tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tile = tile or _tile("sparse_attention_backward", q)
    layout, (batch, heads, length, dim) = Mask.parse(mask).layout, q.shape
    text, cells = layout.text_len, layout.cells
    q, k, v, grad, out, lse = _rows(q), _rows(k), _rows(v), grad.contiguous(), out.contiguous(), lse.contiguous()
    lists = _lists(mask, tile.block_q, tile.block_k, q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not dq.numel():
        return dq, dk, dv
    text_blocks, query_blocks = triton.cdiv(text, tile.block_k), triton.cdiv(length, tile.block_q)
    if splits is None:
        wanted = SPLIT_TARGET * _device(q.device)[1]
        splits = min(query_blocks, max(1, wanted // (batch * heads * text_blocks)))
    per_split = triton.cdiv(query_blocks, splits)
    text_dk, text_dv, d_split, d_bh = dk, dv, 0, length * dim
    if splits > 1:  # a float32 sum each
        text_dk, text_dv = (
            torch.empty(splits, batch, heads, text, dim, dtype=torch.float32, device=q.device) for _ in "kv"
        )
        d_split, d_bh = text_dk.stride(0), text * dim
    scale = 1 / math.sqrt(dim)
    rows = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sizes = {
        "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "D": dim, "num_warps": tile.warps, "num_stages": tile.stages
    }  # fmt: skip
    strides = _strides(q, k, v)
    with _on(q):
        sparse_kernels.delta[(triton.cdiv(rows.numel(), 64),)](grad, out, rows, rows.numel(), BLOCK=64, D=dim)
        sparse_kernels.backward_text[text_blocks, splits, batch * heads](
            q, k, v, grad, lse, rows, text_dk, text_dv, heads, text, length, scale * LOG2_E, scale, per_split,
            *strides, d_split, d_bh, **sizes,
        )  # fmt: skip
        if length > text:
            sparse_kernels.backward_image[triton.cdiv(cells, tile.block_k), batch * heads](
                q, k, v, grad, lse, rows, dk, dv, lists.order, *lists.by_key, lists.bits,
                heads, text, cells, length, scale * LOG2_E, scale, *strides, **sizes,
            )  # fmt: skip
        image_blocks = triton.cdiv(cells, tile.block_q)
        sparse_kernels.backward_query[image_blocks + triton.cdiv(text, tile.block_q), batch * heads](
            q, k, v, grad, lse, rows, dq, lists.order, *lists.by_query, lists.bits,
            heads, text, cells, length, scale * LOG2_E, scale, *strides, **sizes,
        )  # fmt: skip
    if splits > 1:
        dk[:, :, :text], dv[:, :, :text] = text_dk.sum(0), text_dv.sum(0)
    return dq, dk, dv


# One step.


@lru_cache(maxsize=64)
def _reads(mask: str, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """slot_of_cell [cells], neighbours [cells, width] and counts [cells], int32 on the device."""
    parsed = Mask.parse(mask)
    neighbours, counts = parsed.neighbours()
    tables = (parsed.decode_tables(slots).slot_of_cell, neighbours, counts)
    return tuple(torch.from_numpy(np.array(x, dtype=np.int32)).to(device) for x in tables)  # type: ignore[return-value]


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor,
    position: Tensor, mask: str, *, scales: tuple[Tensor, Tensor] | None = None, tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """ops.decode_attention says what it computes. Beyond it: tails of torch.float8_e4m3fn, with scales (k, v), each [H]
    float32, where a value is code x scale; magnitudes above 448 x scale are cut off. Raises ValueError for one without the
    other."""
    batch, heads, n, dim = q.shape
    prompts, prefix = prefix_k.shape[0], prefix_k.shape[2]
    processors = _device(q.device)[1]
    _check_tails(tail_k, tail_v, scales, heads)
    for name, x in (("tail_k", tail_k), ("tail_v", tail_v)):
        if x.stride(-1) != 1:
            raise ValueError(f"got {name} with strides {x.stride()}, expected channels next to each other")
    if scales is not None:
        tail_k, tail_v = tail_k.view(torch.uint8), tail_v.view(torch.uint8)
    tile = tile or _tile("decode_attention", q)
    q, k, v, prefix_k, prefix_v = (_rows(x) for x in (q, k, v, prefix_k, prefix_v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    group, blocks = batch // prompts, triton.cdiv(prefix, tile.block_k)
    tiles = triton.cdiv(group * n, tile.block_q)
    if splits is None:  # few candidates leave processors idle: share the prefix out
        splits = 1 << max(0, min(blocks, 2 * processors // (tiles * prompts * heads)).bit_length() - 1)
    slot_of_cell, neighbours, counts = _reads(mask, tail_k.shape[2], q.device)
    partial = arrived = None
    if splits > 1:
        programs = heads * tiles * prompts
        shape = (programs * splits, tile.block_q * (dim + 2))
        partial = torch.empty(shape, dtype=torch.float32, device=q.device)
        arrived = torch.zeros(programs, dtype=torch.int32, device=q.device)
    with _on(q):
        decode_kernels.decode_attention[heads, tiles * prompts, splits](
            q, k, v, prefix_k, prefix_v, tail_k, tail_v, out, position, slot_of_cell, neighbours, counts,
            partial, arrived, *(scales or (None, None)),
            group, heads, n, prefix, len(counts), neighbours.shape[1], triton.cdiv(blocks, splits),
            LOG2_E / math.sqrt(dim), *_strides(q, k, v, prefix_k, prefix_v, tail_k, tail_v),
            BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, NEAR=tile.near, D=dim, SPLITS=splits,
            FP8=scales is not None, MASK_PREFIX=prefix % tile.block_k != 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def decode_attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor, scale_k: Tensor,
    scale_v: Tensor, position: Tensor, mask: str,
) -> Tensor:  # fmt: skip
    return decode_attention(q, k, v, prefix_k, prefix_v, tail_k, tail_v, position, mask, scales=(scale_k, scale_v))


def _check_tails(tail_k: Tensor, tail_v: Tensor, scales: tuple[Tensor, Tensor] | None, heads: int) -> None:
    eight = [x.dtype == torch.float8_e4m3fn for x in (tail_k, tail_v)]
    if eight != [scales is not None] * 2:
        raise ValueError(
            f"got tails of {tail_k.dtype} and {tail_v.dtype} {'with' if scales else 'without'} scales, "
            "expected float8_e4m3fn with, or another type without"
        )
    if scales is None:
        return
    for x in scales:
        if x.shape != (heads,) or x.dtype != torch.float32 or x.device != tail_k.device:
            raise ValueError(f"got scales {list(x.shape)} {x.dtype}, expected [{heads}] float32 on {tail_k.device}")


# Sampling.


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, candidates: Tensor, position: Tensor
) -> Tensor:  # fmt: skip
    batch, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"got {vocab} logits a row, expected at most {MAX_VOCAB} on the triton backend")
    logits, candidates = _rows(logits), candidates.contiguous()
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if not batch:
        return tokens
    high = struct.unpack("f", struct.pack("f", top_p))[0]  # a kernel takes float32 scalars: two of them make the double
    low_word, high_word = (int(np.uint32((seed >> shift) & 0xFFFFFFFF).astype(np.int32)) for shift in (0, 32))
    tile = configs.tile(_device(logits.device)[0], "sample")
    with _on(logits):
        sample_kernels.sample[(batch,)](
            logits, candidates, position, tokens, vocab, logits.stride(0), float(temperature), top_k, high, top_p - high,
            low_word, high_word,
            BLOCK=max(16, triton.next_power_of_2(vocab)), TOP_K=top_k > 0, TOP_P=top_p < 1, num_warps=tile.warps,
        )  # fmt: skip
    return tokens


draw = ending_with(sample)
