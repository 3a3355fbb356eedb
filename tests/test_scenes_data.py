"""The scenes that the bundled models learn from: captions, held-out combinations, codes, batches; and that training resumes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # examples/ is not installed

from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel
from dalle_fast.passes import FullPass
from examples.scenes import data, grammar, pieces, render, steady_codes, train_clip
from examples.scenes.tiled_attention import TiledPass


def test_training_never_shows_what_is_held_out() -> None:
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        scenes = [grammar.sample_scene(rng, held_out=held_out) for _ in range(500)]
        assert {grammar.is_held_out(scene) for scene in scenes} == {held_out}


def test_captions_say_what_the_scene_is() -> None:
    block = grammar.Block("orange", "star")
    assert grammar.captions(grammar.Scene("blocks", blocks=(block,)))[0] == "an orange star"
    assert (
        grammar.captions(grammar.Scene("blocks", blocks=(block,), count=3, small=True))[0] == "three small orange stars"
    )
    clock = grammar.Scene("clocks", blocks=(grammar.Block("green", "pentagon"),), hour=3)
    assert grammar.captions(clock)[0] == "a pentagon-shaped green clock showing three o'clock"
    worn = (("hat", "red"), ("gloves", "yellow"), ("shirt", "blue"), ("pants", "green"))
    said = grammar.captions(grammar.Scene("penguins", garments=worn))[0]
    assert said == "a penguin wearing a red hat, yellow gloves, a blue shirt and green pants"


def test_captions_of_different_scenes_differ() -> None:
    rng = np.random.default_rng(1)
    said: dict[str, grammar.Scene] = {}
    for _ in range(2000):
        scene = grammar.sample_scene(rng)
        for caption in grammar.captions(scene):
            assert said.setdefault(caption, scene) == scene


def test_a_changed_attribute_is_another_scene() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        scene = grammar.sample_scene(rng)
        others = grammar.one_attribute_changed(scene)
        assert others and scene not in others


def test_pictures_depend_on_the_seed_alone() -> None:
    scene = grammar.Scene("penguins", garments=(("hat", "red"),))
    a, b, c = (render.render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a.dtype == np.uint8 and a.shape == (256, 256, 3)
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.fixture(scope="module")
def codebook() -> steady_codes.Codebook:
    return steady_codes.Codebook.build(256, scenes=150)


def test_plain_cells_share_a_code_and_forms_do_not_say_colours(codebook) -> None:
    for colour in ("red", "blue"):
        scene = grammar.Scene("blocks", blocks=(grammar.Block(colour, "triangle"),))
        background, placed = render.layout(scene, np.random.default_rng(3))
        codes = codebook.label(background, placed)
        if colour == "red":
            first = codes
    changed = first != codes
    assert changed.any()
    assert (first[changed] < len(codebook.colours)).all() and (codes[changed] < len(codebook.colours)).all()
    forms = first[first >= len(codebook.colours)]
    assert len(forms) > 10


def test_no_piece_is_a_block() -> None:
    """What teaches the dVAE every form in every colour shows nothing that is held out."""
    for number in range(pieces.COUNT):
        piece = pieces.sprite(number)[0].mask
        for shape in grammar.BLOCK_SHAPES:
            block = np.max([layer.mask for layer in render.block_sprite(shape, len(piece) // render.CELL)], 0)
            assert np.minimum(piece, block).sum() < 0.92 * np.maximum(piece, block).sum(), (number, shape)


def test_pieces_come_in_all_colours_and_tell_theirs(codebook) -> None:
    rng, seen = np.random.default_rng(4), set()
    for _ in range(16):
        background, placed = pieces.layout(rng)
        codes = codebook.label(background, placed).reshape(32, 32)
        for part in placed:
            cells = len(part.sprite[0].mask) // render.CELL
            mine = codes[part.row : part.row + cells, part.column : part.column + cells]
            colour = np.asarray(render.PALETTE[part.colours["fill"]]) / 255 * part.shade
            plain = int(((codebook.colours - colour.clip(0, 1)) ** 2).sum(1).argmin())
            assert (mine == plain).sum() >= 2 and (mine >= len(codebook.colours)).any()
            seen.add(part.colours["fill"])
        assert {(p.row // 16, p.column // 16) for p in placed} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert seen == set(grammar.COLOURS)


def test_codebook_survives_its_file(codebook, tmp_path) -> None:
    codebook.save(tmp_path / "codebook.npz")
    loaded = steady_codes.Codebook.load(tmp_path / "codebook.npz")
    assert len(loaded) == len(codebook) == 256
    rng = np.random.default_rng(4)
    for _ in range(20):
        scene = render.layout(grammar.sample_scene(rng), rng)
        assert np.array_equal(loaded.label(*scene), codebook.label(*scene))


def test_batches_depend_on_seed_and_step_alone(codebook, tmp_path) -> None:
    tokenizer = data.train_tokenizer(tmp_path / "tokenizer.json", scenes=100)
    batches = data.Batches(tokenizer, codebook, 3, 32, seed=5, steps=10)
    (text, codes), (again, codes_again) = batches[4], batches[4]
    assert text.shape == (3, 32) and codes.shape == (3, 1024)
    assert torch.equal(text, again) and torch.equal(codes, codes_again)
    assert not torch.equal(codes, batches[5][1])


def test_training_attention_equals_the_library() -> None:
    """examples/scenes/tiled_attention.py against the passes of the package, outputs and gradients."""
    patterns = ("row", "column", "conv(kernel=5,boundary=flat)")
    config = ModelConfig(
        dim=64, layers=3, heads=1, patterns=patterns, caption_len=6, height=6, width=6, text_vocab=16, image_vocab=16
    )
    model = DalleModel(config)
    x = torch.randn(2, 6 + 36, 64)
    outputs, gradients = [], []
    for run in (TiledPass(model.masks, torch.float32), FullPass(model.masks, None)):
        model.zero_grad()
        out = model.run_blocks(x, run)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.blocks.parameters()]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


def test_clip_batches_say_which_captions_fit() -> None:
    batch = train_clip.Batch(3, 4, seed=0, drawn=[])
    assert batch.pixels.shape == (16, 3, 128, 128) and len(batch.texts) == 8 and batch.fits.shape == (16, 8)
    assert batch.fits[:8].diagonal().all()
    clock = grammar.Scene("clocks", blocks=(grammar.Block("green", "star"),), hour=3)
    untimed = grammar.Scene("clocks", blocks=clock.blocks)
    assert train_clip.fits(clock, untimed) and not train_clip.fits(untimed, clock)


def test_clip_prepares_pictures_as_the_ranker_does() -> None:
    from PIL import Image

    from dalle_fast.ranking import MEAN, STD, ClipRanker

    picture = render.render(grammar.Scene("clocks", blocks=(grammar.Block("red", "star"),)), np.random.default_rng(0))
    ranker = ClipRanker.__new__(ClipRanker)
    ranker.size = train_clip.SIZE
    ranker.resample, ranker.mean, ranker.std = Image.Resampling.BICUBIC, np.array(MEAN), np.array(STD)
    ours, theirs = train_clip.pixels([picture])[0], ranker._pixels(Image.fromarray(picture))
    assert float((ours - theirs).abs().max()) < 0.03  # a step of 1/255 is 0.015
