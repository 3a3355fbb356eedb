"""Draws a `Scene` as a 256x256 picture, antialiased, deterministic from a seed.

Everything stands on a grid of 8 px, the cell of an f=8 image tokenizer: positions jitter by whole cells, so that a part
looks the same to the tokenizer wherever it stands, and a plain area is one token repeated. Sizes, shades and
backgrounds vary too. Sprites (stacks of antialiased masks) are drawn once, eight times too large, and cached; a scene
then takes about a millisecond.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .grammar import Scene

SIZE, CELL = 256, 8
PALETTE = {
    "red": (218, 38, 38),
    "orange": (245, 132, 24),
    "yellow": (246, 212, 48),
    "green": (48, 162, 68),
    "blue": (42, 92, 216),
    "purple": (128, 58, 172),
    "pink": (244, 140, 186),
    "brown": (122, 76, 40),
}
BACKGROUNDS = {
    "white": (244, 244, 240),
    "grey": (206, 210, 214),
    "cream": (250, 238, 206),
    "sky": (200, 226, 246),
    "mint": (206, 238, 216),
    "lilac": (226, 214, 242),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
FIXED = {"black": (34, 34, 40), "paper": (255, 255, 255), "beak": (240, 150, 20)}
SHADES = (0.82, 1.0, 1.1)  # the jitter of an object's colour
CUBE_FACES = dict(zip(("side", "front", "top"), SHADES, strict=True))  # no shade of its own: see steady_codes.py
_OVERSAMPLE = 8


class Layer(NamedTuple):
    """One antialiased mask [h, w] in 0..1 and its paint: a garment or "fill" takes a palette colour, others are FIXED."""

    mask: np.ndarray
    paint: str
    shade: float = 1.0


class Placed(NamedTuple):
    """A sprite at a cell, with the palette colour of each paint and one brightness factor."""

    sprite: tuple[Layer, ...]
    row: int
    column: int
    colours: dict[str, str]
    shade: float


Layout = tuple[str, list[Placed]]  # a background and the parts on it


def _mask(width: int, height: int, kind: str, points) -> np.ndarray:
    big = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    draw = ImageDraw.Draw(big)
    if kind == "ellipse":
        x, y, rx, ry = points
        s = _OVERSAMPLE
        draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s - 1, (y + ry) * s - 1), fill=255)
    else:
        draw.polygon([(x * _OVERSAMPLE - 0.5, y * _OVERSAMPLE - 0.5) for x, y in points], fill=255)
    return np.asarray(big.resize((width, height), Image.Resampling.BOX), np.float32) / 255


def _rectangle(width: int, height: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((height, width), np.float32)
    mask[y0:y1, x0:x1] = 1
    return mask


def _regular(cx: float, cy: float, radius: float, corners: int, turn: float = 0.0, inner: float = 1.0):
    points = []
    for i in range(corners):
        angle = 2 * math.pi * i / corners - math.pi / 2 + turn
        r = radius * (inner if i % 2 else 1.0)
        points.append((cx + r * math.cos(angle), cy + r * math.sin(angle)))
    return points


def polygon_sprite(cells: int, corners) -> tuple[Layer, ...]:
    """One polygon, its corners in px, in a square of `cells` x `cells` cells. Not cached."""
    return (Layer(_mask(cells * CELL, cells * CELL, "polygon", corners), "fill"),)


STAR_TIPS, STAR_DENTS = 0.54, 0.243  # distances from a block star's centre, in its sizes


def star_corners(size: float, tips: float = STAR_TIPS, dents: float = STAR_DENTS):
    """Ten corners of a star in a square of `size` px, from the top clockwise; distances from its centre in sizes."""
    return _regular(size / 2, size * 0.53, size * tips, 10, inner=dents / tips)


@cache
def block_sprite(shape: str, cells: int) -> tuple[Layer, ...]:
    """A block that fills a square of `cells` x `cells` cells."""
    n = cells * CELL
    if shape == "square":
        return (Layer(np.ones((n, n), np.float32), "fill"),)
    if shape == "circle":
        return (Layer(_mask(n, n, "ellipse", (n / 2, n / 2, n / 2, n / 2)), "fill"),)
    if shape == "triangle":
        return polygon_sprite(cells, [(n / 2, 0), (n, n), (0, n)])
    if shape == "star":
        return polygon_sprite(cells, star_corners(n))
    if shape != "cube":
        raise ValueError(f"got block shape {shape!r}, expected cube, square, circle, triangle or star")
    d = CELL * max(2, round(cells * 0.3))  # depth: the top and side faces lean by 45 degrees, cell by cell
    return (
        Layer(_mask(n, n, "polygon", [(0, d), (d, 0), (n, 0), (n - d, d)]), "fill", CUBE_FACES["top"]),
        Layer(_mask(n, n, "polygon", [(n - d, d), (n, 0), (n, n - d), (n - d, n)]), "fill", CUBE_FACES["side"]),
        Layer(_rectangle(n, n, 0, d, n - d, n), "fill", CUBE_FACES["front"]),
    )


# Body of each clock shape: width and height in cells, centre of the dial in px, outline in px around that centre.
def _clock_outline(shape: str, radius: int):
    if shape == "circle":
        return _regular(0, 0, radius, 180)
    if shape == "triangle":  # the dial sits at the centre of the inscribed circle, radius/2 above the base
        return [(0, -radius * 1.25), (radius * 1.25, radius * 0.75), (-radius * 1.25, radius * 0.75)]
    if shape == "square":
        s = CELL * round(radius * 0.85 / CELL)
        return [(-s, -s), (s, -s), (s, s), (-s, s)]
    if shape == "star":
        return _regular(0, 0, radius * 1.18, 10, inner=0.55)
    corners = {"pentagon": 5, "hexagon": 6, "octagon": 8}[shape]
    return _regular(0, 0, radius * 1.02, corners, turn=math.pi / corners if corners in (6, 8) else 0.0)


CLOCK_EXTENT = 30  # cells of the square that any clock fits in; the dial is at its centre
DIAL, HOUR_HAND, MINUTE_HAND = 42, 22, 34  # radius and lengths, px


@cache
def clock_sprite(shape: str, radius: int, hour: int) -> tuple[Layer, ...]:
    """A clock whose body is a regular outline of about `radius` px, with a white dial that shows `hour` o'clock."""
    n = CLOCK_EXTENT * CELL
    c = n / 2

    def shifted(points):
        return [(x + c, y + c) for x, y in points]

    def hand(angle: float, length: float, half_width: float):
        ux, uy = math.sin(angle), -math.cos(angle)
        return shifted(
            [
                (-ux * 4 - uy * half_width, -uy * 4 + ux * half_width),
                (ux * length - uy * half_width, uy * length + ux * half_width),
                (ux * length + uy * half_width, uy * length - ux * half_width),
                (-ux * 4 + uy * half_width, -uy * 4 - ux * half_width),
            ]
        )

    return (
        Layer(_mask(n, n, "polygon", shifted(_clock_outline(shape, radius))), "fill"),
        Layer(_mask(n, n, "ellipse", (c, c, DIAL, DIAL)), "paper"),
        Layer(_mask(n, n, "polygon", hand(0.0, MINUTE_HAND, 1.7)), "black"),
        Layer(_mask(n, n, "polygon", hand(math.tau * hour / 12, HOUR_HAND, 4.0)), "black"),
        Layer(_mask(n, n, "ellipse", (c, c, 5, 5)), "black"),
    )


