"""The training programs: killed and started again they end with the same weights as a run left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parent.parent))  # examples/ is not installed

from dalle_fast.images import DVAE
from dalle_fast.model import DalleModel
from examples.scenes import (
    checker,
    damage,
    data,
    draw_for_clip,
    export,
    grammar,
    render,
    steady_codes,
    train_clip,
    train_dvae,
    train_transformer,
)


@pytest.fixture(scope="module")
def codebook() -> steady_codes.Codebook:
    return steady_codes.Codebook.build(160, scenes=80)


@pytest.fixture(autouse=True)
def small(monkeypatch, codebook) -> None:
    """A small codebook, and few steps for the pads."""
    monkeypatch.setattr(steady_codes.Codebook, "load", lambda: codebook)
    monkeypatch.setattr(train_transformer, "PAD_STEPS", 2)


def killed_at(monkeypatch, owner, name: str, call: int) -> None:
    """The `call`-th call of owner.name raises KeyboardInterrupt."""
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


def run(monkeypatch, program, out: Path, options: str, kill: tuple | None = None) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), *options.split()])
    if kill is None:
        program.main()
        return
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_at(patch, *kill)
        program.main()
    program.main()


def test_transformer(monkeypatch, tmp_path, capsys) -> None:
    options = "--dim 64 --layers 2 --batch 2 --steps 6 --decay 4 --long-text 3 --save-every 2 --device cpu"
    run(monkeypatch, train_transformer, tmp_path / "a", options)
    # Killed at step 4, in the steps with the whole text section, which started at step 3: goes on after step 4's save.
    run(monkeypatch, train_transformer, tmp_path / "b", options, (train_transformer.Training, "step", 6))
    a, b = (DalleModel.load(tmp_path / name) for name in "ab")
    assert a.config.caption_len == 256
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    model, step = export.transformer_of(tmp_path / "a" / "training.pt")
    assert step == 6 and model.config == a.config
    assert "12 sequences seen" in capsys.readouterr().out


def test_shades_are_shared() -> None:
    """What sets a plain colour apart from its colour and its shade shrinks; nothing else moves."""
    model = DalleModel(train_transformer.config_of(64, 1, 8))
    count, first = len(grammar.COLOURS), model.config.text_logits
    shades = len(render.SHADES)
    for name, start in (("image_embedding.weight", 0), ("head.weight", first)):
        weight = model.get_parameter(name)
        before = weight.detach().clone()
        train_transformer.share_shades(model, 0.3)
        old, new = (x[start : start + count * shades].view(count, shades, -1) for x in (before, weight.detach()))
        apart = [x - x.mean(0) - x.mean(1, keepdim=True) + x.mean((0, 1)) for x in (old, new)]
        torch.testing.assert_close(apart[1], 0.7 * apart[0])
        torch.testing.assert_close(new.mean(0), old.mean(0))
        torch.testing.assert_close(new.mean(1), old.mean(1))
        assert torch.equal(weight[start + count * shades :], before[start + count * shades :])
        assert torch.equal(weight[:start], before[:start])


def test_dvae(monkeypatch, tmp_path) -> None:
    options = "--steps 4 --batch 2 --pictures 6 --hidden 8 --device cpu"
    monkeypatch.setattr(train_dvae, "quality", lambda *args: (0.0, 0.0))
    for name in "ab":
        run(monkeypatch, train_dvae, tmp_path / name, options)
    a, b = (DVAE.load(tmp_path / name).state_dict() for name in "ab")
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    run(monkeypatch, train_dvae, tmp_path / "c", f"{options} --init {tmp_path / 'a'}")
    c = DVAE.load(tmp_path / "c").state_dict()
    for name, tensor in a.items():
        assert torch.equal(tensor, c[name]) == name.startswith("encoder"), name


def test_transformer_in_a_process_group(monkeypatch, tmp_path) -> None:
    """As torchrun starts it: of one process, the same weights as without. And going on from a trained folder."""
    options = "--dim 64 --layers 2 --batch 2 --steps 2 --decay 2 --long-text 1 --device cpu"
    run(monkeypatch, train_transformer, tmp_path / "a", options)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(train_transformer, "join_processes", lambda device: (0, 1))
        run(monkeypatch, train_transformer, tmp_path / "b", options)
    finally:
        dist.destroy_process_group()
    a, b = (DalleModel.load(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    tiny_rates = "--lr 1e-9 --matrix-lr 1e-9"
    monkeypatch.setattr(train_transformer, "SHARING", 0.0)
    run(monkeypatch, train_transformer, tmp_path / "c", f"{options} {tiny_rates} --init {tmp_path / 'a'}")
    c = DalleModel.load(tmp_path / "c").state_dict()
    assert all(torch.allclose(c[name], a[name], atol=1e-3) for name in a if "text" not in name and "head" not in name)


def test_drawn_pictures(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(draw_for_clip, "SAVE_EVERY", 1)
    whole, killed = tmp_path / "whole.npz", tmp_path / "killed.npz"
    options = "--captions 2 --n 2 --device cpu --seed 5 --shares 0 0.5 0.5"
    run(monkeypatch, draw_for_clip, whole, options)
    run(monkeypatch, draw_for_clip, killed, options, (draw_for_clip.checker, "check", 3))
    a, b = draw_for_clip.read(whole), draw_for_clip.read(killed)
    for x, y in zip(a, b, strict=True):
        assert (x.pictures == y.pictures).all() and (x.exact == y.exact).all()
        assert x.pictures.shape == (2, 256, 256, 3) and not grammar.is_held_out(x.scene)
        assert [all(checker.check(p, x.scene).values()) for p in x.pictures] == x.exact.tolist()
        assert x.scene.family != "blocks"


@pytest.fixture
def drawn(tmp_path) -> Path:
    """One exact and one wrong picture of each of two scenes, in a file as draw_for_clip writes it."""
    rng = np.random.default_rng(0)
    scenes, captions = zip(*[draw_for_clip.question(i) for i in range(2)], strict=True)
    pictures = [[render.render(s, rng), render.render(grammar.one_attribute_changed(s)[0], rng)] for s in scenes]
    exact = np.array([[True, False]] * 2)
    asked = {"captions": captions, "seed": 77, "shares": data.SHARES}
    np.savez(tmp_path / "drawn.npz", pictures=np.array(pictures), exact=exact, **asked)
    return tmp_path / "drawn.npz"


def test_drawn_pictures_of_other_captions_are_refused(drawn) -> None:
    for other in ({"shares": (0.0, 0.0, 1.0)}, {"seed": 78}):
        with pytest.raises(ValueError, match=r"drawn\.npz with other captions"):
            draw_for_clip.read(drawn, **other)


def test_clip_learns_from_drawn_pictures(monkeypatch, drawn) -> None:
    monkeypatch.setattr(train_clip, "DRAWN_SHARE", 1.0)
    monkeypatch.setattr(train_clip, "shifted", lambda picture, rng: picture)
    found = draw_for_clip.read(drawn)
    batch = train_clip.Batch(0, 4, 0, found)
    exact, wrong = (train_clip.pixels([d.pictures[i] for d in found]) for i in (0, 1))
    assert len(batch.pixels) == len(batch.fits) == 4 * (2 + train_clip.DAMAGED)
    for i in range(4):
        assert any(torch.equal(batch.pixels[i], x) for x in exact)
        assert any(torch.equal(batch.pixels[8 + i], x) for x in wrong)
        assert batch.fits[i, i] and not batch.fits[8 + i, i] and not batch.fits[12 + i, i]


def test_shifted_pictures_show_the_same() -> None:
    rng = np.random.default_rng(5)
    moved = 0
    for i in range(12):
        scene = grammar.sample_scene(rng, grammar.FAMILIES[i % 3])
        picture = render.render(scene, rng)
        other = damage.shifted(picture, rng)
        moved += not np.array_equal(other, picture)
        assert all(checker.check(other, scene).values())
    assert moved >= 6


def test_a_bent_block_leaves_all_else() -> None:
    rng = np.random.default_rng(6)
    refused = 0
    for _ in range(20):
        scene = grammar.sample_scene(rng, "blocks")
        _, placed = layout = render.layout(scene, rng)
        picture = damage.bend(scene, layout, rng)
        refused += not all(checker.check(picture, scene).values())
        # Nowhere beyond two cells around the blocks as they stood.
        around = np.zeros(picture.shape[:2], bool)
        for part in placed:
            cells = len(part.sprite[0].mask) // render.CELL + 2
            top, left = (render.CELL * max(0, at - 2) for at in (part.row, part.column))
            around[top : render.CELL * (part.row + cells), left : render.CELL * (part.column + cells)] = True
        assert np.ptp(picture[~around].reshape(-1, 3), axis=0).max() == 0
    assert refused >= 8  # the checker forgives a small block one cell


def test_the_checker_refuses_damaged_pictures() -> None:
    rng = np.random.default_rng(7)
    for i in range(18):
        scene = grammar.sample_scene(rng, grammar.FAMILIES[i % 3])
        layout = render.layout(scene, rng)
        picture, other = render.finish(*layout, rng), render.render(grammar.one_attribute_changed(scene)[0], rng)
        spoilt = damage.damage(scene, layout, picture, other, rng)
        assert spoilt.shape == picture.shape and not all(checker.check(spoilt, scene).values())


def test_what_nothing_spoils_gives_way_to_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stretch", "splice"):
        monkeypatch.setattr(damage, name, lambda picture, *_: picture)
    rng = np.random.default_rng(8)
    scene = grammar.sample_scene(rng, "clocks")
    layout = render.layout(scene, rng)
    picture, other = render.finish(*layout, rng), render.render(grammar.one_attribute_changed(scene)[0], rng)
    assert damage.damage(scene, layout, picture, other, rng) is other


@pytest.mark.parametrize("with_drawn", [False, True])
def test_clip(monkeypatch, tmp_path, drawn, with_drawn) -> None:
    options = "--steps 4 --groups 3 --width 64 --layers 1 --text-layers 1 --patch 32"
    if with_drawn:
        options += f" --drawn {drawn}"
    monkeypatch.setattr(train_clip, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_clip, "quality", lambda *args: {})
    run(monkeypatch, train_clip, tmp_path / "a", options)
    run(monkeypatch, train_clip, tmp_path / "b", options, (train_clip, "Batch", 4))
    a, b = (torch.load(tmp_path / name / "training.pt", weights_only=True)["model"] for name in "ab")
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_clip_goes_on_from_another_with_its_heads(monkeypatch, tmp_path) -> None:
    options = "--steps 1 --groups 3 --width 64 --layers 1 --text-layers 1 --patch 32"
    monkeypatch.setattr(train_clip, "quality", lambda *args: {})
    run(monkeypatch, train_clip, tmp_path / "a", options)
    run(monkeypatch, train_clip, tmp_path / "b", f"{options} --init {tmp_path / 'a'} --seed 1 --lr 0 --matrix-lr 0")
    a, b = (torch.load(tmp_path / name / "training.pt", weights_only=True)["model"] for name in "ab")
    assert any(name.startswith("heads") for name in a)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_the_mean_of_two_clips(monkeypatch, tmp_path) -> None:
    """What --keep saves lies between the start and the end; without --init there is nothing to keep."""
    options = "--steps 2 --groups 3 --width 64 --layers 1 --text-layers 1 --patch 32"
    monkeypatch.setattr(train_clip, "quality", lambda *args: {})
    run(monkeypatch, train_clip, tmp_path / "a", options)
    run(
        monkeypatch,
        train_clip,
        tmp_path / "b",
        f"{options} --init {tmp_path / 'a'} --keep 0.25 --seed 1 --lr 2 --matrix-lr 2",
    )
    start, mean = (train_clip.CLIPModel.from_pretrained(str(tmp_path / name)).state_dict() for name in "ab")
    end = torch.load(tmp_path / "b" / "training.pt", weights_only=True)["model"]
    for name, tensor in mean.items():
        wanted = 0.25 * start[name].float() + 0.75 * end[f"clip.{name}"].float()
        assert torch.allclose(tensor.float(), wanted, rtol=2e-3, atol=1e-4), name
    name = "visual_projection.weight"
    assert (end[f"clip.{name}"] - start[name].float()).abs().mean() > 0.01  # so that a mean can be told from its parts
    with pytest.raises(SystemExit):
        run(monkeypatch, train_clip, tmp_path / "c", f"{options} --keep 0.25")
