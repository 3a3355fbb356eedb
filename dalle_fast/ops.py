"""The ops: schemas, argument checks, fakes and autograd. Backends fill them in (backends.py).

    sparse_attention   whole sequences, differentiable
    decode_attention   one or a few cells against prefix and tail, appending; inference only
    sample             logits -> tokens; inference only
    draw               the end of a step around sample: guidance, known tokens, log p, the next step's input; inference only

Masks are named by str(masks.Mask), so that an op's arguments stay plain and a backend can look up the tables it wants.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dalle_fast import backends
from dalle_fast.backends import Call
from dalle_fast.masks import Mask

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

torch.library.define(
    "dalle_fast::sparse_attention", "(Tensor q, Tensor k, Tensor v, str mask, bool gradient) -> (Tensor, Tensor)"
)
torch.library.define(
    "dalle_fast::sparse_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str mask) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "dalle_fast::decode_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor(a!) tail_k, Tensor(b!) tail_v,"
    " Tensor position, str mask) -> Tensor",
)
torch.library.define(
    "dalle_fast::decode_attention_fp8",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor(a!) tail_k, Tensor(b!) tail_v,"
    " Tensor scale_k, Tensor scale_v, Tensor position, str mask) -> Tensor",
)
torch.library.define(
    "dalle_fast::sample",
    "(Tensor logits, float temperature, int top_k, float top_p, int seed, Tensor candidates, Tensor position) -> Tensor",
)
torch.library.define(
    "dalle_fast::draw",
    "(Tensor logits, float temperature, int top_k, float top_p, float guidance_scale, int seed, Tensor candidates,"
    " Tensor given, Tensor position, int first_cell, Tensor(a!) x, Tensor table, Tensor? rows, Tensor? columns,"
    " int first_place) -> (Tensor, Tensor)",
)


def _backend(op: str, x: Tensor, head_dim: int = 0) -> Any:
    return backends.choose(Call(op, x.device.type, x.dtype, head_dim))


# Whole sequences.


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q kᵀ / √D + mask) v over the first S positions of a sequence of text and image cells.

    q, k, v [B, H, S, D] of one floating type, text_len <= S <= text_len + cells. Returns [B, H, S, D].
    Differentiable. Raises ValueError with the shapes, types or devices it got and wanted.
    """
    _check_sparse(q, k, v, mask)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out: Tensor = torch.ops.dalle_fast.sparse_attention(q, k, v, str(mask), gradient)[0]
    return out


def _check_sparse(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    _check_float("q", q, 4)
    _check_same("k", k, q)
    _check_same("v", v, q)
    low, high = mask.layout.text_len, mask.layout.total
    if not low <= q.shape[2] <= high:
        raise ValueError(f"got a sequence of {q.shape[2]} positions for {mask}, expected {low} to {high}")


@torch.library.impl("dalle_fast::sparse_attention", "default")
def _sparse(q: Tensor, k: Tensor, v: Tensor, mask: str, gradient: bool) -> tuple[Tensor, Tensor]:
    # One backend for both: its gradient computes the scores again, and they should be rounded as those of the log-sum-exp.
    op = "sparse_attention_backward" if gradient else "sparse_attention"
    out, lse = _backend(op, q, q.shape[-1]).sparse_attention(q, k, v, mask)
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("dalle_fast::sparse_attention")  # type: ignore[untyped-decorator]
def _sparse_fake(q: Tensor, k: Tensor, v: Tensor, mask: str, gradient: bool) -> tuple[Tensor, Tensor]:
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_type)


@torch.library.impl("dalle_fast::sparse_attention_backward", "default")
def _sparse_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = _backend("sparse_attention_backward", q, q.shape[-1])
    dq, dk, dv = module.sparse_attention_backward(grad.contiguous(), q, k, v, out, lse, mask)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@torch.library.register_fake("dalle_fast::sparse_attention_backward")  # type: ignore[untyped-decorator]
def _sparse_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_sparse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.mask, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _sparse_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    q, k, v, out, lse = ctx.saved_tensors
    return (*torch.ops.dalle_fast.sparse_attention_backward(grad, q, k, v, out, lse, ctx.mask), None, None)


torch.library.register_autograd("dalle_fast::sparse_attention", _sparse_grad, setup_context=_setup_sparse)


