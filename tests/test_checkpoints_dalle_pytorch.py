"""Converted DALLE-pytorch checkpoints against dalle-pytorch 1.6.6's own code: random weights, float64 and float32.

Its `forward` is the oracle. Its public generate_images draws wrongly in three ways, shown below beside what ours does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peer_packages
import pytest
import torch

from dalle_fast import checkpoints
from dalle_fast.engine import TorchEngine
from dalle_fast.images import load_codec
from dalle_fast.model import DalleModel
from dalle_fast.sampling import SamplingSettings, sample
from dalle_fast.weights import WeightError

KINDS = ("full", "axial_row", "axial_col", "conv_like")
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "axial": {"rotary_emb": False, "shift_tokens": True},
    "shift": {"shift_tokens": True},
    "sandwich": {"sandwich_norm": True, "shift_tokens": True},
    "reversible": {"reversible": True, "shift_tokens": True},
    "reversible-sandwich": {"reversible": True, "sandwich_norm": True, "rotary_emb": False},
    "shared": {"depth": 8, "shared_attn_ids": (0, 1, 2, 3), "shared_ff_ids": (0, 1)},
    "tied": {"share_input_output_emb": True},
    "stable": {"stable": True},
    "inference": {"optimize_for_inference": True, "shift_tokens": True},
    "heads": {"heads": 3, "dim_head": 32},
}


@pytest.fixture
def peer() -> Iterator[Any]:
    with peer_packages.dalle_pytorch() as module:
        yield module


def random_peer(peer: Any, *, text: int, side: int, dim: int = 32, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and the hparams that its training script would write."""
    vae = peer.DiscreteVAE(image_size=8 * side, num_tokens=48, codebook_dim=8, hidden_dim=8, num_resnet_blocks=1)
    hparams = {
        "num_text_tokens": 40,
        "text_seq_len": text,
        "dim": dim,
        "depth": 4,
        "heads": 2,
        "dim_head": 64,
        "reversible": False,
        "loss_img_weight": 7,
        "attn_types": KINDS,
        "ff_dropout": 0.0,
        "attn_dropout": 0.0,
        "stable": False,
        "shift_tokens": False,
        "rotary_emb": True,
        "shared_attn_ids": None,
        "shared_ff_ids": None,
        "share_input_output_emb": False,
    } | options
    model = peer.DALLE(vae=vae, **hparams)
    for parameter in model.parameters():  # large enough that every quirk shows in the logits
        torch.nn.init.normal_(parameter, std=0.3)
    for name in ("sandwich_norm", "optimize_for_inference"):  # which its script does not write
        hparams.pop(name, None)
    return model.eval().requires_grad_(False), hparams


def lively(model: Any) -> Any:
    """Makes what is drawn depend on what was drawn before: else greedy drawing repeats one token or two."""
    for bias in (model.to_logits[0].bias, model.to_logits[1].bias):
        bias.zero_()
    model.image_emb.weight.mul_(5)
    return model.double()


def checkpoint(model: Any, hparams: dict[str, Any], path: Path, /, **changes: Any) -> Path:
    content = {"hparams": hparams, "vae_params": {"image_size": 8}, "epoch": 3, "version": "1.6.6"}
    content |= {"vae_class_name": "DiscreteVAE", "weights": model.state_dict(), "opt_state": {"state": {}}}
    torch.save(content | changes, path)
    return path


def converted(model: Any, hparams: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float64) -> DalleModel:
    source = checkpoint(model, hparams, folder / "dalle.pt")
    checkpoints.convert("dalle-pytorch", source, folder / "out")
    return DalleModel.load(folder / "out", dtype=dtype)


def caption(length: int) -> torch.Tensor:
    text = torch.zeros(2, length, dtype=torch.int64)
    text[0, :5], text[1, : length - 1] = torch.tensor([2, 7, 9, 11, 3]), torch.randint(1, 40, (length - 1,))
    return text


