"""The property that matters most: cached decoding equals the full forward pass at every cell."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast.cache import Cache
from dalle_fast.config import ACTIVATIONS, POSITIONS, STARTS, ModelConfig
from dalle_fast.engine import TorchEngine
from dalle_fast.model import DalleModel

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


def random_model(**values):
    model = DalleModel(
        ModelConfig(**{"dim": 32, "heads": 2, "head_dim": 16, "text_vocab": 20, "image_vocab": 11} | values)
    )
    model = model.double().eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def largest_error(model, prompts, candidates, chunks):
    """Decodes random pictures in runs of the given lengths and returns the largest difference from the full pass."""
    config = model.config
    text = torch.randint(0, config.text_vocab, (prompts, config.caption_len))
    image = torch.randint(config.image_vocab, (prompts * candidates, config.cells))
    expected = model(text.repeat_interleave(candidates, dim=0), image)[1]  # [B, cells, V]
    cache = Cache(config, prompts, candidates, chunk=max(chunks), dtype=torch.float64)
    for x in (*cache.prefix_k, *cache.prefix_v, *cache.tail_k, *cache.tail_v, *cache.shift):
        x.fill_(math.nan)
    errors = [(model.prefill(text, cache) - expected[:, 0]).abs().max()]
    fed, turn = 0, 0
    while fed < config.cells - 1:
        n = min(chunks[turn % len(chunks)], config.cells - 1 - fed)
        logits = model.step(image[:, fed : fed + n], cache)
        fed, turn = fed + n, turn + 1
        errors.append((logits - expected[:, fed]).abs().max())
    return float(torch.stack(errors).max())  # NaN, if poison leaked, fails any comparison


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_at_every_cell(rule):
    model = random_model(layers=2, patterns=(rule, rule), caption_len=7, height=8, width=8)
    assert largest_error(model, prompts=2, candidates=3, chunks=[1]) <= 1e-10
    assert largest_error(model, prompts=1, candidates=2, chunks=[3, 1, 8]) <= 1e-10


@pytest.mark.parametrize("start", STARTS)
def test_at_the_papers_layout(start):
    patterns = ("row", "column", "conv(kernel=11,boundary=flat)")
    model = random_model(layers=3, patterns=patterns, caption_len=256, start=start)
    assert largest_error(model, prompts=1, candidates=2, chunks=[1]) <= 1e-10


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_model(data):
    draw = data.draw
    layers = draw(st.integers(1, 3))
    model = random_model(
        layers=layers,
        patterns=tuple(draw(st.sampled_from(RULES)) for _ in range(layers)),
        caption_len=draw(st.integers(2, 20)),
        height=draw(st.integers(1, 9)),
        width=draw(st.integers(1, 9)),
        start=draw(st.sampled_from(STARTS)),
        positions=draw(st.sampled_from(POSITIONS)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        lead_token=draw(st.sampled_from([None, 2])),
        sandwich_norm=draw(st.booleans()),
        final_norms=draw(st.sampled_from([1, 2])),
        layer_scale=draw(st.booleans()),
        token_shift=draw(st.booleans()),
        reversible=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
    )
    chunks = draw(st.lists(st.integers(1, min(7, model.config.cells)), min_size=1, max_size=3))
    assert largest_error(model, draw(st.integers(1, 2)), draw(st.integers(1, 3)), chunks) <= 1e-10


def test_a_fork_continues_every_candidate():
    model = random_model(layers=2, patterns=("row", "column"), caption_len=5, height=4, width=4, token_shift=True)
    text, image = torch.randint(20, (2, 5)), torch.randint(11, (2, 16))
    engine = TorchEngine(model, chunk=4)
    engine.prefill(text, 1)
    engine.feed(image[:, :6])
    engine.fork(3)
    tokens = torch.randint(11, (6,))
    logits = engine.step(tokens)
    whole = torch.cat([image[:, :6].repeat_interleave(3, 0), tokens[:, None]], dim=1)
    expected = model(text.repeat_interleave(3, 0), whole)[1][:, 7]
    assert (logits - expected).abs().max() <= 1e-10


def test_memory_of_a_candidate_at_12b():
    config = ModelConfig.preset("openai-12b")
    cache = Cache(config, 1, 171, dtype=torch.bfloat16, device="meta")
    dense = config.layers * 2 * config.layout.total * config.heads * config.head_dim * 2
    assert 1.29e9 < dense < 1.31e9
    assert cache.tail_nbytes() <= 0.29e9
    assert cache.tail_nbytes() * 4.4 <= dense
    assert cache.nbytes() == 171 * cache.tail_nbytes() + config.layers * 2 * 256 * config.heads * config.head_dim * 2


def test_memory_of_a_candidate_at_12b_with_column_tails_in_8_bits():
    config = ModelConfig.preset("openai-12b")
    cache = Cache(config, 1, 1, dtype=torch.bfloat16, fp8_tails=True, device="meta")
    assert sum(scales is not None for scales in cache.scales) == 16  # the columns; rows and convolution are short rings
    dense = config.layers * 2 * config.layout.total * config.heads * config.head_dim * 2
    assert cache.tail_nbytes() <= 0.158e9 and 8 * cache.tail_nbytes() <= dense


def test_column_tails_in_8_bits_cost_little():
    """Decoding with e4m3 tails against float64: keys and values keep 4 bits, 3 % at most, and a step averages over many."""
    model = random_model(layers=2, patterns=("column", "row"), caption_len=16, height=8, width=8)
    text, image = torch.randint(20, (1, 16)), torch.randint(11, (3, 64))
    expected = model(text.expand(3, -1), image)[1]
    cache = Cache(model.config, 1, 1, dtype=torch.float64, fp8_tails=True)
    assert [x.dtype == torch.float8_e4m3fn for x in cache.tail_k] == [True, False]
    logits = [model.prefill(text, cache)]
    cache.fork(3)
    logits[0] = logits[0].expand(3, -1)
    logits += [model.step(image[:, j : j + 1], cache) for j in range(63)]
    error = (torch.stack(logits, 1) - expected).pow(2).mean().sqrt() / expected.std()
    assert 1e-4 < error < 0.02


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="got 1 prompts x 0 candidates"):
        Cache(ModelConfig.preset("tiny"), 1, 0)