# One step.


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    position: Tensor,
    mask: Mask,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Appends the keys and values of n cells to each candidate's tail and attends with their queries.

    q, k, v [B, H, n, D]: the cells position … position + n - 1; prefix_k, prefix_v [P, H, T, D]: candidate b belongs to
    prompt b // (B / P); tail_k, tail_v [B, H, slots, D], changed in place, slots from mask.tail_slots(chunk) with n <= chunk;
    position: int64 tensor of one element on the same device (so that one CUDA graph serves every step).
    scales: (of keys, of values), [H] float32 each, for tails of torch.float8_e4m3fn, where a value is code x scale: the new
    cells are read as they come and kept as codes. Returns [B, H, n, D]. Inference only. Raises ValueError with what it got
    and expected.
    """
    _check_decode(q, k, v, prefix_k, prefix_v, tail_k, tail_v, position, mask, scales)
    op, args = _decode_call(q, k, v, prefix_k, prefix_v, tail_k, tail_v, position, mask, scales)
    out: Tensor = getattr(torch.ops.dalle_fast, op)(*args)
    return out


def decode_attention_unchecked(q: Tensor, *rest: Any) -> Tensor:
    """decode_attention for cells that Cache.check has let pass: no shape is looked at, and PyTorch dispatches only where a
    compiler or a dispatch mode looks on. What that saves of a step: bench/results/2026-12-01-torch-step.json."""
    op, args = _decode_call(q, *rest)
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    module = torch.ops.dalle_fast if watched else _backend(op, q, q.shape[-1])
    out: Tensor = getattr(module, op)(*args)
    return out


def _decode_call(*args: Any) -> tuple[str, tuple[Any, ...]]:
    """decode_attention's arguments -> the op that serves them, and its own. Raises ValueError where a gradient is wanted."""
    *tensors, position, mask, scales = args
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:5]):  # q, k, v and the prefix
        raise ValueError(
            "decode_attention is inference only: got an input that requires a gradient, expected torch.no_grad()"
        )
    if scales is None:
        return "decode_attention", (*tensors, position, str(mask))
    return "decode_attention_fp8", (*tensors, *scales, position, str(mask))


def _check_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    position: Tensor,
    mask: Mask,
    scales: tuple[Tensor, Tensor] | None,
) -> None:
    _check_float("q", q, 4)
    _check_same("k", k, q)
    _check_same("v", v, q)
    batch, heads, n, dim = q.shape
    prompts, slots = prefix_k.shape[0], tail_k.shape[2]
    if prompts < 1 or batch % prompts:
        raise ValueError(f"got {batch} candidates for {prompts} prompts, expected a multiple")
    if prefix_k.shape[1:] != (heads, prefix_k.shape[2], dim) or prefix_v.shape != prefix_k.shape:
        raise ValueError(
            f"got prefix_k {list(prefix_k.shape)}, prefix_v {list(prefix_v.shape)}, expected [P, {heads}, T, {dim}] twice"
        )
    if tail_k.shape != (batch, heads, slots, dim) or tail_v.shape != tail_k.shape:
        raise ValueError(
            f"got tail_k {list(tail_k.shape)}, tail_v {list(tail_v.shape)}, expected [{batch}, {heads}, slots, {dim}] twice"
        )
    for name, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        _check_kind(name, x, q)
    for name, x in (("tail_k", tail_k), ("tail_v", tail_v)):
        if scales is None:
            _check_kind(name, x, q)
        elif x.dtype != torch.float8_e4m3fn or x.device != q.device:
            raise ValueError(
                f"got {name} {x.dtype} on {x.device} with scales, expected torch.float8_e4m3fn on {q.device}"
            )
    for x in scales or ():
        if x.shape != (heads,) or x.dtype != torch.float32 or x.device != q.device:
            raise ValueError(
                f"got scales {list(x.shape)} {x.dtype} on {x.device}, expected [{heads}] float32 on {q.device}"
            )
    cells = mask.layout.cells
    low = mask.ring(min(n, cells))
    if not (1 <= n <= cells and low <= slots <= cells):
        raise ValueError(f"got {n} cells for a tail of {slots} slots, expected {low} to {cells} slots for {mask}")
    if position.numel() != 1 or position.dtype != torch.int64 or position.device != q.device:
        raise ValueError(
            f"got position {list(position.shape)} {position.dtype} on {position.device}, expected one int64 on {q.device}"
        )


@torch.library.impl("dalle_fast::decode_attention", "default")
def _decode(q: Tensor, *args: Any) -> Tensor:
    out: Tensor = _backend("decode_attention", q, q.shape[-1]).decode_attention(q, *args)
    return out.contiguous()