PENGUIN_WIDTH, PENGUIN_HEIGHT = 20, 27  # cells


@cache
def penguin_sprite(garments: tuple[str, ...]) -> tuple[Layer, ...]:
    """A penguin that wears `garments`, each painted with the paint of its own name."""
    w, h = PENGUIN_WIDTH * CELL, PENGUIN_HEIGHT * CELL

    def ellipse(x, y, rx, ry):
        return _mask(w, h, "ellipse", (x, y, rx, ry))

    body = ellipse(80, 136, 56, 72)
    belly = ellipse(80, 140, 38, 58)
    layers = [
        Layer(ellipse(58, 206, 22, 9), "beak"),
        Layer(ellipse(102, 206, 22, 9), "beak"),
        Layer(body, "black"),
        Layer(belly, "paper"),
    ]
    if "shirt" in garments:
        layers.append(Layer(body * _rectangle(w, h, 0, 96, w, 152), "shirt"))
    if "pants" in garments:
        layers.append(Layer(body * _rectangle(w, h, 0, 152, w, h), "pants"))
    for side in (-1, 1):
        x = 80 + 58 * side
        layers.append(
            Layer(
                _mask(
                    w,
                    h,
                    "polygon",
                    [
                        (80 + 34 * side, 84),
                        (80 + 52 * side, 92),
                        (x + 14 * side, 144),
                        (x + 2 * side, 150),
                        (80 + 46 * side, 130),
                    ],
                ),
                "black",
            )
        )
        if "gloves" in garments:
            layers += [
                Layer(ellipse(80 + 62 * side, 150, 18, 18), "black"),
                Layer(ellipse(80 + 62 * side, 150, 14, 14), "gloves"),
            ]
    layers += [
        Layer(ellipse(80, 60, 38, 38), "black"),
        Layer(ellipse(66, 62, 14, 17), "paper"),
        Layer(ellipse(94, 62, 14, 17), "paper"),
        Layer(ellipse(68, 58, 4.5, 4.5), "black"),
        Layer(ellipse(92, 58, 4.5, 4.5), "black"),
        Layer(_mask(w, h, "polygon", [(70, 68), (90, 68), (80, 82)]), "beak"),
    ]
    if "hat" in garments:
        layers += [Layer(_rectangle(w, h, 56, 0, 104, 32), "hat"), Layer(_rectangle(w, h, 40, 32, 120, 40), "hat")]
    return tuple(layers)


