"""Reads a picture of a scene from its pixels alone, and says of each attribute of a caption whether it is right.

`read` finds the parts by image processing: every pixel gets the nearest colour of the palette, soft edges go to the
nearest plain area, and connected areas of one colour are parts. Shapes are told by overlap with outlines of the same
size, the hour by overlap with the twelve positions of the hands, garments by what covers their place on the penguin,
which is found by its face. A part that fits nothing well is "unclear" and never right. `check` compares with a scene.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
from scipy import ndimage

from . import render
from .grammar import BLOCK_SHAPES, CLOCK_SHAPES, COLOURS, GARMENTS, Scene

UNCLEAR = "unclear"
_BLACK, _PAPER, _BEAK, _GROUND = (len(COLOURS) + i for i in range(4))  # classes of pixels beside the eight colours
_DEBRIS = 120  # px: a smaller area of one colour is no part (the smallest part, a small star, has 500)
_SMALL_SIDE = 52  # px: in a group, between a small block's 40 and the others' 64 or more
_LEAST_OVERLAP = 0.86  # of a part with the best outline; true parts have 0.95 and more, after a dVAE 0.92


@dataclass(frozen=True)
class Part:
    """A block or a clock's body: colour, shape (or "unclear"), and its box in px."""

    colour: str
    shape: str
    top: int
    left: int
    bottom: int
    right: int

    @property
    def middle(self) -> tuple[float, float]:
        return (self.top + self.bottom) / 2, (self.left + self.right) / 2

    @property
    def side(self) -> int:
        return max(self.bottom - self.top, self.right - self.left)


@dataclass(frozen=True)
class Reading:
    """What a picture shows: the family, its parts from left to right, a clock's hour (0: unreadable), the penguin's
    garments (a colour, "none" or "unclear")."""

    family: str
    parts: list[Part] = field(default_factory=list)
    hour: int = 0
    garments: dict[str, str] = field(default_factory=dict)


def read(picture: np.ndarray) -> Reading:
    """picture [256, 256, 3] uint8. The family is "penguins" if there is a penguin's face, "clocks" if a part has a dial,
    else "blocks"; "unclear" if there is something else beside the penguin or the clock. Raises ValueError for another shape.
    """
    if picture.shape != (render.SIZE, render.SIZE, 3) or picture.dtype != np.uint8:
        raise ValueError(f"got a {picture.dtype} picture {list(picture.shape)}, expected uint8 [256, 256, 3]")
    kinds, edges = _classify(picture)
    place = _find_penguin(kinds)
    if place is not None:
        return _read_penguin(edges, *place)
    parts = []
    for label in range(len(COLOURS)):
        found, count = ndimage.label(edges == label)
        for i, box in enumerate(ndimage.find_objects(found)[:count], 1):
            mask = found[box] == i
            if mask.sum() >= _DEBRIS:
                parts.append((COLOURS[label], mask, box))
    parts.sort(key=lambda part: part[2][1].start)
    for colour, mask, box in parts:
        hole = ndimage.binary_fill_holes(mask) & ~mask
        if hole.sum() > 0.5 * np.pi * render.DIAL**2:
            alone = len(parts) == 1
            return _read_clock(kinds, colour, mask, hole, box) if alone else Reading(UNCLEAR)
    return Reading("blocks", [_block(picture, colour, mask, box) for colour, mask, box in parts])


