"""CpuEngine against the plain model in float64: every kind of model, type of weight, batch and chunk."""

import pytest
import torch

from dalle_fast import cpu_backend, weights
from dalle_fast.config import ModelConfig
from dalle_fast.cpu_engine import CpuEngine, why_not
from dalle_fast.engine import DrawingEngine, TorchEngine
from dalle_fast.model import DalleModel
from dalle_fast.quantize import quantize
from dalle_fast.sampling import SamplingSettings, sample

pytestmark = pytest.mark.skipif(cpu_backend.kernels_why_not() is not None, reason="the C++ kernels are not built")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads change no result (test_cpu_threads.py); these sizes are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TINY = ModelConfig.preset("tiny", height=6, width=5, patterns=("row", "column", "conv(kernel=3,boundary=flat)", "full"))
MODELS = {
    "paper": {},
    "geglu": {"activation": "geglu", "layer_scale": True, "qkv_bias": False},
    "dalle-pytorch": {"positions": "rotary", "start": "none", "lead_token": 0, "head_dim": 64, "token_shift": True,
                      "activation": "geglu", "layer_scale": True, "sandwich_norm": True, "qkv_bias": False},
    "rudalle": {"sandwich_norm": True, "final_norms": 2, "start": "none"},
    "rudalle-v2": {"sandwich_norm": True, "final_norms": 2, "start": "text", "lead_token": 2},
    "reversible": {"reversible": True, "activation": "gelu", "head_dim": 128},
    "odd": {"dim": 40, "heads": 3, "head_dim": 16, "caption_len": 13, "image_vocab": 37, "token_shift": True},
}  # fmt: skip
# Largest error of the logits, of which the deviation is about 0.4 in all of these models.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.06, "int4": 1.2}


def random_model(**changes):
    model = DalleModel(TINY.replace(**changes)).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.05))
    return model


def logits_of(engine, text, candidates, tokens):
    """[1 + k, B, V]: of the tokens fed one by one."""
    return torch.stack([engine.prefill(text, candidates), *(engine.step(t) for t in tokens.unbind(1))])


@pytest.mark.parametrize("name", MODELS)
def test_engine_computes_the_model(name):
    model = random_model(**MODELS[name])
    config, text = model.config, torch.randint(1, 60, (2, model.config.caption_len))
    text[:, -4:] = 0
    tokens = torch.randint(config.image_vocab, (6, config.cells - 1))
    exact = DalleModel(config).double()
    exact.load_state_dict(model.state_dict())
    expected = exact(text.repeat_interleave(3, dim=0), tokens)[1].transpose(0, 1)
    for dtype, tolerance in TOLERANCE.items():
        engine = CpuEngine(model, dtype=dtype)
        got = logits_of(engine, text, 3, tokens)
        assert (got - expected).abs().max() <= tolerance, dtype
        # To the bit: known tokens in chunks, one candidate alone, one thread, a fork.
        chunked = CpuEngine(model, dtype=dtype, chunk=7)
        chunked.prefill(text, 3)
        assert torch.equal(chunked.feed(tokens[:, :20]), got[20])
        alone = CpuEngine(model, dtype=dtype, threads=1)
        assert torch.equal(logits_of(alone, text[1:], 1, tokens[4:5])[:, 0], got[:, 4])
        engine.prefill(text, 1)
        engine.feed(tokens[::3, :7])
        engine.fork(3)
        again = engine.feed(tokens[::3, 7:9].repeat_interleave(3, dim=0))
        assert torch.equal(again[::3], got[9, ::3]) and torch.equal(again[0], again[2])


def test_cache_is_as_small_as_the_masks_allow():
    model = random_model()
    engine, plain = CpuEngine(model, dtype="float32"), TorchEngine(model)
    for e in (engine, plain):
        e.prefill(torch.ones(2, 16, dtype=torch.int64), 3)
    assert engine.nbytes() == plain.nbytes()  # 16 text positions: a whole block of keys, no padding
    narrow = CpuEngine(model)
    narrow.prefill(torch.ones(2, 16, dtype=torch.int64), 3)
    assert 2 * narrow.nbytes() == engine.nbytes()


