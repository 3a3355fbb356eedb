"""The step that a graph would hold, run without one: the same function, on a CPU; captured too where there is a GPU."""

import logging

import pytest
import torch
from helpers import DEVICE

from dalle_fast import ops
from dalle_fast.config import STARTS, ModelConfig
from dalle_fast.engine import TorchEngine
from dalle_fast.graph_engine import GraphEngine
from dalle_fast.logits import log_probability
from dalle_fast.model import DalleModel
from dalle_fast.planning import plan_memory
from dalle_fast.sampling import SamplingSettings, default_wave, draw, sample

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
@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_are_as_exact_as_plain_ones(capture, sandwich, dtype):
    """On a GPU a step is then of fused layers, by few rows and, where cells are fed in chunks, by many."""
    model = model_of(dim=128, heads=2, head_dim=64, sandwich_norm=sandwich).to(dtype)
    wide = model_of(dim=128, heads=2, head_dim=64, sandwich_norm=sandwich)
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    text, tokens = torch.randint(64, (2, 16)), torch.randint(32, (6, 15), device=DEVICE)
    results = []
    for engine in (
        TorchEngine(wide, chunk=4),
        TorchEngine(model, chunk=4),
        GraphEngine(model, chunk=4, capture=capture),
    ):
        logits = [engine.prefill(text, 3).clone(), engine.feed(tokens[:, :8]).clone()]
        results.append(torch.stack([*logits, *(engine.step(tokens[:, j]).clone() for j in range(8, 15))]))
    exact, plain, graph = results
    assert (graph - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()


@pytest.mark.parametrize("capture", CAPTURE)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_drawing_inside_the_step(capture, start, guidance_scale):
    """Also with two prompts, with tokens that are given in between, and with others fed than the ones that it drew."""
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
            if j in (1, 5, 6, 9):  # fed by value: the ones drawn, or others
                fed = fed.clone()
            got = graph.sample(fed, candidates, guidance_scale=guidance_scale, given=given, **settings)
            assert torch.allclose(got.logits, logits, atol=1e-5)
            assert torch.equal(got.tokens, expected), j
            assert torch.allclose(got.log_p, log_probability(logits[:n], expected), atol=1e-5)
        fed = (torch.arange(n, device=DEVICE) if j == 8 else got.tokens) if j else expected
        if j < 15:
            logits = plain.step(torch.cat([fed, fed]) if guided else fed)


@pytest.mark.parametrize("capture", CAPTURE)
def test_a_step_starts_where_the_last_one_ended(capture, monkeypatch):
    """Tokens are embedded by the draw, and anew only where others are fed, or other steps came in between."""
    model = model_of()
    engine = GraphEngine(model, chunk=2, capture=capture)
    embedded = []
    embed = model.embed_image
    monkeypatch.setattr(model, "embed_image", lambda tokens, *first: embedded.append(tokens) or embed(tokens, *first))
    engine.prefill(torch.zeros(1, 16, dtype=torch.int64), 3)
    tokens, candidates = torch.arange(3, device=DEVICE), torch.arange(3, device=DEVICE)

    def draw(tokens, **settings):
        before = len(embedded)
        return engine.sample(tokens, candidates, **settings).tokens, len(embedded) - before

    tokens, anew = draw(tokens)
    assert anew == 1
    for _ in range(3):
        tokens, anew = draw(tokens)
        assert anew == 0
    tokens, anew = draw(tokens, temperature=0.5)  # another graph, which starts from the same place
    assert anew == 0
    tokens, anew = draw(tokens.clone())
    assert anew == 1
    engine.feed(tokens[:, None])
    tokens, anew = draw(tokens)
    assert anew == 1


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
    with pytest.raises(
        ValueError, match=r"got candidates \[2\] torch.int64, expected \[1\] int64, .* guidance_scale=2.0"
    ):
        engine.sample(torch.zeros(1, dtype=torch.int64), torch.arange(2), guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"got tokens \[2\] torch.int64, expected \[1\] int64"):
        engine.sample(torch.zeros(2, dtype=torch.int64), torch.arange(1), guidance_scale=2.0)


KNOWN = {
    "nothing": [],
    "the first rows": range(6),
    "a hole in between": [*range(5), 8, 9, 10, 13],
    "single cells": [1, 3, 15],
    "everything": range(16),
}


@pytest.mark.parametrize("capture", CAPTURE)
@pytest.mark.parametrize("cells", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("score_known", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_pictures_are_the_plain_engines(capture, cells, score_known, guidance_scale):
    """The decode loop gives the same tokens and likelihoods whether the draw is part of the step or not."""
    model, known = model_of(), torch.full((16,), -1)
    known[list(cells)] = torch.randint(32, (len(cells),))
    text = torch.randint(1, 64, (1, 16))
    settings = SamplingSettings(temperature=0.9, top_k=20, guidance_scale=guidance_scale, seed=3)
    pictures = [
        list(sample(engine, text, 5, settings, wave=3, first=2, known=known, score_known=score_known))
        for engine in (TorchEngine(model, chunk=2), GraphEngine(model, chunk=2, capture=capture))
    ]
    for plain, graph in zip(*pictures, strict=True):
        assert torch.equal(plain.candidates, graph.candidates) and torch.equal(plain.tokens, graph.tokens)
        assert torch.allclose(plain.log_likelihood, graph.log_likelihood, atol=1e-4)
        assert torch.equal(graph.tokens[:, list(cells)], known[list(cells)].expand(len(graph.tokens), -1))


@pytest.mark.parametrize("score_known", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_no_picture_asks_the_device(score_known, guidance_scale):
    """On the meta device, which has no values, whoever waits for one fails: int(), bool(), a copy to the host."""
    with torch.device("meta"):
        model = DalleModel(ModelConfig.preset("tiny", height=4, width=4)).requires_grad_(False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.ones(1, device="meta"))
    known = torch.full((16,), -1)
    known[[0, 1, 5, 6, 7, 9]] = 3
    settings = SamplingSettings(guidance_scale=guidance_scale, top_p=0.9)
    engine = GraphEngine(model, chunk=2)
    text = torch.zeros(1, 16, dtype=torch.int64)
    drawn = list(draw(engine, text, torch.arange(3), settings, known, score_known))
    assert [j for j, _, _ in drawn] == list(range(16))
    assert all(tokens.shape == log_p.shape == (3,) for _, tokens, log_p in drawn)


def test_waves_are_planned_from_the_free_memory():
    model = model_of()
    one = plan_memory(model.config, 2**40, dtype=torch.float32)
    room = {n: one.total(n) - one.weights for n in (0, 1, 4, 100)}
    engine = GraphEngine(model, capture=False, free=lambda: room[4])
    assert engine.most_candidates() == 4
    assert [default_wave(engine, n) for n in (1, 4, 5, 9)] == [1, 4, 3, 3]
    text = torch.zeros(1, 16, dtype=torch.int64)
    waves = list(sample(engine, text, 9, SamplingSettings()))
    assert [len(wave.tokens) for wave in waves] == [3, 3, 3]
    assert engine.most_candidates() >= 4  # its own cache makes room for the next wave
    assert GraphEngine(model, capture=False, free=lambda: room[1]).most_candidates() == 1
    assert 30 < GraphEngine(model, capture=False, free=lambda: room[100]).most_candidates(guided=True) < 51
    with pytest.raises(
        ValueError, match=rf"got 1\.07 GB of free memory on {DEVICE}.* beside the weights, expected at least 1\.07 GB"
    ):
        default_wave(GraphEngine(model, capture=False, free=lambda: room[0]), 3)


def test_out_of_memory_halves_the_waves_and_draws_the_same(caplog, monkeypatch):
    model, text, settings = model_of(), torch.zeros(1, 16, dtype=torch.int64), SamplingSettings(seed=5)
    seen = []
    prefill = GraphEngine.prefill

    def fails_above(self, text, candidates):
        seen.append(candidates)
        if candidates > 3:
            raise torch.OutOfMemoryError("no room\nand a long story")
        return prefill(self, text, candidates)

    monkeypatch.setattr(GraphEngine, "prefill", fails_above)
    shown = []
    with caplog.at_level(logging.WARNING):
        waves = list(
            sample(
                GraphEngine(model, capture=False),
                text,
                7,
                settings,
                wave=7,
                on_token=lambda j, t: shown.append((j, len(t))),
            )
        )
    assert seen == [7, 3, 3, 3] and [len(wave.tokens) for wave in waves] == [3, 2, 2]
    assert "a wave of 7 candidates ran out of memory, going on with 3: no room" in caplog.text
    assert shown == [(j, n) for n in (3, 2, 2) for j in range(16)]
    plain = torch.cat([wave.tokens for wave in sample(TorchEngine(model), text, 7, settings, wave=3)])
    assert torch.equal(torch.cat([wave.tokens for wave in waves]), plain)
