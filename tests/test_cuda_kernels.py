"""The CUDA kernels, executed: on the CPU through tests/cuda_on_cpu, and on a GPU where there is one."""

from functools import partial

import pytest
import torch
from cuda_emulation import Machine, available, machines
from helpers import assert_close
from test_decode_attention import inputs, plain_step
from test_sample import CUTS

from dalle_fast import cuda_backend, reference, torch_backend
from dalle_fast.backends import Call
from dalle_fast.cuda_backend import Shape
from dalle_fast.masks import Mask

pytestmark = available
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def machine(request):
    return Machine(request.param)


def check(machine, mask, prompts, group, n, first, dtype, head_dim, shape=None, heads=2):
    mask = Mask.parse(mask)
    args = [x.cpu() for x in inputs(mask, prompts, group, n, first, dtype, head_dim, heads)]
    wide, position = [x.double() for x in args], torch.tensor([first])
    expected = reference.decode_attention(*wide, position, str(mask))
    plain = plain_step(*(x.clone() for x in args), first, mask)
    got = machine(cuda_backend.decode_attention, *args, position, str(mask), shape=shape)
    assert_close(got, plain, expected)
    for name, tail, want in zip(("tail_k", "tail_v"), args[5:], wide[5:], strict=True):
        assert torch.equal(tail.double().nan_to_num(7e7), want.nan_to_num(7e7)), name


SHAPES = [Shape(16, 1), Shape(64, 1), Shape(16, 3), Shape(64, 2)]


@machines
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention(machine, dtype, head_dim, shape):
    check(machine, "row@150+8x8", 2, 9, 2, 21, dtype, head_dim, shape)


# mask, prompts, candidates each, cells a step, first cell
CASES = [
    ("full@1+8x8", 1, 1, 1, 0),  # one key of the prefix, one of the tail
    ("full@64+16x16", 1, 3, 1, 255),  # 256 neighbours
    ("row@19+8x8", 2, 17, 1, 63),
    ("row(window=in_row)@63+8x8", 3, 1, 4, 21),
    ("column@65+8x8", 2, 2, 8, 0),
    ("conv(kernel=3,boundary=flat)@129+8x8", 1, 70, 1, 40),
    ("conv(kernel=5,boundary=torus)@128+7x9", 1, 5, 3, 60),
    ("row@16+4x32", 1, 2, 32, 64),
]


@machines
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_odd_sizes(machine, case, shape):
    check(machine, *case, BF16 if shape.rows == 16 else FP16, 64, shape, heads=1)


@machines
@pytest.mark.parametrize("rule", ["row", "column", "conv(kernel=11,boundary=flat)"])
@pytest.mark.parametrize("first", [0, 992])
def test_at_the_papers_layout(machine, rule, first):
    check(machine, f"{rule}@256+32x32", 1, 2, 1, first, BF16, 64, heads=1)


@machines
def test_the_splits_join_again_and_again(machine):
    """The counters that the last block of a tile resets serve the next step."""
    mask = Mask.parse("row@150+4x4")
    prefix = [torch.randn(1, 1, 150, 64, dtype=BF16) for _ in "kv"]
    tails = [torch.zeros(3, 1, mask.tail_slots(), 64, dtype=BF16) for _ in "kv"]
    for cell in range(4):
        q, k, v = (torch.randn(3, 1, 1, 64, dtype=BF16) for _ in "qkv")
        args, position = (q, k, v, *prefix, *tails), torch.tensor([cell])
        wide = [x.double() for x in args]
        expected = reference.decode_attention(*wide, position, str(mask))
        plain = plain_step(*(x.clone() for x in args), cell, mask)
        got = machine(cuda_backend.decode_attention, *args, position, str(mask), shape=Shape(16, 3))
        assert_close(got, plain, expected)


@machines
def test_large_scores_and_strides(machine):
    """Scores of a thousand: the maximum is subtracted in time. Inputs not contiguous; a tail that is a view is changed."""
    mask = Mask.parse("row@40+4x4")
    q, k, v, *rest = (x.cpu() for x in inputs(mask, 1, 3, 2, 5, FP16, 64))
    q, k = q * 12, k * 12
    rest[2] = torch.stack([rest[2], rest[2]], dim=-1)[..., 0]
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    args, position = (q, k, v, *rest), torch.tensor([5])
    wide = [x.double() for x in args]
    expected = reference.decode_attention(*wide, position, str(mask))
    plain = plain_step(*(x.clone() for x in args), 5, mask)
    assert_close(machine(cuda_backend.decode_attention, *args, position, str(mask)), plain, expected)
    assert torch.equal(args[5].double().nan_to_num(7e7), wide[5].nan_to_num(7e7))


