"""The model on weights that oneDNN has laid out: the plain model's logits, and none of its linear weights."""

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
    """[1 + k, B, V]: of the tokens, fed one by one to three candidates a caption."""
    cache = Cache(model.config, len(text), 3, dtype=model.image_embedding.weight.dtype)
    steps = [model.prefill(text, cache)]
    steps += [model.step(tokens[:, j : j + 1], cache) for j in range(tokens.shape[1])]
    return torch.stack(steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_plain_models(name, dtype):
    model = model_of(name, dtype)
    if reason := onednn.why_not(model.image_embedding.weight):
        pytest.skip(reason)
    text, tokens = torch.randint(1, 64, (2, 16)), torch.randint(32, (6, 9))
    with torch.inference_mode():
        oracle = logits_of(twin_in_double(model), text, tokens)
        assert_close(logits_of(onednn.OneDnnModel(model), text, tokens), logits_of(model, text, tokens), oracle)


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