@torch.library.register_fake("dalle_fast::decode_attention")  # type: ignore[untyped-decorator]
def _decode_fake(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.impl("dalle_fast::decode_attention_fp8", "default")
def _decode_fp8(q: Tensor, *args: Any) -> Tensor:
    out: Tensor = _backend("decode_attention_fp8", q, q.shape[-1]).decode_attention_fp8(q, *args)
    return out.contiguous()


@torch.library.register_fake("dalle_fast::decode_attention_fp8")  # type: ignore[untyped-decorator]
def _decode_fp8_fake(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape)


# Sampling.


def check_sampling(temperature: float, top_k: int, top_p: float, vocab: int) -> None:
    """Raises ValueError, with the value and what was expected, for settings that no distribution has."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"got temperature={temperature}, expected a finite number above 0")
    if not 0 <= top_k <= vocab:
        raise ValueError(f"got top_k={top_k}, expected 1 to {vocab}, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"got top_p={top_p}, expected above 0 and at most 1")


def sample(
    logits: Tensor,
    candidates: Tensor,
    position: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Draws one token a row: softmax(logits / temperature), kept to the exact top_k tokens (0: all), of those to the
    smallest set whose probability reaches top_p, by Gumbel-max with Philox4x32-10 noise keyed by (seed, candidate, position).

    logits [B, V]; candidates [B] int64, the random stream of each row; position: int64 tensor of one element.
    Returns [B] int64. A row's token depends on neither the batch nor the backend, up to rounding of the logits.
    Raises ValueError for settings out of range or mismatched shapes.
    """
    _check_float("logits", logits, 2)
    check_sampling(temperature, top_k, top_p, logits.shape[1])
    if candidates.shape != logits.shape[:1] or candidates.dtype != torch.int64:
        raise ValueError(
            f"got candidates {list(candidates.shape)} {candidates.dtype}, expected [{logits.shape[0]}] int64"
        )
    tokens: Tensor = torch.ops.dalle_fast.sample(logits, temperature, top_k, top_p, seed, candidates, position)
    return tokens


@torch.library.impl("dalle_fast::sample", "default")
def _sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, candidates: Tensor, position: Tensor
) -> Tensor:
    module = _backend("sample", logits)
    tokens: Tensor = module.sample(logits, temperature, top_k, top_p, seed, candidates, position)
    return tokens


@torch.library.register_fake("dalle_fast::sample")  # type: ignore[untyped-decorator]
def _sample_fake(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, candidates: Tensor, position: Tensor
) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


class Embedding(NamedTuple):
    """How a model turns image token j into the input of a step: table[token] + rows[p // W] + columns[p % W], p = j + first."""

    table: Tensor  # [V, d]
    rows: Tensor | None  # [H, d]; None: positions are no part of it
    columns: Tensor | None  # [W, d]
    first: int


def draw(
    logits: Tensor,
    candidates: Tensor,
    given: Tensor,
    position: Tensor,
    first_cell: int,
    x: Tensor,
    embedding: Embedding,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """All that follows the logits of image token j = position - first_cell, and all that precedes the next step's blocks.

    logits [B, V]; candidates [N] int64; given [N] int64: the token where it is known, -1 where it is to be drawn as `sample`
    does, from the logits or, with guidance, from without + guidance_scale * (with - without), where B = 2 N and the second
    half has no caption. position: int64 tensor of one element. Fills x [B, d] with the tokens' embedding (where j is the last
    cell there may be no place left: then x is not touched).
    Returns tokens [N] int64 and log p of them [N] float64: at temperature 1, uncut, without guidance, in nats.
    Raises ValueError for settings out of range or mismatched shapes and types.
    """
    _check_float("logits", logits, 2)
    batch, vocab = logits.shape
    check_sampling(temperature, top_k, top_p, vocab)
    halves = 1 if guidance_scale == 1 else 2
    for name, row in (("candidates", candidates), ("given", given)):
        if row.ndim != 1 or len(row) * halves != batch or row.dtype != torch.int64:
            raise ValueError(f"got {name} {list(row.shape)} {row.dtype}, expected [{batch / halves:g}] int64")
    dim = embedding.table.shape[1]
    for name, of, rows in (
        ("x", x, batch),
        ("table", embedding.table, vocab),
        ("rows", embedding.rows, None),
        ("columns", embedding.columns, None),
    ):
        if of is not None:
            _check_kind(name, of, logits)
            if of.ndim != 2 or of.shape[1] != dim or rows not in (None, len(of)):
                raise ValueError(f"got {name} {list(of.shape)}, expected [{rows or 'n'}, {dim}]")
    if (embedding.rows is None) != (embedding.columns is None):
        raise ValueError("got rows or columns alone, expected both or neither")
    tokens, log_p = torch.ops.dalle_fast.draw(
        logits, temperature, top_k, top_p, guidance_scale, seed, candidates, given, position, first_cell, x, *embedding
    )
    return tokens, log_p


@torch.library.impl("dalle_fast::draw", "default")
def _draw(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    tokens, log_p = _backend("draw", logits).draw(logits, *args)
    return tokens, log_p


@torch.library.register_fake("dalle_fast::draw")  # type: ignore[untyped-decorator]
def _draw_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    candidates: Tensor = args[5]
    return torch.empty_like(candidates), torch.empty_like(candidates, dtype=torch.float64)


# Checks shared by the ops.


def _check_float(name: str, x: Tensor, ndim: int) -> None:
    if x.ndim != ndim or x.dtype not in FLOATS:
        raise ValueError(f"got {name} {list(x.shape)} {x.dtype}, expected {ndim} dimensions of a floating type")


def _check_kind(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"got {name} {x.dtype} on {x.device}, expected {like.dtype} on {like.device}")


def _check_same(name: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"got {name} {list(x.shape)}, expected {list(like.shape)}")
    _check_kind(name, x, like)