def compare(theirs: Any, ours: DalleModel, text: int, side: int, tolerance: float) -> None:
    ids, image = caption(text), torch.randint(48, (2, side * side))
    expected = theirs(ids.clone(), image)
    text_logits, image_logits = ours(ids, image)
    vocab = ours.config.text_logits
    torch.testing.assert_close(image_logits, expected[:, text:, vocab:], rtol=0, atol=tolerance)
    torch.testing.assert_close(text_logits[:, :text], expected[:, :text, :vocab], rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_small_models(peer: Any, tmp_path: Path, variant: str) -> None:
    theirs, hparams = random_peer(peer, text=6, side=8, **VARIANTS[variant])
    compare(theirs.double(), converted(theirs.double(), hparams, tmp_path), 6, 8, 1e-10)


@pytest.mark.parametrize("variant", ["rotary", "axial", "sandwich"])
def test_logits_at_the_true_layout(peer: Any, tmp_path: Path, variant: str) -> None:
    theirs, hparams = random_peer(peer, text=256, side=32, **VARIANTS[variant])
    compare(theirs.double(), converted(theirs.double(), hparams, tmp_path), 256, 32, 1e-10)


def test_logits_in_float32(peer: Any, tmp_path: Path) -> None:
    theirs, hparams = random_peer(peer, text=256, side=32, **VARIANTS["shift"])
    for parameter in theirs.parameters():
        parameter.mul_(0.5)
    compare(theirs, converted(theirs, hparams, tmp_path, torch.float32), 256, 32, 1e-4)


def greedy(engine: TorchEngine, ids: torch.Tensor) -> torch.Tensor:
    tokens = [engine.prefill(ids, 1).argmax(-1)]
    while len(tokens) < engine.config.cells:
        tokens.append(engine.step(tokens[-1]).argmax(-1))
    return torch.stack(tokens, 1)


def test_greedy_1024_tokens_as_their_cache_draws_them(peer: Any, tmp_path: Path) -> None:
    """Their `forward` with its cache called directly, one token at a time."""
    options = {"shift_tokens": True, "optimize_for_inference": True, "attn_types": KINDS[:3], "depth": 3}
    theirs, hparams = random_peer(peer, text=256, side=32, heads=1, dim_head=32, **options)
    lively(theirs)
    ids, cache = caption(256)[:1], {}
    drawn = torch.zeros(1, 0, dtype=torch.int64)
    while drawn.shape[1] < 1024:
        logits = theirs(ids.clone(), drawn, cache=cache)[:, -1]
        drawn = torch.cat([drawn, logits.argmax(-1, keepdim=True) - theirs.num_text_tokens], 1)
    assert greedy(TorchEngine(converted(theirs, hparams, tmp_path)), ids).equal(drawn)
    assert len(drawn.unique()) > 5  # not one token for ever


def test_greedy_1024_tokens_of_every_attention(peer: Any, tmp_path: Path) -> None:
    """One pass of theirs over our tokens: if each is their first choice after those before it, then by induction their own
    greedy loop draws the same. (conv_like has no cache of theirs: the loop would take minutes.)"""
    theirs, hparams = random_peer(peer, text=256, side=32, **VARIANTS["axial"])
    lively(theirs)
    ids = caption(256)[:1]
    drawn = greedy(TorchEngine(converted(theirs, hparams, tmp_path)), ids)
    assert theirs(ids.clone(), drawn)[:, 256:].argmax(-1).equal(drawn + theirs.num_text_tokens)
    assert len(drawn.unique()) > 5


def test_what_is_wrong_with_generate_images_and_right_here(peer: Any, tmp_path: Path) -> None:
    options = {"shift_tokens": True, "optimize_for_inference": True, "attn_types": KINDS[:3], "depth": 3}
    theirs, hparams = random_peer(peer, text=6, side=8, **options)
    lively(theirs)
    engine = TorchEngine(converted(theirs, hparams, tmp_path))
    theirs.vae.decode = lambda tokens: tokens  # the tokens are what is compared
    ids, cells, scale = caption(6)[:1], 64, 3.0

    # Guidance as it is meant: uncond + scale · (cond - uncond), each from a pass over text that nobody has changed.
    guided = torch.zeros(1, 0, dtype=torch.int64)
    while guided.shape[1] < cells:
        cond, uncond = (theirs(text.clone(), guided)[:, -1] for text in (ids, torch.zeros_like(ids)))
        choice = (uncond + scale * (cond - uncond)).argmax(-1, keepdim=True)
        guided = torch.cat([guided, choice - theirs.num_text_tokens], 1)
    settings = SamplingSettings(top_k=1, guidance_scale=scale)
    ours = torch.cat([wave.tokens for wave in sample(engine, ids, 1, settings)])
    assert ours.equal(guided)

    # filter_thres=1: only the most likely token is kept.
    text = ids.clone()
    without_cache = theirs.generate_images(text, filter_thres=1.0, cond_scale=scale)
    assert not text.any()  # the caller's caption is gone, and with it the condition of all tokens but the first
    assert not without_cache.equal(guided)
    with_cache = theirs.generate_images(ids.clone(), filter_thres=1.0, cond_scale=scale, use_cache=True)
    assert not with_cache.equal(guided)  # the empty caption's pass reads the caption's cache

    # Without guidance the tokens are right, and the cache is dropped on the way: each step runs the whole sequence.
    positions: list[int] = []
    theirs.transformer.register_forward_pre_hook(lambda _, arguments: positions.append(arguments[0].shape[1]))
    plain = theirs.generate_images(ids.clone(), filter_thres=1.0, use_cache=True)
    assert sum(positions) == sum(range(7, 7 + cells))
    steps: list[int] = []
    ours_model = engine.model
    ours_model.blocks[0].attention_norm.register_forward_pre_hook(lambda _, a: steps.append(a[0].shape[1]))
    assert greedy(engine, ids).equal(plain)
    assert sum(steps) == 7 + cells - 1


def test_conv_like_before_1_5_was_centred(peer: Any, tmp_path: Path) -> None:
    theirs, hparams = random_peer(peer, text=6, side=8)
    for version, boundary in (("1.4.2", "clip"), ("1.5.0", "quadrant"), ("1.6.6", "quadrant")):
        source = checkpoint(theirs, hparams, tmp_path / "dalle.pt", version=version)
        config = checkpoints.convert("dalle-pytorch", source, tmp_path / version)
        assert config.patterns[3] == f"conv(kernel=5,boundary={boundary}" + (",dilation=1)" if version > "1.5" else ")")


def test_older_files(peer: Any, tmp_path: Path) -> None:
    """Before 1.1.1 the rotary buffer lacked the last cell; before axial_positional_embedding 0.3, weights had other names;
    before the pull request that brought the cache, fewer wrappers stood around a branch."""
    theirs, hparams = random_peer(peer, text=6, side=8, shift_tokens=True)
    state = dict(theirs.state_dict())
    state["transformer.pos_emb"] = state["transformer.pos_emb"][None, :, :-1]
    for key in [key for key in state if ".fn.fn.fn" in key]:
        state[key.replace(".fn.fn.fn", ".fn.fn", 1)] = state.pop(key)
    source = checkpoint(theirs, hparams, tmp_path / "dalle.pt", weights=state)
    checkpoints.convert("dalle-pytorch", source, tmp_path / "out")
    compare(theirs.double(), DalleModel.load(tmp_path / "out", dtype=torch.float64), 6, 8, 1e-10)

    theirs, hparams = random_peer(peer, text=6, side=8, rotary_emb=False)
    state = {key.replace(".weights.", ".weights_"): x for key, x in theirs.state_dict().items()}
    source = checkpoint(theirs, hparams, tmp_path / "dalle.pt", weights=state)
    checkpoints.convert("dalle-pytorch", source, tmp_path / "axial")
    compare(theirs.double(), DalleModel.load(tmp_path / "axial", dtype=torch.float64), 6, 8, 1e-10)


def test_its_own_image_tokenizer_comes_along(peer: Any, tmp_path: Path) -> None:
    theirs, hparams = random_peer(peer, text=6, side=8)
    converted(theirs, hparams, tmp_path)
    codec = load_codec(tmp_path / "out")
    pixels = torch.rand(2, 3, 64, 64)
    codes = theirs.vae.get_codebook_indices(pixels)
    assert codec.encode(pixels).flatten(1).equal(codes)
    expected = (theirs.vae.decode(codes) / 2 + 0.5).clamp(0, 1)  # it draws what it was trained on, (x - 0.5) / 0.5
    torch.testing.assert_close(codec.decode(codes.view(2, 8, 8)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("blocks", [0, 2])
def test_discrete_vae_alone(peer: Any, tmp_path: Path, blocks: int) -> None:
    theirs = peer.DiscreteVAE(
        image_size=32, num_tokens=20, codebook_dim=6, hidden_dim=8, num_layers=2, num_resnet_blocks=blocks
    )
    hparams = {"image_size": 32, "normalization": [[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]]}
    torch.save({"hparams": hparams, "weights": theirs.state_dict()}, tmp_path / "vae.pt")
    checkpoints.convert_images(tmp_path / "vae.pt", tmp_path / "out")
    codec, pixels = load_codec(tmp_path / "out"), torch.rand(1, 3, 32, 32)
    theirs.normalization = hparams["normalization"]
    codes = theirs.get_codebook_indices(pixels)
    assert codec.encode(pixels).flatten(1).equal(codes)
    mean, deviation = torch.tensor(hparams["normalization"])[..., None, None]
    expected = (theirs.decode(codes) * deviation + mean).clamp(0, 1)
    torch.testing.assert_close(codec.decode(codes.view(1, 8, 8)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "dalle-cp"}, "DeepSpeed's auxiliary file"),
        ({"weights": [1]}, "no dictionary of tensors"),
        ({"hparams": None}, "without hparams"),
        ({"hparams": {"text_seq_len": 6, "num_text_tokens": 40}}, "without shift_tokens"),
        ({"version": None}, "conv_like layers and no version"),
    ],
)
def test_files_that_do_not_fit(peer: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = checkpoint(*random_peer(peer, text=6, side=8), tmp_path / "dalle.pt", **changes)
    with pytest.raises(WeightError, match=message):
        checkpoints.convert("dalle-pytorch", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kinds", "message"), [(("full", "sparse"), "drawn anew"), (("mlp",), "got attention mlp")])
def test_attention_that_cannot_be_rebuilt(peer: Any, tmp_path: Path, kinds: tuple[str, ...], message: str) -> None:
    theirs, hparams = random_peer(peer, text=6, side=8)
    source = checkpoint(theirs, hparams | {"attn_types": kinds}, tmp_path / "dalle.pt")
    with pytest.raises(WeightError, match=message):
        checkpoints.convert("dalle-pytorch", source, tmp_path / "out")