@machines
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("rule", "head_dim", "n", "shape"),
    [
        ("column", 64, 1, Shape(16, 1)),
        ("column", 128, 3, Shape(64, 2)),
        ("row", 64, 4, Shape(16, 3)),
        ("conv(kernel=3,boundary=torus)", 64, 1, Shape(64, 1)),
    ],
    ids=str,
)
def test_fp8_tails(machine, rule, head_dim, n, shape, dtype):
    """Codes that nobody wrote yet are NaN: they must not be read. Some values are beyond the largest code, some are so small
    that their codes are subnormal or zero."""
    mask, prompts, group, heads, steps = Mask.parse(f"{rule}@70+6x6"), 2, 2, 2, 12
    scales = (torch.tensor([2.0**-6, 0.003]), torch.tensor([0.003, 2.0**-7]))  # powers of 2: ties
    *_, prefix_k, prefix_v, tail_k, _ = (x.cpu() for x in inputs(mask, prompts, group, n, 0, dtype, head_dim))
    shape_of_tail = (*tail_k.shape[:2], mask.layout.cells, head_dim)
    codes = [torch.full(shape_of_tail, 127, dtype=torch.uint8) for _ in "kv"]
    kept = [torch.full(shape_of_tail, float("nan"), dtype=torch.float64) for _ in "kv"]
    slot_of_cell = torch.from_numpy(mask.decode_tables(mask.layout.cells).slot_of_cell).long()
    for first in range(0, steps, n):
        q, k, v = (torch.randn(prompts * group, heads, n, head_dim, dtype=dtype) for _ in "qkv")
        k[..., :4] *= 1e-3
        args, position = (q, k, v, prefix_k, prefix_v), torch.tensor([first])
        function = cuda_backend.decode_attention_fp8
        got = machine(function, *args, *codes, *scales, position, str(mask), shape=shape)
        exact = [x.clone() for x in kept]
        expected = reference.decode_attention(*(x.double() for x in args), *exact, position, str(mask))
        assert_close(got, plain_step(*args, *(x.to(dtype) for x in kept), first, mask), expected)
        slots = slot_of_cell[first : first + n]
        for code, whole, scale, x in zip(codes, kept, scales, (k, v), strict=True):
            wanted = reference.e4m3(x, scale)
            assert torch.equal(code[:, :, slots], wanted.view(torch.uint8)), first
            whole[:, :, slots] = wanted.double() * scale.double()[:, None, None]


@machines
@pytest.mark.parametrize("n", [1, 3])
def test_parts_of_one_projection_are_not_copied(machine, n):
    """q, k and v [B, H, n, D] as views of [B, n, 3, H, D]."""
    mask = Mask.parse("row@40+4x4")
    _, _, _, *rest = (x.cpu() for x in inputs(mask, 1, 5, n, 6, BF16, 64))
    qkv, position = torch.randn(5, n, 3, 2, 64, dtype=BF16), torch.tensor([6])

    def call(qkv, *others):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        assert n == 1 or not q.is_contiguous()
        assert all(x is y for x, y in zip(cuda_backend.alike(q, k, v), (q, k, v), strict=True))
        return cuda_backend.decode_attention(q, k, v, *others, str(mask))

    args = (*qkv.permute(2, 0, 3, 1, 4).unbind(0), *rest)
    wide = [x.double() for x in args]
    expected = reference.decode_attention(*wide, position, str(mask))
    plain = plain_step(*(x.clone() for x in args), 6, mask)
    assert_close(machine(call, qkv, *rest, position), plain, expected)
    for tail, want in zip(rest[2:], wide[5:], strict=True):
        assert torch.equal(tail.double().nan_to_num(7e7), want.nan_to_num(7e7))


def test_parts_that_cannot_be_read_as_they_are():
    q, _, v = torch.randn(3, 5, 2, 1, 64, dtype=BF16).unbind(0)
    for odd in (
        torch.randn(5, 1, 2, 64, dtype=BF16).transpose(1, 2),
        torch.randn(5 * 128 + 1, dtype=BF16)[1:].view_as(q),
    ):
        assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in cuda_backend.alike(q, odd, v))


# sample


def both(machine, logits, cut, seed=2**63 + 17, first=2**33, position=5):
    """Tokens of the kernel and of the oracle."""
    top_k, top_p, temperature = cut
    candidates = torch.arange(first, first + len(logits))
    args = (logits, temperature, top_k, top_p, seed, candidates, torch.tensor([position]))
    return machine(cuda_backend.sample, *args), reference.sample(*args)


@machines
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=str)
def test_sample(machine, cut, dtype):
    got, expected = both(machine, (3 * torch.randn(6, 301)).to(dtype), cut)
    assert torch.equal(got, expected)


@machines
@pytest.mark.parametrize("cut", [(0, 1.0, 1.0), (100, 0.9, 0.9), (0, 0.999, 1.0)], ids=str)
def test_sample_at_the_size_of_a_codebook(machine, cut):
    got, expected = both(machine, 2 * torch.randn(2, 8192), cut)
    assert torch.equal(got, expected)