def test_weights_shrink():
    model = random_model(dim=256, heads=4, head_dim=64)
    sizes = {dtype: CpuEngine(model, dtype=dtype).weight_nbytes() for dtype in TOLERANCE}
    assert sizes["bfloat16"] < 0.52 * sizes["float32"]
    assert sizes["int8"] < 0.27 * sizes["float32"] and sizes["int4"] < 0.15 * sizes["float32"]


def test_load(tmp_path):
    model = random_model()
    model.save(tmp_path)
    text, tokens = torch.ones(1, 16, dtype=torch.int64), torch.randint(32, (2, 5))
    expected = logits_of(CpuEngine(model), text, 2, tokens)
    assert torch.equal(logits_of(CpuEngine.load(tmp_path), text, 2, tokens), expected)
    state = dict(model.state_dict())
    state |= {name: quantize(w, "int8") for name, w in state.items() if name.startswith("blocks") and w.ndim == 2}
    assert torch.equal(logits_of(CpuEngine(state, model.config), text, 2, tokens), expected)
    other = DalleModel(TINY.replace(layers=3, patterns=TINY.patterns[:3]))
    weights.save(tmp_path / "model.safetensors", other.state_dict())
    with pytest.raises(weights.WeightError, match=r"blocks\.3\.\S+ is missing.* and \d+ more"):
        CpuEngine.load(tmp_path)
    bad = model.state_dict()
    bad["blocks.1.up.weight"][3, 4] = float("nan")
    weights.save(tmp_path / "model.safetensors", bad)
    with pytest.raises(weights.WeightError, match=r"blocks\.1\.up\.weight has values that are not finite"):
        CpuEngine.load(tmp_path)


def test_refusals():
    model = random_model()
    assert "float16" in (why_not(model.config, "float16") or "")
    assert "multiple of 16" in (why_not(model.config.replace(head_dim=24)) or "")
    with pytest.raises(ValueError, match="float16"):
        CpuEngine(model, dtype="float16")
    with pytest.raises(ValueError, match="ModelConfig"):
        CpuEngine(model.state_dict())
    engine = CpuEngine(model)
    with pytest.raises(ValueError, match="expected prefill to come first"):
        engine.step(torch.zeros(1, dtype=torch.int64))
    engine.prefill(torch.ones(1, 16, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"expected \[2, k\]"):
        engine.step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="got image token 32, expected 0 to 31"):
        engine.step(torch.tensor([0, 32]))
    engine.feed(torch.zeros(2, TINY.cells - 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="within the picture"):
        engine.step(torch.zeros(2, dtype=torch.int64))


class OneByOne:
    """The same engine without a draw of its own: the loop draws, by the op."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        if name == "sample":
            raise AttributeError(name)
        return getattr(self.engine, name)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("cut", [(0, 1.0), (9, 1.0), (0, 0.8)], ids=str)
def test_drawing_inside_the_step(cut, guidance_scale, threads):
    """Tokens and log-likelihoods are those of the loop that takes logits and draws by itself; also with known tokens."""
    model = random_model()
    text, known = torch.randint(1, 60, (1, 16)), torch.full((TINY.cells,), -1)
    known[[0, 1, 7, 8, 9, 20]] = 3
    settings = SamplingSettings(top_k=cut[0], top_p=cut[1], guidance_scale=guidance_scale, seed=8)
    engine = CpuEngine(model, dtype="float32", threads=threads, chunk=2)
    assert isinstance(engine, DrawingEngine) and not isinstance(OneByOne(engine), DrawingEngine)
    for score_known in (False, True):
        ours, plain = (
            next(sample(e, text, 5, settings, known=known, score_known=score_known)) for e in (engine, OneByOne(engine))
        )
        assert torch.equal(ours.tokens, plain.tokens)
        assert torch.allclose(ours.log_likelihood, plain.log_likelihood, atol=1e-4)


def test_draws_that_do_not_fit():
    engine = CpuEngine(random_model())
    engine.prefill(torch.ones(1, 16, dtype=torch.int64), 2)
    tokens = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"got candidates \[2\] torch.int64, expected \[1\] int64, .* guidance_scale=2.0"
    ):
        engine.sample(tokens[:1], torch.arange(2), guidance_scale=2.0)
    with pytest.raises(ValueError, match="got top_k=33"):
        engine.sample(tokens, torch.arange(2), top_k=33)
