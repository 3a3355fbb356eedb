"""decode_attention of every backend that runs here: the output, and the tail that it leaves, step by step."""

import math

import pytest
import torch
from helpers import BACKENDS, DEVICE, assert_close, canaries, plain_attention, randn, require
from torch._subclasses import FakeTensor, FakeTensorMode

from dalle_fast import backends, ops, reference
from dalle_fast.masks import Mask

RULES = [
    *("full", "row", "row(window=in_row)", "column", "conv(kernel=3,boundary=flat)", "conv(kernel=3,boundary=torus)"),
    *("conv(kernel=5,boundary=clip)", "conv(kernel=3,boundary=quadrant,dilation=2)"),
]
# prompts, candidates each, cells a step, first cell
CASES = [
    *((1, 1, 1, 0), (1, 5, 1, 37), (2, 3, 1, 63), (3, 1, 4, 21), (2, 2, 8, 0), (1, 17, 3, 40)),
    *((1, 1, 1, 1), (1, 2, 1, 8), (1, 3, 1, 56), (2, 1, 1, 9), (1, 4, 2, 62), (4, 2, 1, 30), (1, 16, 1, 12)),
]

ORDERS = 4  # of the sums in plain PyTorch


def plain_step(q, k, v, prefix_k, prefix_v, tail_k, tail_v, first, mask):
    """The same step as dense attention over gathered keys, in the inputs' type, with the sums in each of ORDERS orders."""
    tables, group = mask.decode_tables(tail_k.shape[2]), len(q) // len(prefix_k)
    text_k, text_v = (x.repeat_interleave(group, dim=0) for x in (prefix_k, prefix_v))
    outs, shuffle = [torch.empty_like(q) for _ in range(ORDERS)], torch.Generator().manual_seed(0)
    for i in range(q.shape[2]):
        slot = int(tables.slot_of_cell[first + i])
        tail_k[:, :, slot], tail_v[:, :, slot] = k[:, :, i], v[:, :, i]
        read = torch.from_numpy(tables.slots[first + i, : tables.counts[first + i]]).long()
        keys, values = torch.cat([text_k, tail_k[:, :, read]], 2), torch.cat([text_v, tail_v[:, :, read]], 2)
        for out in outs:
            d, key = (torch.randperm(count, generator=shuffle) for count in (q.shape[3], keys.shape[2]))
            one = (q[:, :, i : i + 1][..., d], keys[:, :, key][..., d], values[:, :, key])
            out[:, :, i] = plain_attention(*one, torch.ones(1, dtype=torch.bool, device=q.device))[:, :, 0]
    return outs


