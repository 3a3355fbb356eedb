"""The instruments that tests of ops share: error bounds, poisoned caches, canaries, and which backends can run here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dalle_fast import backends
from dalle_fast.backends import Call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "cpu", "triton", "cuda")
CANARY = 1e4  # large enough that one key of it changes every sum


def require(backend: str, op: str, dtype: torch.dtype, head_dim: int = 64) -> None:
    """Skips, with the backend's reason, what it can't compute on this machine."""
    with backends.use(backend):
        if reason := backends.why_not(backend, Call(op, DEVICE, dtype, head_dim)):
            pytest.skip(f"{backend}: {reason}")


def assert_close(
    got: Tensor,
    plain: Tensor | list[Tensor],
    oracle: Tensor,
    *,
    times: float = 2,
    mean_times: float = 2,
    what: str = "out",
) -> None:
    """The error against the float64 oracle is at most `times` that of plain PyTorch in the same type on the same inputs, in
    maximum and mean, plus the rounding of the output itself. No tolerance is chosen by hand. Given several results of plain
    PyTorch, summed in several orders, the worst of them counts: of few numbers one order may be right by luck."""
    plains = [plain] if isinstance(plain, Tensor) else plain
    assert got.shape == oracle.shape, f"{what}: got {list(got.shape)}, expected {list(oracle.shape)}"
    assert oracle.dtype == torch.float64 and all(got.dtype == one.dtype for one in plains)
    assert bool(got.isfinite().all()), f"{what}: not finite at {(~got.isfinite()).nonzero()[:4].tolist()}"
    error, allowed = (got.double() - oracle).abs(), [(one.double() - oracle).abs() for one in plains]
    rounding = torch.finfo(got.dtype).eps * oracle.abs()
    limit = times * max(one.max() for one in allowed) + rounding.max()
    worst = error.flatten().argmax().item()
    assert error.max() <= limit, f"{what}: error {error.max():.3g} at flat index {worst}, expected at most {limit:.3g}"
    mean_limit = mean_times * max(one.mean() for one in allowed) + rounding.mean()
    assert error.mean() <= mean_limit, f"{what}: mean error {error.mean():.3g}, expected at most {mean_limit:.3g}"


@contextmanager
def canaries(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Views of equal content inside larger memory full of CANARY. A read outside shows in the result, a write here."""
    grown, views = [], []
    for x in tensors:
        whole = x.new_full((x.numel() + 256,), CANARY if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)
        view = whole[128 : 128 + x.numel()].view(x.shape)
        view.copy_(x)
        grown.append((whole, whole.clone()))
        views.append(view)
    yield views
    for whole, before in grown:
        assert torch.equal(whole[:128], before[:128]) and torch.equal(whole[-128:], before[-128:]), "wrote outside"


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Drawn in the type under test, so that the oracle sees the very same numbers."""
    return torch.randn(shape).to(DEVICE, dtype)


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [x.double().cpu() for x in tensors]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Dense attention in plain PyTorch, in the inputs' type: the measure of what that type can do."""
    scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    p = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return p.to(v.dtype) @ v
