"""The sparse_attention op over whole sequences, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench import work
from bench.conftest import Measure
from bench.device import DEVICE, ON_GPU, Batch
from bench.peers import flex, sdpa
from dalle_fast import backends, ops, reference
from dalle_fast.backends import Call
from dalle_fast.layout import SequenceLayout
from dalle_fast.masks import Mask, Pattern

SHAPES = {"12B": (62, 64, 256), "1.3B": (16, 128, 128)} if ON_GPU else {"512 wide": (8, 64, 256)}
BATCHES = (1, 8) if ON_GPU else (1,)
PATTERNS = {"row": "row", "column": "column", "conv": "conv(kernel=11,boundary=flat)"}
BOUND = {"float32": 1e-5, "bfloat16": 1.5e-2}  # of the gradients too
OURS = ("cuda", "triton", "cpu", "torch")
SDPA = ("math", "flash", "efficient", "cudnn")
CONTENDERS = [
    *(f"dalle_fast, {b} backend" for b in OURS),
    *(f"SDPA {b}, dense mask" for b in SDPA),
    *(f"SDPA {b}, causal only" for b in SDPA[1:]),  # a mask of its own: what not masking would cost
    *("FlexAttention", "FlexAttention, permuted"),
]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=4)
def wanted(
    mask: str, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
    """(q, k, v), the gradient of the output, and in float64 (out, dq, dk, dv). Mask "causal": no pattern."""
    torch.manual_seed(0)
    *qkv, grad = (torch.randn(shape, device=DEVICE).mul_(1 + (i == 0)).to(dtype) for i in range(4))
    wide = [x.double().requires_grad_() for x in qkv]
    if mask == "causal":
        out = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    else:
        out = reference.sparse_attention(*wide, mask)[0]
    grads = torch.autograd.grad(out, wide, grad.double())
    return tuple(qkv), grad, tuple(x.cpu() for x in (out.detach(), *grads))


def why_not(backend: str, backward: bool, dtype: torch.dtype, dim: int) -> str | None:
    """None if a backend of ours computes this here, else the reason."""
    needed = ("sparse_attention", *(["sparse_attention_backward"] if backward else []))
    return next((r for op in needed if (r := backends.why_not(backend, Call(op, DEVICE.type, dtype, dim)))), None)


def attention(contender: str, mask: Mask, backward: bool, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    """The contender's function, or the case is skipped with the reason why it has none."""
    kind, _, how = contender.partition(" ")
    if kind == "dalle_fast,":
        backend = how.split()[0]
        if reason := why_not(backend, backward, q.dtype, q.shape[-1]):
            pytest.skip(reason)

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with backends.use(backend):
                return ops.sparse_attention(q, k, v, mask)

        return ours
    if kind == "SDPA":
        backend = how.split(",")[0]
        if how.endswith("dense mask") and ON_GPU and backend == "flash":
            pytest.skip("flash attention takes no mask")
        if how.endswith("causal only"):
            return lambda q, k, v: sdpa.attention(backend, q, k, v, causal=True)
        allowed = torch.from_numpy(mask.dense()).to(DEVICE)
        bias = torch.zeros(allowed.shape, dtype=q.dtype, device=DEVICE).masked_fill_(~allowed, -torch.inf)
        return lambda q, k, v: sdpa.attention(backend, q, k, v, bias)
    return flex.Flex(mask, "permuted" in how, q, k, v)


def batch_of(attend: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None) -> Batch:
    """Two sets of inputs like q, k and v; backward too if there is a gradient of the output."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> None:
        out = attend(q, k, v)
        if grad is not None:
            torch.autograd.grad(out, (q, k, v), grad)

    return Batch(
        run, [tuple(torch.randn_like(x).requires_grad_(grad is not None) for x in (q, k, v)) for _ in range(2)]
    )


@lru_cache(maxsize=1)
def beside(mask: Mask, backward: bool, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, Batch]:
    """Our first contender, which the others are measured in turns with."""
    (q, k, v), grad, _ = wanted(str(mask), shape, dtype)
    contender = f"dalle_fast, {next(b for b in OURS if not why_not(b, backward, dtype, shape[-1]))} backend"
    return contender, batch_of(attention(contender, mask, backward, q, k, v), q, k, v, grad if backward else None)


def marks(contender: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.compiles, pytest.mark.importance(5)] if contender.startswith("Flex") else []


@pytest.mark.importance(4 if ON_GPU else 3)
@pytest.mark.parametrize("contender", [pytest.param(c, marks=marks(c)) for c in CONTENDERS])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_attention(
    shape: str, batch: int, pattern: str, backward: bool, contender: str, measure: Measure
) -> None:
    heads, dim, text = SHAPES[shape]
    dtype = torch.float32 if measure.small or not ON_GPU else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    what = "forward and backward" if backward else "forward"
    title = f"The sparse_attention op, {what}: {heads} heads of {dim}, {text} + 32×32, batch {batch}"
    measure.describe(title, pattern, contender, name)
    layout = SequenceLayout(text // 8, 8, 8) if measure.small else SequenceLayout(text, 32, 32)
    mask = Mask(Pattern.parse(PATTERNS[pattern]), layout)
    key = "causal" if contender.endswith("causal only") else str(mask)
    (q, k, v), grad, expected = wanted(key, (batch, heads, layout.total, dim), dtype)
    q, k, v = (x.clone().requires_grad_(backward) for x in (q, k, v))

    attend = attention(contender, mask, backward, q, k, v)
    if isinstance(attend, flex.Flex):
        q, k, v = (attend.permute(x.detach()).requires_grad_(backward) for x in (q, k, v))
        grad, restore = attend.permute(grad), attend.restore
    else:
        restore = torch.clone
    out = attend(q, k, v)
    results = [out, *(torch.autograd.grad(out, (q, k, v), grad) if backward else ())]
    for result, value in zip(results, expected, strict=False):
        measure.check(restore(result), value, BOUND[name])

    batches, against = batch_of(attend, q, k, v, grad if backward else None), None
    if not ON_GPU:
        first, ours = beside(mask, backward, (batch, heads, layout.total, dim), dtype)
        measure.facts |= {"ratio": 1.0} if contender == first else {}
        against = None if contender == first else ours.seconds
    least = work.attention(mask, batch, heads, dim, name, backward)
    measure(batches, work=least, passes=10, calls=batches.calls, against=against)
