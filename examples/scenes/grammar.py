"""What a scene shows, and the captions that say so.

A `Scene` is the meaning of a caption: three families (blocks, clocks, penguins), eight colours. `sample_scene` draws one from a
seeded generator, `captions` lists every phrasing of it, `is_held_out` says whether it shows a combination listed in
held_out.json, none of which occurs in training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
BLOCK_SHAPES = ("cube", "square", "circle", "triangle", "star")
CLOCK_SHAPES = ("circle", "triangle", "square", "pentagon", "hexagon", "octagon", "star")
GARMENTS = ("hat", "gloves", "shirt", "pants")
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
COUNTS = {2: "two", 3: "three", 4: "four"}
FAMILIES = ("blocks", "clocks", "penguins")
HELD_OUT = json.loads((Path(__file__).parent / "held_out.json").read_text())


@dataclass(frozen=True)
class Block:
    """One kind of block: its colour and its shape."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a caption says. Fields that a family does not use keep their defaults.

    blocks: `arrangement` is "group" (`count` equal blocks in a row, 1 to 4), "left_of" (blocks[0] left of blocks[1]),
    "on_top" (blocks[0] stands on blocks[1]) or "tower" (three, top first). clocks: `blocks[0]` gives colour and shape,
    `hour` is 1 to 12, or 0 when the caption names no time. penguins: `garments` are (garment, colour) pairs in the
    order of GARMENTS.
    """

    family: str
    arrangement: str = "group"
    blocks: tuple[Block, ...] = ()
    count: int = 1
    small: bool = False
    hour: int = 0
    garments: tuple[tuple[str, str], ...] = ()


def is_held_out(scene: Scene) -> bool:
    """True if the scene shows at least one combination that training never shows."""
    if scene.family == "penguins":
        return any(HELD_OUT["garments"][garment] == colour for garment, colour in scene.garments)
    table = HELD_OUT["clocks" if scene.family == "clocks" else "blocks"]
    if any(table[block.shape] == block.colour for block in scene.blocks):
        return True
    return scene.arrangement == "tower" and [block.colour for block in scene.blocks] in HELD_OUT["towers"]


def _draw(rng: np.random.Generator, family: str) -> Scene:
    def pick(options):
        return options[int(rng.integers(len(options)))]

    if family == "clocks":
        hour = int(rng.integers(1, 13)) if rng.random() < 0.75 else 0
        return Scene("clocks", blocks=(Block(pick(COLOURS), pick(CLOCK_SHAPES)),), hour=hour)
    if family == "penguins":
        worn = [garment for garment in GARMENTS if rng.random() < 0.7]
        return Scene("penguins", garments=tuple((garment, pick(COLOURS)) for garment in worn))
    kind = rng.random()
    if kind < 0.40:
        count = pick((1, 1, 2, 3, 4))
        small = count == 4 or rng.random() < 0.4
        return Scene("blocks", "group", (Block(pick(COLOURS), pick(BLOCK_SHAPES)),), count, small)
    if kind < 0.65:
        first, second = (Block(pick(COLOURS), pick(BLOCK_SHAPES)) for _ in range(2))
        return Scene("blocks", "left_of", (first, second))
    if kind < 0.82:
        return Scene("blocks", "on_top", (Block(pick(COLOURS), pick(BLOCK_SHAPES)), Block(pick(COLOURS), "square")))
    colours = rng.permutation(len(COLOURS))[:3]
    return Scene("blocks", "tower", tuple(Block(COLOURS[int(i)], "square") for i in colours))


def sample_scene(rng: np.random.Generator, family: str | None = None, held_out: bool = False) -> Scene:
    """Draw a scene of `family` (any, if None): one that training may show, or with `held_out` one that it never shows."""
    if family is not None and family not in FAMILIES:
        raise ValueError(f"got family {family!r}, expected one of {', '.join(FAMILIES)}")
    family = family or FAMILIES[int(rng.integers(3))]
    while True:
        scene = _draw(rng, family)
        if not _ambiguous(scene) and is_held_out(scene) == held_out:
            return scene


def _ambiguous(scene: Scene) -> bool:
    """Two equal blocks side by side, or two blocks of one colour touching: a picture could not show which is which."""
    if scene.arrangement == "left_of":
        return scene.blocks[0] == scene.blocks[1]
    touching = scene.arrangement in ("on_top", "tower")
    return touching and any(a.colour == b.colour for a, b in zip(scene.blocks, scene.blocks[1:], strict=False))


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def captions(scene: Scene) -> list[str]:
    """Every phrasing of the scene; the first is the plainest."""
    if scene.family == "clocks":
        colour, shape = scene.blocks[0].colour, scene.blocks[0].shape
        bodies = [
            f"{_article(shape)}-shaped {colour} clock",
            f"{_article(colour)} clock in the shape of {_article(shape)}",
            f"{_article(colour)} {shape}-shaped clock",
        ]
        if not scene.hour:
            return bodies
        hour = HOURS[scene.hour - 1]
        return [f"{body} {verb} {hour} o'clock" for verb in ("showing", "at") for body in bodies]
    if scene.family == "penguins":
        if not scene.garments:
            return ["a penguin", "a picture of a penguin"]
        worn = [
            f"{colour} {name}" if name in ("gloves", "pants") else _article(f"{colour} {name}")
            for name, colour in scene.garments
        ]
        lists = [_join(worn)] if len(worn) == 1 else [_join(worn), _join(worn[::-1]), _join(worn[1:] + worn[:1])]
        return [f"a penguin {verb} {items}" for verb in ("wearing", "with") for items in dict.fromkeys(lists)]
    names = [_article(f"{block.colour} {block.shape}") for block in scene.blocks]
    if scene.arrangement == "left_of":
        return [f"{names[0]} to the left of {names[1]}", f"{names[1]} to the right of {names[0]}"]
    if scene.arrangement == "on_top":
        return [f"{names[0]} on top of {names[1]}", f"{names[1]} below {names[0]}"]
    if scene.arrangement == "tower":
        return [
            f"{names[0]} on top of {names[1]} on top of {names[2]}",
            f"a tower of {names[0]}, {names[1]} and {names[2]}",
        ]
    size = "small " if scene.small else ""
    noun = f"{size}{scene.blocks[0].colour} {scene.blocks[0].shape}"
    if scene.count == 1:
        return [_article(noun), f"a picture of {_article(noun)}", f"one {noun}"]
    return [f"{COUNTS[scene.count]} {noun}s", f"a picture of {COUNTS[scene.count]} {noun}s"]


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    phrasings = captions(scene)
    return phrasings[int(rng.integers(len(phrasings)))]


def one_attribute_changed(scene: Scene) -> list[Scene]:
    """Scenes that differ from this one in exactly one attribute: the hard negatives of the checker's test and of CLIP."""
    other: list[Scene] = []

    def blocks_with(index: int, **change: str) -> Scene:
        blocks = list(scene.blocks)
        blocks[index] = replace(blocks[index], **change)
        return replace(scene, blocks=tuple(blocks))

    shapes = CLOCK_SHAPES if scene.family == "clocks" else BLOCK_SHAPES
    for index, block in enumerate(scene.blocks):
        other += [blocks_with(index, colour=colour) for colour in COLOURS if colour != block.colour]
        if (
            scene.arrangement == "group"
            or (index == 0 and scene.arrangement == "on_top")
            or scene.arrangement == "left_of"
        ):
            other += [blocks_with(index, shape=shape) for shape in shapes if shape != block.shape]
    if scene.family == "clocks" and scene.hour:
        other += [replace(scene, hour=hour) for hour in range(1, 13) if hour != scene.hour]
    if scene.family == "blocks" and scene.arrangement == "group":
        other += [
            replace(scene, count=count) for count in (1, 2, 3, 4) if count != scene.count and (count < 4 or scene.small)
        ]
        if scene.count < 4:
            other.append(replace(scene, small=not scene.small))
    if (
        scene.arrangement in ("left_of", "on_top") and scene.blocks[0].shape == scene.blocks[1].shape
    ) or scene.arrangement == "left_of":
        other.append(replace(scene, blocks=scene.blocks[::-1]))
    if scene.family == "penguins":
        worn = dict(scene.garments)
        for garment in GARMENTS:
            for colour in (None, *COLOURS):
                if colour != worn.get(garment):
                    changed = {**worn, garment: colour}
                    other.append(replace(scene, garments=tuple((g, changed[g]) for g in GARMENTS if changed.get(g))))
    return [s for s in other if s != scene and not _ambiguous(s)]
