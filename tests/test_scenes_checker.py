"""The checker of generated scenes, held to scenes whose meaning is known because they were rendered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # examples/ is not installed

from examples.scenes import checker, grammar, render

SCENES = 240


@pytest.fixture(scope="module")
def drawn() -> list[tuple[grammar.Scene, checker.Reading]]:
    """Scenes of every family, half of them held-out combinations, with what the checker reads in their pictures."""
    rng = np.random.default_rng(11)
    scenes = [grammar.sample_scene(rng, grammar.FAMILIES[i % 3], held_out=i % 2 == 1) for i in range(SCENES)]
    return [(scene, checker.read(render.render(scene, rng))) for scene in scenes]


def test_true_pairs_are_right(drawn) -> None:
    wrong = [grammar.captions(scene)[0] for scene, seen in drawn if not all(checker.compare(seen, scene).values())]
    assert len(wrong) <= 0.005 * len(drawn), wrong


def test_pairs_with_one_attribute_changed_are_wrong(drawn) -> None:
    pairs = [(scene, other, seen) for scene, seen in drawn for other in grammar.one_attribute_changed(scene)]
    assert len(pairs) > 20 * SCENES
    missed = [
        (grammar.captions(scene)[0], grammar.captions(other)[0])
        for scene, other, seen in pairs
        if all(checker.compare(seen, other).values())
    ]
    assert len(missed) <= 0.005 * len(pairs), missed[:10]


def changes() -> Iterator[tuple[grammar.Scene, grammar.Scene, set[str]]]:
    """A scene, another one, and the attributes that differ."""
    red, blue, star = (grammar.Block(*x) for x in (("red", "cube"), ("blue", "cube"), ("red", "star")))
    two = grammar.Scene("blocks", blocks=(red,), count=2)
    yield two, grammar.Scene("blocks", blocks=(red,), count=3), {"count"}
    yield two, grammar.Scene("blocks", blocks=(blue,), count=2), {"colour"}
    yield two, grammar.Scene("blocks", blocks=(star,), count=2), {"shape"}
    yield two, grammar.Scene("blocks", blocks=(red,), count=2, small=True), {"size"}
    beside = grammar.Scene("blocks", "left_of", (red, blue))
    yield beside, grammar.Scene("blocks", "left_of", (blue, red)), {"colour 1", "colour 2"}
    clock = grammar.Scene("clocks", blocks=(grammar.Block("green", "hexagon"),), hour=3)
    yield clock, grammar.Scene("clocks", blocks=clock.blocks, hour=9), {"hour"}
    yield clock, grammar.Scene("clocks", blocks=(grammar.Block("green", "octagon"),), hour=3), {"shape"}
    penguin = grammar.Scene("penguins", garments=(("hat", "red"), ("pants", "blue")))
    yield penguin, grammar.Scene("penguins", garments=(("hat", "red"),)), {"pants"}
    yield penguin, grammar.Scene("penguins", garments=(("hat", "pink"), ("pants", "blue"))), {"hat"}


@pytest.mark.parametrize(("scene", "other", "differing"), list(changes()))
def test_the_changed_attribute_is_the_one_named(scene, other, differing) -> None:
    seen = checker.read(render.render(scene, np.random.default_rng(2)))
    assert {name for name, right in checker.compare(seen, other).items() if not right} == differing


def test_stacked_is_not_side_by_side() -> None:
    blocks = (grammar.Block("red", "cube"), grammar.Block("blue", "square"))
    for shown, named in (("on_top", "left_of"), ("left_of", "on_top")):
        picture = render.render(grammar.Scene("blocks", shown, blocks), np.random.default_rng(2))
        assert not checker.check(picture, grammar.Scene("blocks", named, blocks))["arrangement"]


def test_soft_edges_do_not_matter() -> None:
    """A picture blurred by a pixel, with noise, as image tokenizers make it."""
    from scipy import ndimage

    rng = np.random.default_rng(4)
    wrong = []
    for i in range(60):
        scene = grammar.sample_scene(rng, grammar.FAMILIES[i % 3])
        soft = ndimage.gaussian_filter(render.render(scene, rng).astype(np.float32), (0.8, 0.8, 0))
        noisy = (soft + rng.normal(0, 3, soft.shape)).clip(0, 255).astype(np.uint8)
        if not all(checker.check(noisy, scene).values()):
            wrong.append(grammar.captions(scene)[0])
    assert len(wrong) <= 1, wrong


def test_what_is_not_a_scene_is_not_right() -> None:
    rng = np.random.default_rng(6)
    noise = rng.integers(0, 256, (256, 256, 3)).astype(np.uint8)
    empty = np.full((256, 256, 3), 240, np.uint8)
    for i in range(30):
        scene = grammar.sample_scene(rng, grammar.FAMILIES[i % 3])
        broken = render.render(scene, rng)
        rows = np.nonzero((broken != broken[0, 0]).any((1, 2)))[0]
        broken[: rows.mean().astype(int)] = broken[0, 0]  # the upper half of everything is missing
        for picture in (noise, empty, broken):
            assert not all(checker.check(picture, scene).values()), grammar.captions(scene)[0]


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got a uint8 picture \[64, 64, 3\]"):
        checker.read(np.zeros((64, 64, 3), np.uint8))