def check(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Every attribute that the scene's captions name, and whether the picture has it. The scene is exact if all are."""
    return compare(read(picture), scene)


def compare(seen: Reading, scene: Scene) -> dict[str, bool]:
    """`check` of a picture already read."""
    right = {"family": seen.family == scene.family}
    if scene.family == "penguins":
        worn = dict(scene.garments)
        return right | {name: seen.garments.get(name) == worn.get(name, "none") for name in GARMENTS}
    parts = seen.parts
    if scene.family == "clocks":
        block = scene.blocks[0]
        right["colour"] = bool(parts) and parts[0].colour == block.colour
        right["shape"] = bool(parts) and parts[0].shape == block.shape
        return right | ({"hour": seen.hour == scene.hour} if scene.hour else {})
    if scene.arrangement in ("on_top", "tower"):
        parts = sorted(parts, key=lambda part: part.top)
    wanted = scene.blocks * scene.count if scene.arrangement == "group" else scene.blocks
    right["count"] = len(parts) == len(wanted)
    right["arrangement"] = _arranged(parts, scene.arrangement)
    for i, block in enumerate(scene.blocks):
        mine = parts if scene.arrangement == "group" else parts[i : i + 1]
        name = f" {i + 1}" if len(scene.blocks) > 1 else ""
        right[f"colour{name}"] = bool(mine) and all(part.colour == block.colour for part in mine)
        right[f"shape{name}"] = bool(mine) and all(part.shape == block.shape for part in mine)
    if scene.arrangement == "group":
        right["size"] = bool(parts) and all((part.side < _SMALL_SIDE) == scene.small for part in parts)
    return right


def _arranged(parts: list[Part], arrangement: str) -> bool:
    """Side by side: no part over or under another. Stacked: each rests on the next, within a cell, and not beside it."""
    pairs = list(pairwise(parts))
    if arrangement in ("on_top", "tower"):
        return all(
            abs(upper.bottom - lower.top) <= render.CELL and abs(upper.middle[1] - lower.middle[1]) <= 2 * render.CELL
            for upper, lower in pairs
        )
    level = arrangement != "group" or all(abs(a.middle[0] - b.middle[0]) <= render.CELL for a, b in pairs)
    return level and all(a.right <= b.left + 2 for a, b in pairs)


def _classify(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class of every pixel's colour [256, 256], and the same with soft edges given to the nearest plain area."""
    x = picture.astype(np.float32)
    ground = np.median(np.concatenate([x[:4].reshape(-1, 3), x[-4:].reshape(-1, 3), x[:, :4].reshape(-1, 3)]), axis=0)
    table, classes = _palette()
    table = np.concatenate([table, ground[None]])
    distance = (table**2).sum(1) - 2 * x @ table.T  # [256, 256, n], but for |x|^2
    kinds = np.append(classes, _GROUND)[distance.argmin(2)].astype(np.int8)
    kinds[(np.abs(x - ground) <= 26).all(2)] = _GROUND
    plain = (ndimage.maximum_filter(kinds, 3) == kinds) & (ndimage.minimum_filter(kinds, 3) == kinds)
    nearest = ndimage.distance_transform_edt(~plain, return_distances=False, return_indices=True)
    edges = kinds[tuple(nearest)]
    # A star's tips are too thin to have a plain pixel: what is nearer to the closest part's colour than to the ground's
    # belongs to the part.
    near, nearest = ndimage.distance_transform_edt(~(plain & (kinds != _GROUND)), return_indices=True)
    towards = x[tuple(nearest)] - ground
    mixed = ((x - ground) * towards).sum(2) > 0.5 * (towards**2).sum(2)
    tips = mixed & ~plain & (edges == _GROUND) & (near <= 2 * render.CELL)
    return kinds, np.where(tips, kinds[tuple(nearest)], edges)


@cache
def _palette() -> tuple[np.ndarray, np.ndarray]:
    rows = [np.minimum(np.array(render.PALETTE[name]) * shade, 255) for name in COLOURS for shade in render.SHADES]
    classes = [i for i in range(len(COLOURS)) for _ in render.SHADES]
    fixed = [render.FIXED[name] for name in ("black", "paper", "beak")]
    return np.array([*rows, *fixed], np.float32), np.array([*classes, _BLACK, _PAPER, _BEAK])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks of one size."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def _stretched(mask: np.ndarray, side: int = 64) -> np.ndarray:
    """A mask's own box, scaled to [side, side] by nearest neighbour."""
    rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
    y = rows[0] + ((np.arange(side) + 0.5) * (rows[-1] + 1 - rows[0]) / side).astype(int)
    x = columns[0] + ((np.arange(side) + 0.5) * (columns[-1] + 1 - columns[0]) / side).astype(int)
    return mask[y[:, None], x[None]]


@cache
def _outlines(family: str) -> list[tuple[str, float, np.ndarray]]:
    """Every shape's name, height over width, and outline stretched to a square."""
    found = []
    if family == "clocks":
        drawn = [(shape, render.clock_sprite(shape, 96, 12)[:1]) for shape in CLOCK_SHAPES]
    else:  # a cube's depth depends on its size
        sizes = {shape: (5, 8, 10, 12) if shape == "cube" else (12,) for shape in BLOCK_SHAPES}
        drawn = [(shape, render.block_sprite(shape, size)) for shape in BLOCK_SHAPES for size in sizes[shape]]
    for shape, layers in drawn:
        mask = np.max([layer.mask for layer in layers], axis=0) > 0.5
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        found.append((shape, rows / columns, _stretched(mask)))
    return found


def _shape(mask: np.ndarray, family: str) -> str:
    """The shape whose outline overlaps most, or "unclear"."""
    tall, mine = mask.shape[0] / mask.shape[1], _stretched(mask)
    fitting = [
        (_overlap(mine, outline), name) for name, ratio, outline in _outlines(family) if 0.85 < tall / ratio < 1.18
    ]
    best, shape = max(fitting, default=(0.0, UNCLEAR))
    return shape if best >= _LEAST_OVERLAP else UNCLEAR


def _block(picture: np.ndarray, colour: str, mask: np.ndarray, box: tuple[slice, slice]) -> Part:
    shape = _shape(mask, "blocks")
    if shape in ("cube", "square"):
        # Outlines of a cube and a square differ by two small corners; a cube's right side is darker than its front too.
        bright = picture[box].astype(np.float32).sum(2)
        height, width = mask.shape
        middle = slice(height * 2 // 5, height * 3 // 5)
        front, side = (
            float(np.median(bright[middle, x])) for x in (slice(width // 4, width // 2), slice(-width // 10 - 1, -2))
        )
        if (side < 0.93 * front) != (shape == "cube"):
            shape = UNCLEAR
    return Part(colour, shape, box[0].start, box[1].start, box[0].stop, box[1].stop)


@cache
def _hands() -> np.ndarray:
    """[12, 84, 84]: where a dial is dark at each hour."""
    middle, r = render.CLOCK_EXTENT * render.CELL // 2, render.DIAL
    span = slice(middle - r, middle + r)
    dark = [
        np.max([layer.mask[span, span] for layer in render.clock_sprite("circle", 96, h)[2:]], axis=0)
        for h in range(1, 13)
    ]
    return np.array(dark) > 0.5


def _read_clock(
    kinds: np.ndarray, colour: str, mask: np.ndarray, hole: np.ndarray, box: tuple[slice, slice]
) -> Reading:
    body = Part(colour, _shape(mask | hole, "clocks"), box[0].start, box[1].start, box[0].stop, box[1].stop)
    y, x = (round(float(v)) for v in ndimage.center_of_mass(hole))
    y, x, r = y + box[0].start, x + box[1].start, render.DIAL
    best, hour = 0.0, 0
    for dy in range(-2, 4):
        for dx in range(-2, 4):
            top, left = y + dy - r, x + dx - r
            if min(top, left) < 0:
                continue
            dark = kinds[top : top + 2 * r, left : left + 2 * r] == _BLACK
            if dark.shape != (2 * r, 2 * r):
                continue
            overlap = (dark & _hands()).sum((1, 2)) / (dark | _hands()).sum((1, 2))
            if overlap.max() > best:
                best, hour = float(overlap.max()), int(overlap.argmax()) + 1
    return Reading("clocks", [body], hour if best >= 0.55 else 0)


@cache
def _face() -> tuple[np.ndarray, np.ndarray]:
    """The penguin's face below a hat: which px of rows 44 to 92, columns 40 to 120 count, and their classes."""
    layers = render.penguin_sprite(())
    kinds = np.full(layers[0].mask.shape, -1)
    for layer in layers:
        kinds[layer.mask > 0.5] = {"black": _BLACK, "paper": _PAPER, "beak": _BEAK}[layer.paint]
    sure = (ndimage.maximum_filter(kinds, 5) == kinds) & (ndimage.minimum_filter(kinds, 5) == kinds)  # 2 px from edges
    return sure[44:92, 40:120], kinds[44:92, 40:120]


def _like(kinds: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Equal classes; orange passes for a beak, and a white background for paper."""
    return (
        (kinds == wanted)
        | ((wanted == _BEAK) & (kinds == COLOURS.index("orange")))
        | ((wanted == _PAPER) & (kinds == _GROUND))
    )


def _find_penguin(kinds: np.ndarray) -> tuple[int, int] | None:
    """Top and left in px of the penguin whose face fits best; None if none fits."""
    sure, wanted = _face()
    best, place = 0.0, None
    step = render.CELL // 2
    for top in range(0, render.SIZE - render.PENGUIN_HEIGHT * render.CELL + 1, step):
        for left in range(0, render.SIZE - render.PENGUIN_WIDTH * render.CELL + 1, step):
            y, x = top + 44, left + 40
            if kinds[y + 2, x + 40] != _BLACK:  # between the eyes, above
                continue
            seen = kinds[y : y + 48, x : x + 80]
            share = float((_like(seen, wanted) & sure).sum() / sure.sum())
            if share > best:
                best, place = share, (top, left)
    return place if best >= 0.85 else None


@cache
def _places() -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
    """The px of each garment that nothing else covers, one mask a piece; and everything that a penguin may cover."""
    layers = render.penguin_sprite(GARMENTS)
    top = np.full(layers[0].mask.shape, -1)
    for i, layer in enumerate(layers):
        top[layer.mask > 0.5] = i
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in GARMENTS}
    for i, layer in enumerate(layers):
        if layer.paint in pieces:
            pieces[layer.paint].append(ndimage.binary_erosion(top == i, iterations=3))
    everything = ndimage.binary_dilation(top >= 0, iterations=4)
    return pieces, everything


def _read_penguin(kinds: np.ndarray, top: int, left: int) -> Reading:
    pieces, everything = _places()
    height, width = everything.shape
    seen = kinds[top : top + height, left : left + width]
    garments = {}
    for name, masks in pieces.items():
        found = {_worn(seen[mask]) for mask in masks}
        garments[name] = found.pop() if len(found) == 1 else UNCLEAR
    elsewhere = kinds != _GROUND
    elsewhere[top : top + height, left : left + width] &= ~everything
    return Reading("penguins" if elsewhere.sum() <= _DEBRIS else UNCLEAR, garments=garments)


def _worn(kinds: np.ndarray) -> str:
    """The colour of four fifths of these px, "none" if a fifth at most has any, else "unclear"."""
    share = np.bincount(kinds, minlength=_GROUND + 1) / len(kinds)
    if share[: len(COLOURS)].sum() <= 0.2:
        return "none"
    best = int(share[: len(COLOURS)].argmax())
    return COLOURS[best] if share[best] >= 0.8 else UNCLEAR
