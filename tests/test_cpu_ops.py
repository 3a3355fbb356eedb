"""The C++ ops against float64, for the instruction set in use; test_cpu_isa.py runs this file again for the others."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from dalle_fast import cpu_backend, reference
from dalle_fast.backends import Call
from dalle_fast.cpu_backend import PackedLinear, skinny_linear
from dalle_fast.masks import Mask
from dalle_fast.quantize import Int4, Int8, quantize

pytestmark = pytest.mark.skipif(cpu_backend.kernels_why_not() is not None, reason="the C++ kernels are not built")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads change no result (test_cpu_threads.py); these sizes are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TYPES = ("float32", "bfloat16", "int8", "int4")


def held(weight, dtype):
    """The weight as the packed form holds it, float64."""
    if dtype in ("int8", "int4"):
        return quantize(weight, dtype).dequantize().double()
    return weight.to(getattr(torch, dtype)).double()


def bound(x, weight, dtype):
    """Rounding of the inputs to bf16 (8 bits) or to 16 bits of the row's largest, and of the float32 sums, for each output."""
    unit = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 2.0**-15, "int4": 2.0**-15}[dtype]
    largest = x.abs().amax(1, keepdim=True)
    inputs = (x.abs() if dtype == "bfloat16" else largest.expand_as(x)) * unit
    sums = (x.abs() @ weight.abs().T) * 2.0**-24 * (8 + math.sqrt(x.shape[1]))
    return inputs @ weight.abs().T + sums + 1e-6


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 50, 37), (8, 96, 128), (17, 33, 129), (64, 64, 260)], ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_linear(dtype, shape):
    rows, outputs, inputs = shape
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, inputs)
    got = skinny_linear(x, PackedLinear(weight, bias, dtype=dtype))
    exact = held(weight, dtype)
    expected = x.double() @ exact.T + bias.double()
    assert ((got - expected).abs() <= bound(x.double(), exact, dtype)).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    packed = PackedLinear(torch.randn(70, 300), torch.randn(70), dtype=dtype)
    x = torch.randn(64, 300)
    whole = skinny_linear(x, packed)
    for rows in (1, 2, 3, 5, 8, 13, 31):
        assert torch.equal(skinny_linear(x[:rows], packed), whole[:rows])


