"""PackedModel against the plain model: every kind of block, and how many launches a layer takes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_fast import backends, packed_model
from dalle_fast.config import ModelConfig
from dalle_fast.engine import TorchEngine
from dalle_fast.graph_engine import GraphEngine
from dalle_fast.model import DalleModel
from dalle_fast.packed_model import PackedModel
from dalle_fast.packing import KINDS
from dalle_fast.quantize import quantize

TINY = ModelConfig.preset("tiny", height=4, width=4)
MODELS = {
    "paper": {},
    "geglu": {"activation": "geglu", "layer_scale": True, "qkv_bias": False},
    "dalle-pytorch": {"positions": "rotary", "start": "none", "lead_token": 0, "head_dim": 64, "token_shift": True,
                      "activation": "geglu", "layer_scale": True, "sandwich_norm": True, "qkv_bias": False},
    "rudalle": {"sandwich_norm": True, "final_norms": 2, "start": "none"},
    "reversible": {"reversible": True, "activation": "gelu", "layer_scale": True},
    "odd": {"dim": 40, "heads": 3, "head_dim": 16, "caption_len": 13, "image_vocab": 37, "token_shift": True},
}  # fmt: skip


def random_model(**changes):
    """Weights that bfloat16 holds exactly, so that only the order of sums differs."""
    model = DalleModel(TINY.replace(**changes)).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
        p.copy_(p.bfloat16())
    return model


def decode(engine, text, tokens, prompts=2):
    """Logits [1 + k, B, V] of a prefill, of half of the tokens fed in chunks, and of the rest one by one."""
    half = tokens.shape[1] // 2
    logits = [engine.prefill(text, tokens.shape[0] // prompts).clone(), engine.feed(tokens[:, :half]).clone()]
    return torch.stack([*logits, *(engine.step(t).clone() for t in tokens[:, half:].unbind(1))])


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_engine_draws_the_same(name):
    """A float32 model of bfloat16 weights: what is held is exact, and so is everything that was fused."""
    model = random_model(**MODELS[name])
    config = model.config
    packed = PackedModel(model, kind="bfloat16", dtype=torch.float32)
    text, tokens = torch.randint(1, 60, (2, config.caption_len)), torch.randint(config.image_vocab, (6, 15))
    expected = decode(TorchEngine(model, chunk=4), text, tokens)
    got = decode(GraphEngine(packed, chunk=4, capture=False), text, tokens)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["geglu", "rudalle"])
def test_weights_of_every_kind(name, kind):
    """The packed model is the plain model whose weights were rounded the same way (int4: an int8 head)."""
    model = random_model(**MODELS[name])
    state = dict(model.state_dict())
    for key, w in state.items():
        if w.ndim == 2 and key.startswith(("blocks", "head")):
            if kind in ("int8", "int4"):
                state[key] = quantize(w, "int8" if key == "head.weight" else kind).dequantize()
            else:
                state[key] = w.to(getattr(torch, kind)).float()
    rounded = DalleModel(model.config).eval().requires_grad_(False)
    rounded.load_state_dict(state)
    text, tokens = torch.randint(1, 60, (2, 16)), torch.randint(32, (6, 10))
    expected = decode(TorchEngine(rounded), text, tokens)
    got = decode(GraphEngine(PackedModel(model, kind=kind, dtype=torch.float32), capture=False), text, tokens)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


class Launches(TorchDispatchMode):
    """Counts what would be a kernel on a GPU: every operation but those that only name memory anew."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "view" not in function.name() and "detach" not in function.name():
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "most"), [("paper", 5), ("geglu", 5), ("reversible", 5), ("rudalle", 5)])
def test_launches_of_a_layer(name, most):
    model = random_model(**MODELS[name])
    packed = PackedModel(model, kind="int8", dtype=torch.float32)

    class Run:
        """A pass whose attention is one operation, as decode_attention is one launch."""

        rotary = None

        def attend(self, layer, q, k, v):
            assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()  # or each would be copied
            return torch.lerp(q, k, 0.5)

    x, branch = torch.randn(2, 3, 1, model.config.dim)
    launches = Launches()
    with torch.inference_mode(), launches:
        if model.config.sandwich_norm:  # as in the middle of the model
            packed.layers[0].sandwich(x, (branch, packed.layers[0].mlp_norm_out), Run())
            launches.names = [n for n in launches.names if "empty" not in n and "fill_" not in n]  # conftest poisons
        else:
            packed.layers[0].mlp(x, packed.layers[0].attention(x, x, Run()), Run())
    assert len(launches.names) == most, launches.names
    assert launches.names.count("dalle_fast::skinny_linear") == 4


