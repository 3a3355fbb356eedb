"""skinny_linear: packing, the op and its checks, and every backend that serves it here against float64."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DEVICE, assert_close, canaries, randn, require
from hypothesis import given, settings

from dalle_fast import backends
from dalle_fast.cpu_backend import EPILOGUES, PackedLinear, kernels_why_not
from dalle_fast.linear import skinny_linear
from dalle_fast.packing import BLOCK, FLOATS, KINDS, RECORD, STAGES, Branch, pack, record_bytes
from dalle_fast.quantize import quantize, relative_error


def rounded(weight, kind):
    """The weight as `kind` holds it, float32."""
    if kind in ("int8", "int4"):
        return quantize(weight, kind).dequantize()
    return weight.to(getattr(torch, kind)).float()


@settings(max_examples=60)
@given(
    kind=st.sampled_from(list(KINDS)),
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 400),
    geglu=st.booleans(),
    quantized=st.booleans(),
)
def test_unpacking_gives_back_what_was_packed(kind, outputs, inputs, geglu, quantized):
    outputs += outputs % 2 if geglu else 0
    inputs += -inputs % 8 if kind in FLOATS else 0
    weight, bias, scale = torch.randn(outputs, inputs), torch.randn(outputs), torch.rand(outputs) + 1
    source = quantize(weight, kind) if quantized and kind in ("int8", "int4") else weight
    packed = pack(source, bias, kind=kind, geglu=geglu)
    assert torch.equal(packed.dequantize(), rounded(weight, kind))
    assert torch.equal(packed.rows(packed.bias), bias)
    assert (packed.outputs, packed.inputs) == (outputs // 2 if geglu else outputs, inputs)
    scaled = pack(source, bias, kind=kind, geglu=geglu, output_scale=scale)
    assert torch.allclose(scaled.dequantize(), rounded(weight, kind) * scale[:, None], rtol=1e-6)
    assert torch.equal(scaled.rows(scaled.bias), bias * scale)


@pytest.mark.parametrize("kind", STAGES)
def test_a_lane_reads_its_registers(kind):
    """Where the first lanes' weights lie, by the table in packing.py."""
    weight = torch.arange(BLOCK * 256, dtype=torch.float32).view(BLOCK, 256)  # value = 256 * row + input
    levels = 7 if kind == "int4" else 127
    weight = weight % (2 * levels + 1) - levels
    weight[:, ::128] = levels  # every scale is 1
    record = pack(weight, kind=kind).data[0, 1, 2]
    lane, row, stage = 9, 16 * 2 + 2, STAGES[kind]
    k = stage + 8 * (lane % 4)
    if kind == "int8":
        word = record.view(torch.int8).view(2, 32, 4, 4)[0, lane, 0]
        assert word[[0, 2]].tolist() == weight[row, k : k + 2].tolist()
        assert word[[1, 3]].tolist() == weight[row + 8, k : k + 2].tolist()
    else:
        word = int(record[:RECORD].view(torch.int32).view(2, 32, 4)[0, lane, 0])
        nibbles = [(word >> 4 * i & 15) - 8 for i in range(8)]
        assert [nibbles[0], nibbles[4]] == weight[row, k : k + 2].tolist()
        assert [nibbles[1], nibbles[5]] == weight[row + 8, k : k + 2].tolist()
        scales = record[RECORD:].view(torch.float32)
        assert len(scales) == 16 and bool((scales == 1).all())


def test_a_weight_takes_as_many_bits_as_it_says():
    weight = torch.randn(256, 512)
    bits = {kind: 8 * pack(weight, kind=kind).data.nbytes / weight.numel() for kind in KINDS}
    assert bits == {"bfloat16": 16, "float16": 16, "int8": 8, "int4": 4.25}
    assert (
        relative_error(weight, quantize(weight, "int8"))
        < 0.01
        < relative_error(weight, quantize(weight, "int4"))
        < 0.12
    )


@pytest.mark.parametrize("kind", FLOATS)
def test_16_bit_weights_stay_where_they_are(kind):
    weight = torch.randn(12, 16).to(FLOATS[kind])
    packed = pack(weight, kind=kind)
    assert packed.dense and packed.data.data_ptr() == weight.data_ptr()


