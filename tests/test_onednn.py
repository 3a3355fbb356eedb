"""The model on weights that are laid out for a step's rows: the plain model's logits, and none of its linear weights."""

import pytest
import torch
from helpers import assert_close

from dalle_fast import loading, onednn
from dalle_fast.cache import Cache
from dalle_fast.config import ModelConfig
from dalle_fast.engine import TorchEngine
from dalle_fast.model import DalleModel

MODELS = {
    "paper": {},
    "dalle-pytorch": {"positions": "rotary", "start": "none", "lead_token": 0, "head_dim": 64, "token_shift": True,
                      "activation": "geglu", "layer_scale": True, "qkv_bias": False},
    "rudalle": {"sandwich_norm": True, "final_norms": 2, "start": "none"},
    "reversible": {"reversible": True},
}  # fmt: skip


def model_of(name, dtype):
    model = DalleModel(ModelConfig.preset("tiny", height=4, width=4, **MODELS[name])).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def logits_of(model, text, tokens):
    """[1 + k, B, V]: of the tokens, fed one by one to len(tokens) / len(text) candidates a caption."""
    cache = Cache(model.config, len(text), len(tokens) // len(text), dtype=model.image_embedding.weight.dtype)
    steps = [model.prefill(text, cache)]
    steps += [model.step(tokens[:, j : j + 1], cache) for j in range(tokens.shape[1])]
    return torch.stack(steps)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("laid_out", [onednn.TiledLinear, onednn.SummedLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_plain_models(name, dtype, laid_out, rows, monkeypatch):
    """In either layout, with the rows it is for and with others."""
    monkeypatch.setattr(onednn, "sums_rows", lambda: laid_out is onednn.SummedLinear)
    model = model_of(name, dtype)
    if reason := onednn.why_not(model.image_embedding.weight):
        pytest.skip(reason)
    text, tokens = torch.randint(1, 64, (min(rows, 2), 16)), torch.randint(32, (rows, 9))
    packed = onednn.OneDnnModel(model)
    packed.lay_out(1)
    assert type(packed.image_head) is type(packed.blocks[0].qkv) is laid_out
    with torch.inference_mode():
        oracle = logits_of(twin_in_double(model), text, tokens)
        assert_close(logits_of(packed, text, tokens), logits_of(model, text, tokens), oracle)


@pytest.mark.parametrize("gelu", [None, "tanh", "none"])
@pytest.mark.parametrize("outputs", [1, 7, 192, 509, 1536])
def test_a_weight_survives_every_layout(outputs, gelu):
    weight, bias = torch.randn(outputs, 48), torch.randn(outputs)
    tiled = onednn.TiledLinear(weight, bias, gelu)
    summed = onednn.SummedLinear(tiled.dense(), tiled.bias, gelu)
    assert summed.rows.is_contiguous()  # else five times as slow
    assert torch.equal(onednn.TiledLinear(summed.dense(), bias, gelu).dense(), weight)
    for shape in ((1, 48), (1, 1, 48), (2, 3, 48)):
        x = torch.randn(shape)
        expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        expected = expected if gelu is None else torch.nn.functional.gelu(expected, approximate=gelu)
        for linear in (tiled, summed):
            assert linear(x).shape == expected.shape
            torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2])
def test_the_engine_lays_it_out_for_its_steps(chunk, monkeypatch):
    monkeypatch.setattr(onednn, "sums_rows", lambda: True)
    engine = TorchEngine(model_of("paper", torch.float32), chunk=chunk)
    for candidates in (1, 3, 1):
        engine.prefill(torch.randint(1, 64, (1, 16)), candidates)
        assert isinstance(engine.model.image_head, onednn.SummedLinear) == (candidates * chunk == 1)
    engine.fork(2)
    assert isinstance(engine.model.image_head, onednn.TiledLinear)


def twin_in_double(model):
    twin = DalleModel(model.config).double().eval()
    twin.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    return twin


def test_the_engine_uses_it_and_leaves_the_model_alone():
    model = model_of("paper", torch.float32)
    names = set(model.state_dict())
    assert isinstance(TorchEngine(model).model, onednn.OneDnnModel)
    assert set(model.state_dict()) == names and type(model) is DalleModel
    assert TorchEngine(model, backend="reference").model is model
    assert TorchEngine(model.double()).model is model
    assert not any(".qkv.weight" in name for name in onednn.OneDnnModel(model.float()).state_dict())


def test_other_types_are_refused():
    assert "got float16" in onednn.why_not(torch.zeros(1, dtype=torch.float16))
    assert "got weights on meta" in onednn.why_not(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("reason", [None, "oneDNN has no bfloat16 on this processor"])
def test_slow_bfloat16_is_said(reason, tmp_path, monkeypatch, caplog):
    model_of("paper", torch.float32).save(tmp_path)
    monkeypatch.setattr(onednn, "why_not", lambda weight: reason)
    loading.load_engine(tmp_path, device="cpu", dtype="bfloat16", backend="reference")
    said = "bfloat16 by PyTorch is slower than float32 here: oneDNN has no bfloat16 on this processor"
    assert (said in caplog.messages) == (reason is not None)
    caplog.clear()
    loading.load_engine(tmp_path, device="cpu", dtype="float32", backend="reference")
    assert caplog.messages == []