def test_launches_of_a_step():
    """Outside the layers a step that draws is the head, the draw, and the position moving on."""
    model = random_model()
    engine = GraphEngine(PackedModel(model, kind="int8", dtype=torch.float32), capture=False)
    engine.prefill(torch.ones(1, 16, dtype=torch.int64), 3)
    drawn = engine.sample(torch.arange(3), torch.arange(3), top_p=0.9)
    launches = Launches()
    with launches:
        engine.sample(drawn.tokens, torch.arange(3), top_p=0.9)
    names = [name for name in launches.names if "empty" not in name and "fill_" not in name]  # conftest poisons
    layer = ["skinny_linear", "decode_attention", "skinny_linear", "skinny_linear", "skinny_linear"]
    ops = [*(layer * model.config.layers), "skinny_linear", "draw"]
    assert [name.split("::")[1] for name in names if "dalle_fast" in name] == ops
    rest = [name for name in names if "dalle_fast" not in name]
    assert rest == [
        "aten::arange",
        "aten::copy_",
        "aten::add_.Tensor",
    ]  # the test's candidates, their copy, the position


def test_many_rows_are_multiplied_in_parts_or_densely():
    model = random_model()
    packed = PackedModel(model, kind="bfloat16", dtype=torch.float32)
    layer, block = packed.layers[0], model.blocks[0]
    for rows in (1, 64, 65, 130, 256, 257):
        x, residual = torch.randn(rows, 64), torch.randn(rows, 256)
        got = layer.up(x, residual)
        expected = torch.nn.functional.gelu(block.up(block.mlp_norm(x)), approximate="tanh") + residual
        assert torch.allclose(got, expected, atol=1e-4), rows


def test_a_16_bit_model_is_fused_on_a_gpu(monkeypatch):
    """Its weights are not copied; a few rows go to skinny_linear, many to cuBLAS; what it can't serve stays as it is."""
    model = random_model(activation="geglu", layer_scale=True).bfloat16()
    assert packed_model.fused(model) is model  # on a CPU
    serves = {"auto": None, "cuda": None}
    monkeypatch.setattr(packed_model, "why_not", lambda kind, device, backend: serves.get(backend, "not by this one"))
    for name in ("triton", "reference"):  # asked for as an argument, by `use` and by the environment
        assert packed_model.fused(model, name) is model
        with backends.use(name):
            assert packed_model.fused(model) is model
        with monkeypatch.context() as environment:
            environment.setenv("DALLE_FAST_BACKEND", name)
            assert packed_model.fused(model) is model
    fused = packed_model.fused(model)
    assert isinstance(fused, PackedModel) and packed_model.fused(fused) is fused
    pairs = [
        (fused.layers[1].up.weight.data, model.blocks[1].up.weight),
        (fused.packed_head.weight.data, model.head.weight),
    ]
    pairs.append((fused.image_embedding.weight, model.image_embedding.weight))
    assert all(ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr() for ours, theirs in pairs)
    for odd in (random_model(dim=40, heads=3, head_dim=12).bfloat16(), random_model()):
        assert packed_model.fused(odd) is odd
    text, tokens = torch.randint(1, 60, (2, 16)), torch.randint(32, (6, 10))
    wide = DalleModel(model.config).requires_grad_(False).eval()
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    exact = decode(TorchEngine(wide), text, tokens)
    errors = []
    for few in (8, 2):  # of 6 rows a step, and 24 where they are fed by fours
        for linear in (*(getattr(x, n) for x in fused.layers for n in packed_model.LINEAR), fused.packed_head):
            linear.few = few
        engine = GraphEngine(fused, chunk=4, capture=False)
        errors.append((decode(engine, text, tokens) - exact).abs().mean())
    errors.append((decode(TorchEngine(model, chunk=4), text, tokens) - exact).abs().mean())
    assert max(errors[:2]) < 2 * errors[2]


def test_load_and_size(tmp_path):
    model = random_model(dim=256, heads=4, head_dim=64)
    model.save(tmp_path)
    text, tokens = torch.ones(1, 16, dtype=torch.int64), torch.randint(32, (2, 6))
    sizes = {}
    for kind in KINDS:
        loaded = PackedModel.load_packed(tmp_path, kind=kind)
        sizes[kind] = loaded.weight_nbytes()
        expected = decode(GraphEngine(PackedModel(model, kind=kind), capture=False), text, tokens, 1)
        assert torch.equal(decode(GraphEngine(loaded, capture=False), text, tokens, 1), expected)
    assert sizes["int8"] < 0.52 * sizes["bfloat16"] and sizes["int4"] < 0.29 * sizes["bfloat16"]
    assert not any(p.is_meta for p in loaded.parameters())


def test_refusals():
    model = random_model()
    with pytest.raises(ValueError, match="got kind 'fp8', expected one of bfloat16"):
        PackedModel(model, kind="fp8")
    with pytest.raises(
        ValueError, match=r"got a weight \[192, 36\] for kind 'float16', expected a multiple of 8 inputs"
    ):
        PackedModel(random_model(dim=36), kind="float16")
    with pytest.raises(ValueError, match="ModelConfig"):
        PackedModel(model.state_dict())
    with pytest.raises(NotImplementedError, match="no text head"):
        PackedModel(model)(torch.ones(1, 16, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    assert "got fp8" in (packed_model.why_not("fp8", "cuda") or "")
    assert "got triton" in (packed_model.why_not("int8", "cuda", "triton") or "")