def problem(rows, outputs, inputs, kind, epilogue="none", norm=False, residual=False, dtype=torch.bfloat16):
    inputs += -inputs % 8 if kind in FLOATS else 0
    gates = 2 if epilogue == "geglu" else 1
    weight, bias = torch.randn(outputs * gates, inputs) / inputs**0.5, torch.randn(outputs * gates)
    packed = pack(weight.to(DEVICE), bias.to(DEVICE), kind=kind, geglu=gates == 2)
    x = randn(rows, inputs, dtype=dtype) * 2 + 1
    vectors = (torch.rand(inputs).to(DEVICE) + 0.5, torch.randn(inputs).to(DEVICE)) if norm else None
    return x, packed, {
        "norm": vectors, "epilogue": epilogue, "residual": randn(rows, outputs, dtype=dtype) if residual else None
    }  # fmt: skip


def oracle(x, packed, arguments):
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with backends.use("reference"):
        return skinny_linear(x.double(), packed, **double)


SHAPES = [(1, 1, 1), (2, 50, 37), (7, 96, 128), (8, 130, 520), (9, 33, 129), (64, 264, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("cpu", "triton")])
def test_every_backend_computes_the_formula(backend, kind, shape):
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    require(backend, "skinny_linear", dtype)
    for epilogue in EPILOGUES:
        for norm, residual in ((False, True), (True, False)):
            x, packed, arguments = problem(*shape, kind, epilogue, norm, residual, dtype)
            with backends.use("torch"):
                plain = skinny_linear(x, packed, **arguments)
            with backends.use(backend), canaries(x) as (guarded,):
                got = skinny_linear(guarded, packed, **arguments)
            assert_close(got, plain, oracle(x, packed, arguments))


def test_the_reference_is_pytorch_in_float64():
    for epilogue in EPILOGUES:
        x, packed, arguments = problem(5, 40, 72, "bfloat16", epilogue, True, True, torch.float64)
        norm = [v.double() for v in arguments["norm"]]
        y = F.linear(F.layer_norm(x, (72,), *norm), packed.dequantize().double(), packed.rows(packed.bias).double())
        if epilogue == "geglu":
            y = y[:, :40] * F.gelu(y[:, 40:])
        elif epilogue != "none":
            y = F.gelu(y, approximate="tanh" if epilogue == "gelu_tanh" else "none")
        assert torch.allclose(oracle(x, packed, arguments), y + arguments["residual"], atol=1e-12)


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_opcheck(kind):
    x, packed, arguments = problem(3, 40, 72, kind, "gelu", True, True)
    weight, bias = arguments["norm"]
    branch = (torch.randn_like(x), weight + 1, bias + 1, torch.zeros_like(x)) if kind == "int4" else (None,) * 4
    torch.library.opcheck(
        torch.ops.dalle_fast.skinny_linear.default,
        (x, packed.data, packed.scale, packed.bias, packed.counters, arguments["residual"], weight, bias,
         *branch, kind, 40, 1e-5,
         "gelu", 1),
    )  # fmt: skip


@pytest.mark.skipif(kernels_why_not() is not None, reason="the C++ kernels are not built")
def test_one_door_for_both_packings():
    weight, bias, x = torch.randn(50, 70), torch.randn(50), torch.randn(3, 70)
    on_cpu = skinny_linear(x, PackedLinear(weight, bias, dtype="int8"), epilogue="gelu")
    by_op = skinny_linear(x, pack(weight, bias, kind="int8"), epilogue="gelu")
    assert torch.allclose(on_cpu, by_op, atol=1e-2)
    assert "PackedLinear" in (backends.why_not("cpu", backends.Call("skinny_linear", "cpu", torch.float32, 0)) or "")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_branch_joins_first(backend):
    x, packed, arguments = problem(5, 84, 70, "int8", "gelu_tanh", norm=True, dtype=torch.float64)
    rows, vectors = torch.randn_like(x), (torch.randn(70, device=x.device), torch.randn(70, device=x.device))
    total = torch.empty_like(x)
    with backends.use(backend):
        got = skinny_linear(x, packed, branch=Branch(rows, *vectors, total), **arguments)
        joined = x + F.layer_norm(rows, (70,), *(v.double() for v in vectors))
        assert torch.allclose(total, joined, atol=1e-12)
        assert torch.allclose(got, skinny_linear(joined, packed, **arguments), atol=1e-12)
    with pytest.raises(ValueError, match=r"got branch \[4, 70\] torch.float64, expected \[5, 70\]"):
        skinny_linear(x, packed, branch=Branch(rows[:4], *vectors, total))
    with pytest.raises(ValueError, match=r"got branch norm bias \[69\], expected \[70\]"):
        skinny_linear(x, packed, branch=Branch(rows, vectors[0], vectors[1][:69], total))


