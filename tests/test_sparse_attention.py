"""sparse_attention of every backend that runs here, forward and backward, against the float64 oracle."""

import pytest
import torch
from helpers import BACKENDS, DEVICE, assert_close, canaries, doubles, plain_attention, randn, require

from dalle_fast import backends, ops, reference
from dalle_fast.masks import Mask

RULES = [
    "full",
    "row",
    "row(window=in_row)",
    "column",
    "conv(kernel=5,boundary=flat)",
    "conv(kernel=5,boundary=clip)",
    "conv(kernel=5,boundary=torus)",
    "conv(kernel=3,boundary=quadrant,dilation=2)",
]
# (layout, positions): whole, a prefix that ends inside a row, text alone, sides and texts that fill no tile.
LENGTHS = [("16+8x8", 80), ("16+8x8", 53), ("16+8x8", 16), ("33+6x9", 87), ("40+7x5", 70), ("7+3x11", 40)]
FLOATS = [torch.float32, torch.float16]


def differentiates(backend, dtype, head_dim):
    call = backends.Call("sparse_attention_backward", DEVICE, dtype, head_dim)
    with backends.use(backend):
        return backends.why_not(backend, call) is None


def check(backend, rule, layout, length, dtype, head_dim=32, batch=2, heads=2, backward=True):
    require(backend, "sparse_attention", dtype, head_dim)
    backward = backward and differentiates(backend, dtype, head_dim)
    mask = Mask.parse(f"{rule}@{layout}")
    q, k, v, grad = (randn(batch, heads, length, head_dim, dtype=dtype) for _ in range(4))
    allowed = torch.from_numpy(mask.dense()[:length, :length]).to(DEVICE)
    oracle_in = [x.requires_grad_() for x in doubles(q, k, v)]
    oracle, _ = reference.sparse_attention(*oracle_in, str(mask))
    plain_in = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = plain_attention(*plain_in, allowed)
    with backends.use(backend), canaries(q, k, v) as inside:
        ours = [x.detach().requires_grad_(backward) for x in inside]
        out = ops.sparse_attention(*ours, mask)
        assert_close(out.detach().cpu(), plain.detach().cpu(), oracle.detach())
        if not backward:
            return
        gradients = torch.autograd.grad(out, ours, grad)
    expected = torch.autograd.grad(oracle, oracle_in, grad.double().cpu())
    in_type = torch.autograd.grad(plain, plain_in, grad)
    for name, got, own, want in zip(("dq", "dk", "dv"), gradients, in_type, expected, strict=True):
        assert_close(got.cpu(), own.cpu(), want, times=3, mean_times=3, what=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("layout", "length"), LENGTHS)
def test_against_the_oracle(backend, rule, layout, length, dtype):
    check(backend, rule, layout, length, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_head_dims(backend, head_dim):
    check(backend, "row", "16+8x8", 80, torch.float32, head_dim, batch=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["row", "column", "conv(kernel=11,boundary=flat)"])
def test_at_the_papers_layout(backend, rule):
    check(backend, rule, "256+32x32", 1280, torch.float32, 64, batch=1, heads=1, backward=DEVICE == "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    require(backend, "sparse_attention", torch.float32, 32)
    mask = Mask.parse("column@16+4x4")
    qkv = torch.randn(2, 32, 3, 2, 32, device=DEVICE)  # [B, S, 3, H, D]: one projection, as the model makes it
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with backends.use(backend):
        got = ops.sparse_attention(q, k, v, mask)
        assert torch.equal(got, ops.sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("rule", ["row", "column"])
def test_gradcheck(backend, rule):
    mask = Mask.parse(f"{rule}@3+3x3")
    inputs = [torch.randn(1, 1, 12, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with backends.use(backend):
        assert torch.autograd.gradcheck(lambda q, k, v: ops.sparse_attention(q, k, v, mask), inputs)


def test_who_differentiates_computes():
    """The cpu backend has no gradient: by itself it serves without one only, and asked for by name it says so."""
    require("cpu", "sparse_attention", torch.float32, 16)
    mask, q = Mask.parse("row@4+4x4"), torch.randn(1, 2, 20, 16)
    with backends.use("cpu"):
        ours = ops.sparse_attention(q, q, q, mask)
        with pytest.raises(backends.BackendUnavailable, match="it has no sparse_attention_backward"):
            ops.sparse_attention(q.clone().requires_grad_(), q, q, mask)
        with torch.no_grad():
            assert torch.equal(ops.sparse_attention(q.clone().requires_grad_(), q, q, mask), ours)
    with backends.use("torch"):
        plain = ops.sparse_attention(q, q, q, mask)
    assert not torch.equal(ours, plain)
    assert torch.equal(ops.sparse_attention(q, q, q, mask), ours)
    assert torch.equal(ops.sparse_attention(q.clone().requires_grad_(), q, q, mask), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    require(backend, "sparse_attention", torch.float32, 16)
    trains = differentiates(backend, torch.float32, 16)
    inputs = [randn(1, 2, 20, 16, dtype=torch.float32).requires_grad_(trains) for _ in range(3)]
    with backends.use(backend):
        torch.library.opcheck(torch.ops.dalle_fast.sparse_attention.default, (*inputs, "row@4+4x4", trains))
        if not trains:
            return
        q, k, v = (x.detach() for x in inputs)
        out, lse = torch.ops.dalle_fast.sparse_attention(q, k, v, "row@4+4x4", True)
        torch.library.opcheck(
            torch.ops.dalle_fast.sparse_attention_backward.default, (out, q, k, v, out, lse, "row@4+4x4")
        )


def test_under_torch_compile():
    mask = Mask.parse("row@4+4x4")
    q = torch.randn(1, 1, 20, 16, device=DEVICE, requires_grad=True)

    def loss(x):
        return ops.sparse_attention(2 * x, x, x, mask).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = torch.autograd.grad(loss(q), q)[0], torch.autograd.grad(compiled(q), q)[0]
    assert torch.allclose(expected, got)