def inputs(mask, prompts, group, n, first, dtype, head_dim, heads=2):
    """A tail in which the cells before `first` are written, and everything else is NaN."""
    batch, text = prompts * group, mask.layout.text_len
    slots = mask.tail_slots(n)
    q, k, v = (randn(batch, heads, n, head_dim, dtype=dtype) for _ in range(3))
    prefix = [randn(prompts, heads, text, head_dim, dtype=dtype) for _ in range(2)]
    tails = [torch.full((batch, heads, slots, head_dim), math.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    slot_of_cell = mask.decode_tables(slots).slot_of_cell
    for tail in tails:
        for cell in range(max(0, first - slots), first):
            tail[:, :, int(slot_of_cell[cell])] = randn(batch, heads, head_dim, dtype=dtype)
    return q, k, v, *prefix, *tails


def check(backend, mask, prompts, group, n, first, dtype, head_dim=32):
    require(backend, "decode_attention", dtype, head_dim)
    args = inputs(mask, prompts, group, n, first, dtype, head_dim)
    wide = [x.double().cpu() for x in args]
    expected = reference.decode_attention(*wide, torch.tensor([first]), str(mask))
    plain = [out.cpu() for out in plain_step(*(x.clone() for x in args), first, mask)]
    with backends.use(backend), canaries(*args) as inside:
        got = ops.decode_attention(*inside, torch.tensor([first], device=DEVICE), mask)
        assert_close(got.cpu(), plain, expected)
        for name, tail, want in zip(("tail_k", "tail_v"), inside[5:], wide[5:], strict=True):
            assert torch.equal(tail.double().cpu().nan_to_num(7e7), want.nan_to_num(7e7)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_against_the_oracle(backend, rule, case, dtype):
    prompts, group, n, first = case
    check(backend, Mask.parse(f"{rule}@19+8x8"), prompts, group, n, first, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_head_dims(backend, head_dim):
    check(backend, Mask.parse("column@16+4x4"), 1, 3, 1, 9, torch.float32, head_dim)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["row", "column", "conv(kernel=11,boundary=flat)"])
@pytest.mark.parametrize("first", [0, 700, 992])
def test_at_the_papers_layout(backend, rule, first):
    check(backend, Mask.parse(f"{rule}@256+32x32"), 1, 3, 1, first, torch.float32, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_at_once(backend):
    check(backend, Mask.parse("row@16+4x32"), 1, 2, 32, 64, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    require(backend, "decode_attention", torch.float32, 16)
    mask = Mask.parse("row@4+4x4")
    args = inputs(mask, 1, 2, 1, 3, torch.float32, 16)
    args = [x.nan_to_num(0) for x in args]  # opcheck compares runs, and NaN equals nothing
    with backends.use(backend):
        torch.library.opcheck(
            torch.ops.dalle_fast.decode_attention.default, (*args, torch.tensor([3], device=DEVICE), str(mask))
        )


def test_unchecked_is_the_same_and_dispatched_where_someone_looks_on(monkeypatch):
    mask, position = Mask.parse("row@4+4x4"), torch.tensor([3], device=DEVICE)
    args = inputs(mask, 1, 2, 1, 3, torch.float32, 16)
    copies = [x.clone() for x in args]
    expected = ops.decode_attention(*args, position, mask)
    dispatched = ops.torch.ops.dalle_fast.decode_attention
    monkeypatch.setattr(ops.torch.ops.dalle_fast, "decode_attention", None)
    out = ops.decode_attention_unchecked(*copies, position, mask, None)
    assert torch.equal(out, expected)
    for copy, x in zip(copies, args, strict=True):
        torch.testing.assert_close(copy, x, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(ops.torch.ops.dalle_fast, "decode_attention", dispatched)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(ops.decode_attention_unchecked(*copies, position, mask, None), FakeTensor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_position_may_change_under_a_kernel(backend):
    """One recorded step serves every position: nothing but the tensor tells where it is."""
    require(backend, "decode_attention", torch.float32, 16)
    mask, position = Mask.parse("row@4+4x4"), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    whole = [randn(2, 1, 16, 16, dtype=torch.float32) for _ in range(3)]
    prefix = [randn(1, 1, 4, 16, dtype=torch.float32) for _ in range(2)]
    tails = [torch.full((2, 1, mask.tail_slots(), 16), math.nan, device=DEVICE) for _ in range(2)]
    allowed = torch.from_numpy(mask.dense()).to(DEVICE)[4:]
    keys, values = (torch.cat([p.expand(2, -1, -1, -1), x], 2) for p, x in zip(prefix, whole[1:], strict=True))
    expected = plain_attention(whole[0], keys, values, allowed)
    with backends.use(backend):
        for cell in range(16):
            out = ops.decode_attention(*(x[:, :, cell : cell + 1] for x in whole), *prefix, *tails, position, mask)
            assert (out[:, :, 0] - expected[:, :, cell]).abs().max() < 1e-5
            position += 1


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rule", ["column", "conv(kernel=3,boundary=torus)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_fp8_tails(backend, rule, dtype, n):
    """What is kept is the nearest e4m3 multiple of its head's scale, or the largest; the step reads that, and the cells
    that it appends as they come."""
    require(backend, "decode_attention_fp8", dtype, 16)
    mask, prompts, group, heads = Mask.parse(f"{rule}@16+6x6"), 2, 2, 2
    scales = (
        torch.tensor([2.0**-6, 0.003]),
        torch.tensor([0.003, 2.0**-7]),
    )  # powers of 2: ties; 448 x 0.003 is passed
    *_, prefix_k, prefix_v, tail_k, _ = inputs(mask, prompts, group, n, 0, dtype, 16)
    shape = (*tail_k.shape[:2], mask.layout.cells, 16)
    codes = [torch.full(shape, math.nan, device=DEVICE).to(torch.float8_e4m3fn) for _ in "kv"]
    kept = [torch.full(shape, math.nan, dtype=torch.float64) for _ in "kv"]
    slot_of_cell = torch.from_numpy(mask.decode_tables(mask.layout.cells).slot_of_cell).long()
    for first in range(0, 18, n):
        new = [randn(prompts * group, heads, n, 16, dtype=dtype) for _ in range(3)]
        new[1][..., :4] *= 1e-3  # subnormal codes, and zeros
        args, position = (*new, prefix_k, prefix_v), torch.tensor([first], device=DEVICE)
        with backends.use(backend):
            got = ops.decode_attention(*args, *codes, position, mask, tuple(x.to(DEVICE) for x in scales))
        wide = [x.double().cpu() for x in args]
        exact = [x.clone() for x in kept]
        expected = reference.decode_attention(*wide, *exact, torch.tensor([first]), str(mask))
        plain = plain_step(*(x.cpu() for x in args), *(x.to(dtype) for x in kept), first, mask)
        assert_close(got.cpu(), plain, expected)
        slots = slot_of_cell[first : first + n]
        for code, whole, scale, x in zip(codes, kept, scales, new[1:], strict=True):
            wanted = (x.cpu().float() / scale[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(code.cpu().float()[:, :, slots], wanted.float()), first
            whole[:, :, slots] = wanted.double() * scale.double()[:, None, None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_fp8_tails(backend):
    require(backend, "decode_attention_fp8", torch.float32, 16)
    mask, scale = Mask.parse("column@4+4x4"), torch.ones(2, device=DEVICE)
    *args, tail, _ = (x.nan_to_num(0) for x in inputs(mask, 1, 2, 1, 3, torch.float32, 16))
    tails = [torch.zeros(tail.shape, device=DEVICE).to(torch.float8_e4m3fn) for _ in "kv"]
    with backends.use(backend):
        torch.library.opcheck(
            torch.ops.dalle_fast.decode_attention_fp8.default,
            (*args, *tails, scale, scale, torch.tensor([3], device=DEVICE), str(mask)),
            test_utils=("test_autograd_registration", "test_faketensor"),  # test_schema multiplies, which no 8 bits can
        )


def test_fp8_tails_need_scales():
    mask = Mask.parse("column@4+4x4")
    *args, tail_k, tail_v = inputs(mask, 1, 1, 1, 0, torch.float32, 16)
    position, ones = torch.tensor([0], device=DEVICE), torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"got tail_k torch.float32 .* with scales, expected torch.float8_e4m3fn"):
        ops.decode_attention(*args, tail_k, tail_v, position, mask, (ones, ones))
    codes = [x.to(torch.float8_e4m3fn) for x in (tail_k, tail_v)]
    with pytest.raises(ValueError, match=r"got tail_k torch.float8_e4m3fn on .*, expected torch.float32"):
        ops.decode_attention(*args, *codes, position, mask)
    with pytest.raises(ValueError, match=r"got scales \[1\] torch.float32 .*expected \[2\] float32"):
        ops.decode_attention(*args, *codes, position, mask, (ones, ones[:1]))