def test_parts_are_columns_one_after_the_other():
    x, packed, arguments = problem(5, 84, 70, "int8", norm=True)
    whole = skinny_linear(x, packed, **arguments)
    parts = skinny_linear(x, packed, parts=3, **arguments)
    assert torch.equal(parts, whole.view(5, 3, 28).transpose(0, 1)) and parts.is_contiguous()


def test_refused_arguments():
    packed = pack(torch.randn(4, 6), kind="int8")
    x = torch.randn(2, 6)
    for parts in (0, 3):
        with pytest.raises(
            ValueError,
            match=f"got parts={parts} and no branch for 4 outputs packed as PackedWeight, expected a divisor",
        ):
            skinny_linear(x, packed, parts=parts)
    for bad, words in (
        (torch.randn(2, 5), r"got x \[2, 5\] torch.float32, expected \[1 to 64, 6\]"),
        (torch.randn(65, 6), r"got x \[65, 6\]"),
        (torch.ones(2, 6, dtype=torch.int64), "of a floating type"),
    ):
        with pytest.raises(ValueError, match=words):
            skinny_linear(bad, packed)
    with pytest.raises(ValueError, match="got epilogue 'geglu' for a weight without gates"):
        skinny_linear(x, packed, epilogue="geglu")
    with pytest.raises(ValueError, match="got epilogue 'none' for a weight with gates, expected one of geglu"):
        skinny_linear(x, pack(torch.randn(4, 6), kind="int8", geglu=True))
    with pytest.raises(ValueError, match=r"got residual \[2, 5\] torch.float32, expected \[2, 4\] torch.float32"):
        skinny_linear(x, packed, residual=torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"got norm bias \[5\], expected \[6\]"):
        skinny_linear(x, packed, norm=(torch.ones(6), torch.ones(5)))
    with pytest.raises(ValueError, match="got weight on cpu, expected meta"):
        skinny_linear(torch.empty(2, 6, device="meta"), packed)
    with pytest.raises(ValueError, match="skinny_linear is inference only"):
        skinny_linear(x.requires_grad_(), packed)
    with pytest.raises(ValueError, match=r"got a weight \[3\] packed as 'int8'"):
        torch.ops.dalle_fast.skinny_linear(
            x.detach(), torch.empty(3), None, None, torch.empty(3), *(None,) * 7, "int8", 4, 1e-5, "none", 1
        )


def test_refused_weights():
    for weight, arguments, words in (
        (torch.randn(4, 6), {"kind": "fp8"}, "got kind 'fp8', expected one of bfloat16, float16, int8, int4"),
        (
            torch.ones(4, 6, dtype=torch.int8),
            {"kind": "int8"},
            r"got a weight \[4, 6\] torch.int8, expected two dimensions",
        ),
        (torch.randn(4), {"kind": "int8"}, r"got a weight \[4\] torch.float32"),
        (
            torch.randn(4, 6),
            {"kind": "bfloat16"},
            r"got a weight \[4, 6\] for kind 'bfloat16', expected a multiple of 8",
        ),
        (torch.randn(3, 6), {"kind": "int8", "geglu": True}, "got 3 rows with geglu, expected an even number"),
        (
            torch.randn(4, 6),
            {"kind": "int8", "bias": torch.ones(5)},
            r"got bias \[5\] for a weight \[4, 6\], expected \[4\]",
        ),
        (quantize(torch.randn(4, 6), "int8"), {"kind": "int4"}, "got a weight quantized as Int8 for kind 'int4'"),
    ):
        with pytest.raises(ValueError, match=words):
            pack(weight, **arguments)
    assert record_bytes("int4") == 1088 and record_bytes("int8") == 1024