@pytest.mark.parametrize("epilogue", cpu_backend.EPILOGUES)
def test_norm_epilogue_residual_and_scale(epilogue):
    x, norm = torch.randn(5, 48) * 3 + 1, (torch.randn(48), torch.randn(48))
    outputs = 84 if epilogue == "geglu" else 42
    weight, bias, scale = torch.randn(outputs, 48) / 7, torch.randn(outputs), torch.randn(outputs)
    packed = PackedLinear(weight, bias, dtype="float32", geglu=epilogue == "geglu", output_scale=scale)
    residual = torch.randn(5, 42)
    got = skinny_linear(x, packed, norm=norm, epilogue=epilogue, residual=residual)
    d = F.layer_norm(x.double(), (48,), *(y.double() for y in norm))
    d = F.linear(d, weight.double(), bias.double()) * scale.double()
    if epilogue == "geglu":
        d = d[:, :42] * F.gelu(d[:, 42:])
    elif epilogue != "none":
        d = F.gelu(d, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    assert (got - (d + residual.double())).abs().max() <= 3e-5


def test_gelu_everywhere():
    x = torch.linspace(-12, 12, 4001)[:, None]
    packed = PackedLinear(torch.ones(1, 1), dtype="float32")
    for name, form in (("gelu", "none"), ("gelu_tanh", "tanh")):
        error = skinny_linear(x, packed, epilogue=name).double() - F.gelu(x.double(), approximate=form)
        assert error.abs().max() <= 1e-6


def test_nan_and_infinity_reach_the_output():
    for dtype in TYPES:
        packed = PackedLinear(torch.ones(3, 40), dtype=dtype)
        for bad in (math.nan, math.inf):
            x = torch.ones(2, 40)
            x[1, 17] = bad
            y = skinny_linear(x, packed)
            assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_refused_arguments():
    packed = PackedLinear(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"expected \[B, 4\]"):
        skinny_linear(torch.ones(2, 5), packed)
    with pytest.raises(ValueError, match="without gates"):
        skinny_linear(torch.ones(2, 4), packed, epilogue="geglu")
    with pytest.raises(ValueError, match=r"expected \[3\]"):
        PackedLinear(torch.ones(3, 4), torch.ones(4))
    with pytest.raises(ValueError, match="even number of rows"):
        PackedLinear(torch.ones(3, 4), geglu=True)
    assert isinstance(quantize(torch.ones(3, 4), "int8"), Int8) and isinstance(quantize(torch.ones(3, 4), "int4"), Int4)


# decode_attention


@pytest.mark.parametrize("rule", ["full", "row", "column", "conv(kernel=5,boundary=torus)"])
@pytest.mark.parametrize("dim", [16, 48, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention(dtype, dim, rule):
    prompts, group, heads, text, n = 2, 3, 2, 13, 4
    mask = Mask.parse(f"{rule}@{text}+6x5")
    slots = mask.tail_slots(n)
    prefix = [torch.randn(prompts, heads, text, dim).to(dtype) for _ in "kv"]
    tails = [torch.full((prompts * group, heads, slots, dim), math.nan, dtype=dtype) for _ in "kv"]
    plain, exact = [t.clone() for t in tails], [t.double() for t in tails]
    cell = 0
    for count in (1, 4, 3, 1, 4, 2, 4, 4, 1, 4, 2):
        q, k, v = (torch.randn(prompts * group, heads, count, dim).to(dtype) for _ in "qkv")
        position = torch.tensor([cell])
        got = cpu_backend.decode_attention(q, k, v, *prefix, *tails, position, str(mask))
        same = reference.decode_attention(q, k, v, *prefix, *plain, position, str(mask))
        wide = [x.double() for x in (q, k, v, *prefix)]
        expected = reference.decode_attention(*wide, *exact, position, str(mask))
        floor = 2 * torch.finfo(dtype).eps * expected.abs().max()
        assert (got - expected).abs().max() <= 2 * (same - expected).abs().max() + floor
        assert all(torch.equal(a, b.to(dtype), ) or torch.equal(a.nan_to_num(7), b.to(dtype).nan_to_num(7))
                   for a, b in zip(tails, exact, strict=True))  # fmt: skip
        cell += count
    assert cell == mask.layout.cells


# sample


@pytest.mark.parametrize("vocab", [1, 7, 1000, 5000])  # 5000: pieces of a row, the last one cut
@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.6, 1e-6])
def test_sample_equals_the_reference(vocab, top_k, top_p):
    logits = (torch.randn(12, vocab) * 3).round() if vocab == 7 else torch.randn(12, vocab) * 3  # 7: many ties
    candidates = torch.arange(12) * 10**12 - 5
    arguments = (0.7, min(top_k, vocab), top_p, 2**62 + 12345, candidates, torch.tensor([900]))
    got = cpu_backend.sample(logits, *arguments)
    assert torch.equal(got, reference.sample(logits.double(), *arguments))
    assert torch.equal(cpu_backend.sample(logits[5:6], *arguments[:4], candidates[5:6], arguments[5]), got[5:6])


def test_sample_at_the_coldest():
    logits = torch.randn(4, 50)
    got = cpu_backend.sample(logits, 1e-30, 0, 1.0, 1, torch.arange(4), torch.tensor([0]))
    assert torch.equal(got, logits.argmax(1))


def test_why_not():
    assert cpu_backend.why_not(Call("decode_attention", "cpu", torch.float32, 64)) is None
    assert "multiple of 16" in (cpu_backend.why_not(Call("decode_attention", "cpu", torch.float32, 24)) or "")
    assert "float64" in (cpu_backend.why_not(Call("sample", "cpu", torch.float64, 0)) or "")
    assert "cuda" in (cpu_backend.why_not(Call("sample", "cuda", torch.float32, 0)) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "length"), [("256+32x32", 1280), ("21+5x7", 21), ("21+5x7", 23), ("3+5x7", 38)])
def test_whole_sequences(dtype, layout, length):
    """The log-sum-exp too, which the gradient needs; and keys and values of unlike strides."""
    mask = f"row@{layout}"
    q, k, v = (2 * torch.randn(1, 2, length, 48).to(dtype) for _ in range(3))
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    expected, expected_lse = reference.sparse_attention(q.double(), k.double(), v.double(), mask)
    plain, _ = reference.sparse_attention(q, k, v, mask)
    out, lse = cpu_backend.sparse_attention(q, k, v, mask)
    assert_close(out, plain, expected)
    assert (lse - expected_lse).abs().max() < 1e-5


def test_whole_sequences_do_not_depend_on_threads():
    q, k, v = (torch.randn(2, 3, 16 + 77, 32) for _ in range(3))
    one = cpu_backend.sparse_attention(q, k, v, "column@16+7x11")
    for threads in (2, 5):
        torch.set_num_threads(threads)
        more = cpu_backend.sparse_attention(q, k, v, "column@16+7x11")
        assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True))


@pytest.mark.parametrize(("score", "counts"), [(-86.0, True), (-88.0, False), (-95.0, False)])
def test_a_probability_too_small_for_a_normal_float_is_none(score, counts):
    """Arithmetic with denormals is many times slower, and masked keys would all be such."""
    q, k, v = torch.zeros(3, 1, 1, 16, 16).unbind()
    q[..., 0], k[:, :, 1:, 0], v[:, :, 1:] = 1, 4 * score, 1e30  # scaled by 1 / sqrt(16); key 0 has all the weight
    out, _ = cpu_backend.sparse_attention(q, k, v, "column@16+7x11")
    assert (out[:, :, 1:] > 0).all() if counts else (out[:, :, 1:] == 0).all()
