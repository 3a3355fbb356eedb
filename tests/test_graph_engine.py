"""The step that a graph would hold, run without one: the same function, on a CPU; captured too where there is a GPU."""

import pytest
import torch
from helpers import DEVICE

from dalle_fast import ops
from dalle_fast.config import STARTS, ModelConfig
from dalle_fast.engine import TorchEngine
from dalle_fast.graph_engine import GraphEngine
from dalle_fast.model import DalleModel

CAPTURE = [False, pytest.param(True, marks=pytest.mark.gpu)]


def model_of(**changes):
    model = DalleModel(ModelConfig.preset("tiny", height=4, width=4, **changes)).to(DEVICE).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("capture", CAPTURE)
@pytest.mark.parametrize("start", STARTS)
def test_logits_are_the_plain_engines(capture, start):
    model = model_of(start=start, token_shift=True)
    text, tokens = torch.randint(64, (2, 16)), torch.randint(32, (6, 15), device=DEVICE)
    plain, graph = TorchEngine(model, chunk=4), GraphEngine(model, chunk=4, capture=capture)
    for _ in range(2):  # the second picture reuses the first one's cache and graphs
        assert torch.allclose(plain.prefill(text, 3), graph.prefill(text, 3), atol=1e-5)
        assert torch.allclose(plain.feed(tokens[:, :6]), graph.feed(tokens[:, :6]), atol=1e-5)
        for j in range(6, 15):
            assert torch.allclose(plain.step(tokens[:, j]), graph.step(tokens[:, j]), atol=1e-5)
    assert graph.nbytes() == plain.nbytes() > 0


@pytest.mark.parametrize("capture", CAPTURE)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_drawing_inside_the_step(capture, start, guidance_scale):
    """Also with two prompts, and with tokens that are given in between."""
    model, n = model_of(start=start), 3
    guided = guidance_scale != 1
    text = torch.randint(1, 64, (1, 16))
    text = torch.cat([text, 0 * text]) if guided else text
    candidates = torch.arange(5, 5 + n, device=DEVICE)
    settings = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 11}
    plain, graph = TorchEngine(model), GraphEngine(model, capture=capture)
    logits, _ = plain.prefill(text, n), graph.prefill(text, n)
    fed = candidates  # replaced before it is used
    for j in range(16):
        mixed = torch.lerp(logits[n:], logits[:n], guidance_scale) if guided else logits
        expected = ops.sample(mixed, candidates, torch.tensor([j], device=DEVICE), **settings)
        given = torch.full((n,), 7, device=DEVICE) if j in (4, 5) else None
        expected = expected if given is None else given
        if j:
            drawn, own = graph.sample(fed, candidates, guidance_scale=guidance_scale, given=given, **settings)
            assert torch.allclose(own, logits, atol=1e-5)
            assert torch.equal(drawn, expected), j
        fed = torch.cat([expected, expected]) if guided else expected
        if j < 15:
            logits = plain.step(fed)


@pytest.mark.parametrize("capture", CAPTURE)
def test_a_fork_continues(capture):
    model = model_of()
    text, tokens = torch.randint(64, (1, 16)), torch.randint(32, (1, 6), device=DEVICE)
    plain, graph = TorchEngine(model, chunk=4), GraphEngine(model, chunk=4, capture=capture)
    for engine in (plain, graph):
        engine.prefill(text, 1)
        engine.feed(tokens)
        engine.fork(4)
    new = torch.arange(4, device=DEVICE)
    assert torch.allclose(plain.step(new), graph.step(new), atol=1e-5)


def test_what_it_refuses():
    model = model_of()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="got capture=True for a model on cpu"):
            GraphEngine(model, capture=True)
    with pytest.raises(ValueError, match="got chunk=17, expected 1 to 16"):
        GraphEngine(model, chunk=17)
    engine = GraphEngine(model, capture=False)
    with pytest.raises(ValueError, match="expected prefill to come first"):
        engine.step(torch.zeros(1, dtype=torch.int64))
    engine.prefill(torch.zeros(1, 16, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"got tokens \[3, 1\] torch.int64, expected \[2, k\] int64"):
        engine.step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 and a cache of 2, expected \[4\]"):
        engine.sample(torch.zeros(2, dtype=torch.int64), torch.arange(2), guidance_scale=2.0)