def layout(scene: Scene, rng: np.random.Generator) -> Layout:
    """Choose the background and the place, size and shade of every part. Cells, rows first."""

    def between(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    background = BACKGROUND_NAMES[between(0, len(BACKGROUND_NAMES) - 1)]
    shades = [SHADES[between(0, len(SHADES) - 1)] for _ in range(3)]
    if scene.family == "clocks":
        hour = scene.hour or between(1, 12)
        sprite = clock_sprite(scene.blocks[0].shape, (80, 96)[between(0, 1)], hour)
        return background, [Placed(sprite, between(0, 2), between(0, 2), {"fill": scene.blocks[0].colour}, shades[0])]
    if scene.family == "penguins":
        sprite = penguin_sprite(tuple(garment for garment, _ in scene.garments))
        return background, [Placed(sprite, between(1, 4), between(2, 10), dict(scene.garments), shades[0])]

    def block(index: int, cells: int, row: int, column: int) -> Placed:
        piece = scene.blocks[index]
        shade = 1.0 if piece.shape == "cube" else shades[index]
        return Placed(block_sprite(piece.shape, cells), row, column, {"fill": piece.colour}, shade)

    def even(low: int, high: int) -> int:
        """Of even numbers. Blocks stand on every second cell, and most have an even side: a square is plain, so nothing
        but a count of cells tells a transformer where it ends."""
        return 2 * between(low // 2, high // 2)

    if scene.arrangement == "left_of":
        a, b = (8, 10)[between(0, 1)], (8, 10)[between(0, 1)]
        return background, [
            block(0, a, even(8, 14), even(2, 14 - a)),
            block(1, b, even(8, 14), even(18, 30 - b)),
        ]
    if scene.arrangement == "on_top":
        a, b = (8, 12)[between(0, 1)], (8, 12)[between(0, 1)]
        row, left = even(2, 6), even(6, 14)
        return background, [block(0, a, row, left + 6 - a // 2), block(1, b, row + a, left + 6 - b // 2)]
    if scene.arrangement == "tower":
        size = (6, 8)[between(0, 1)]
        row, column = even(2, 6), even(8, 16)
        return background, [block(i, size, row + i * size, column) for i in range(3)]
    size = 5 if scene.small else {1: (8, 10, 12)[between(0, 2)], 2: (8, 10)[between(0, 1)], 3: 8}[scene.count]
    gap = 2 * between(0, 1) + 1 if size == 5 and scene.count < 4 else 2 - size % 2
    width = scene.count * size + (scene.count - 1) * gap
    row = (32 - size) // 4 * 2 + even(-4, 4)
    column = (32 - width) // 4 * 2
    slack = min(4, column - 2)
    column += even(-slack, slack)
    return background, [block(0, size, row, column + i * (size + gap)) for i in range(scene.count)]


_crops: dict[int, tuple] = {}


def _cropped(mask: np.ndarray) -> tuple[int, int, np.ndarray]:
    """The part of a sprite's mask that covers anything: its top, left, and [h, w, 1]. Most layers cover little."""
    if id(mask) not in _crops:  # sprites are cached for good, so an id stays theirs
        rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        _crops[id(mask)] = (int(rows[0]), int(columns[0]), np.ascontiguousarray(mask[box])[:, :, None], mask)
    return _crops[id(mask)][:3]


def paint(background: str, placed: list[Placed], rng: np.random.Generator | None = None) -> np.ndarray:
    """Composite to [256, 256, 3] float32 in 0..1. With `rng`, colours also wobble by up to 1.2 %."""

    def wobble() -> np.ndarray:
        return rng.uniform(-0.012, 0.012, 3).astype(np.float32) if rng is not None else np.zeros(3, np.float32)

    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = np.asarray(BACKGROUNDS[background], np.float32) / 255 + wobble()
    for part in placed:
        y, x = part.row * CELL, part.column * CELL
        tint = {name: wobble() for name in (*part.colours, *FIXED)}
        for layer in part.sprite:
            if layer.paint in FIXED:
                rgb = np.asarray(FIXED[layer.paint], np.float32) / 255
            else:
                rgb = np.asarray(PALETTE[part.colours[layer.paint]], np.float32) / 255 * (part.shade * layer.shade)
            top, left, mask = _cropped(layer.mask)
            region = picture[y + top : y + top + mask.shape[0], x + left : x + left + mask.shape[1]]
            region += mask * (rgb + tint[layer.paint] - region)
    return picture.clip(0, 1)


def finish(background: str, placed: list[Placed], rng: np.random.Generator) -> np.ndarray:
    """`paint`, rounded: [256, 256, 3] uint8."""
    return (paint(background, placed, rng) * 255 + 0.5).astype(np.uint8)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Lay out and paint the scene: [256, 256, 3] uint8."""
    return finish(*layout(scene, rng), rng)