@machines
@pytest.mark.parametrize("cut", [(2, 1.0, 1.0), (0, 0.5, 1.0), (3, 0.7, 1.0), (36, 0.99, 1.0)], ids=str)
def test_ties_go_to_the_lower_token(machine, cut):
    logits = torch.randint(-2, 3, (24, 37)).float()
    logits[:3] = 0.0
    logits[3:6] *= -0.0  # zeros of both signs are equal
    got, expected = both(machine, logits, cut)
    assert torch.equal(got, expected)
    for row, token in zip(logits, got.tolist(), strict=True):
        assert reference.allowed_tokens(row, cut[2], cut[0], cut[1])[token]


@machines
def test_the_coldest_and_one_token(machine):
    logits = torch.randn(4, 50)
    assert torch.equal(both(machine, logits, (0, 1.0, 1e-30))[0], logits.argmax(1))
    assert both(machine, logits[:, :1].contiguous(), (1, 0.5, 1.0))[0].tolist() == [0] * 4
    minus = torch.full((2, 40), -torch.inf)
    minus[:, 7] = 1.0
    assert both(machine, minus, (30, 0.9, 1.0))[0].tolist() == [7, 7]


@machines
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=str)
def test_draw(machine, guidance_scale, positions, dtype):
    """Also a token that is known, more channels than threads, and the last cell, after which no place is left."""
    n, vocab, dim, (height, width) = 3, 301, 600, (5, 7)
    batch = n if guidance_scale == 1 else 2 * n
    for cell, top_k in ((1, 0), (17, 20), (35, 0)):
        logits, table = (3 * torch.randn(batch, vocab)).to(dtype), torch.randn(vocab, dim).to(dtype)
        rows, columns = (torch.randn(size, dim).to(dtype) if positions else None for size in (height, width))
        given = torch.tensor([-1, vocab - 1, -1])
        args = [
            logits,
            0.8,
            top_k,
            0.9,
            guidance_scale,
            2**63 + 5,
            torch.arange(7, 7 + n),
            given,
            torch.tensor([cell]),
            1,
        ]
        results = []
        for run in (partial(machine, cuda_backend.draw), reference.draw, torch_backend.draw):
            x = torch.zeros(batch, dim).to(dtype)
            results.append((*run(*args, x, table, rows, columns, 1), x))
        for tokens, log_p, x in results[:2]:
            assert torch.equal(tokens, results[1][0]) and tokens[1] == vocab - 1
            assert torch.allclose(log_p, results[1][1], atol=2e-6, rtol=0)
            assert torch.equal(x, results[1][2]) and (positions and cell == 35) != bool(x.any())
        assert torch.equal(results[2][0], results[1][0]) and torch.allclose(results[2][1], results[1][1], atol=1e-5)
        if not (positions and cell == 35):
            assert torch.equal(results[2][2], results[1][2])


# the choice of the backend


def test_why_not():
    def reason(op, dtype, head_dim=0):
        return cuda_backend.unsupported(Call(op, "cuda", dtype, head_dim))

    assert reason("decode_attention", BF16, 128) is None and reason("sample", torch.float32) is None
    assert reason("decode_attention", torch.float32, 64) == "it computes in bfloat16 and float16, got float32"
    assert reason("decode_attention", FP16, 96) == "it needs a head dim of 64 or 128, got 96"
    assert "got float64" in str(reason("sample", torch.float64))
    assert "got tensors on cpu" in str(cuda_backend.why_not(Call("sample", "cpu", torch.float32, 0)))


@pytest.mark.parametrize(("limit", "dims"), [(99, []), (163, [64, 128]), (110, [64])])
def test_what_a_thread_block_needs(monkeypatch, limit, dims):
    """Of shared memory: devices that have little leave decode_attention to the next backend."""
    monkeypatch.setattr(cuda_backend, "kernels_why_not", lambda: None)
    monkeypatch.setattr(cuda_backend, "describe", lambda device: cuda_backend.Device(128, True, limit << 10))
    for name, value in (("is_available", True), ("get_device_capability", (8, 9)), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    reasons = {dim: cuda_backend.why_not(Call("decode_attention", "cuda", BF16, dim)) for dim in (64, 128)}
    assert [dim for dim, reason in reasons.items() if reason is None] == dims
    if limit == 99:
        assert reasons[128] == "it needs 140 KiB of shared memory a thread block for a head dim of 128, got 99"
    assert cuda_backend.why_not(Call("sample", "cuda", BF16, 0)) is None


def test_how_work_is_shared_out():
    """On the 132 multiprocessors of an H100: 62 heads of 64, 16 of 128."""
    assert cuda_backend.share_out(132, 1, 62, 1, 64) == Shape(16, 4)
    assert cuda_backend.share_out(132, 1, 62, 8, 64) == Shape(16, 1)
    assert cuda_backend.share_out(132, 1, 62, 64, 64) == Shape(16, 1)
    assert cuda_backend.share_out(132, 1, 62, 512, 64) == Shape(64, 1)
    assert cuda_backend.share_out(132, 1, 16, 1, 128) == Shape(16, 4)
    assert cuda_backend.share_out(132, 1, 16, 64, 128) == Shape(16, 1)
    assert cuda_backend.share_out(132, 8, 16, 1, 128) == Shape(16, 1)
