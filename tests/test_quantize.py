"""Weights in 8 and 4 bits: what comes back, how far off, and what is refused."""

import pytest
import torch

from dalle_fast.quantize import GROUP, Int4, Int8, quantize, relative_error


@pytest.mark.parametrize("inputs", [1, 2, 127, 128, 129, 513])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_every_weight_is_within_half_a_step(dtype: str, inputs: int) -> None:
    weight = torch.randn(5, inputs) * torch.tensor([1e-3, 1.0, 10.0, 1e4, 0.1])[:, None]
    quantized = quantize(weight, dtype)
    back = quantized.dequantize()
    assert quantized.shape == back.shape == weight.shape and back.dtype == torch.float32
    scale = quantized.scale.abs()
    step = scale[:, None] if dtype == "int8" else scale.repeat_interleave(GROUP, dim=1)[:, :inputs]
    # int4 may cut the one weight that is as large as the largest but of the other sign: by one step at most.
    allowed = (0.5 if dtype == "int8" else 1.0) * step * (1 + 1e-5)
    assert ((back - weight).abs() <= allowed).all()


def test_error_of_normal_weights() -> None:
    weight = torch.randn(64, 1024)
    assert relative_error(weight, quantize(weight, "int8")) < 0.010  # a 127th of the largest of 1024, over √12
    assert relative_error(weight, quantize(weight, "int4")) < 0.11
    assert relative_error(weight, quantize(weight, "int4")) < 0.97 * relative_error(weight, _plain_int4(weight))


def _plain_int4(weight: torch.Tensor) -> Int8:
    """±7 a group of 128: what the choice between two scales improves on. As Int8 of the dequantized values."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return Int8(((groups / scale).round() * scale).view_as(weight), torch.ones(weight.shape[0]))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_exact_values_stay_exact(dtype: str) -> None:
    top = 127 if dtype == "int8" else 7
    weight = torch.randint(-top, top + 1, (3, 256)).float()
    weight[:, ::GROUP] = top  # every group has the full range, and half a step of room at the other end
    weight[weight == -top] = 1 - top
    back = quantize(weight, dtype).dequantize()
    if dtype == "int8":
        assert torch.allclose(back, weight, atol=1e-5)
    else:
        assert (back - weight).abs().max() <= 1.0


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_zeros_and_half_precision(dtype: str) -> None:
    assert not quantize(torch.zeros(4, 130), dtype).dequantize().any()
    weight = torch.randn(4, 256)
    wide, narrow = quantize(weight.bfloat16().float(), dtype), quantize(weight.bfloat16(), dtype)
    assert all(torch.equal(a, b) for a, b in zip(wide[:2], narrow[:2], strict=True))


def test_large_weights_are_quantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 200)
    whole = quantize(weight, "int4")
    monkeypatch.setattr("dalle_fast.quantize._CHUNK", 1000)
    parts = quantize(weight, "int4")
    assert isinstance(parts, Int4) and torch.equal(whole[0], parts[0]) and torch.equal(whole.scale, parts.scale)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(0, 4)])
def test_refuses_what_is_no_matrix(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected two dimensions of a floating type"):
        quantize(weight, "int8")


def test_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="expected one of int8, int4"):
        quantize(torch.zeros(2, 2), "int3")
