"""Pictures of pieces: shapes that no caption names, in every colour.

The code of a cell on an edge says only the edge's form (steady_codes.py); its colours the decoder must find in other
cells. Scenes alone teach it that some forms, such as the tip of a star, never have the colours that are held out, and it
paints those wrong. Pieces show it every form in every colour, but no held-out scene: half of them are arbitrary polygons,
half are stars that lost all tips but one or two.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from . import render
from .grammar import COLOURS

COUNT = 4000  # different pieces
SIDES = range(5, 13)  # of the square around a piece, in cells: as of blocks
_QUARTER = 16  # cells a side of the part of a picture that holds one piece


def _polygon(rng: np.random.Generator, size: int):
    """Three to ten corners at random distances around the middle, at random or at even angles."""
    corners = int(rng.integers(3, 11))
    turns = np.sort(rng.random(corners)) if rng.random() < 0.5 else (np.arange(corners) + rng.random()) / corners
    radii = size * rng.uniform(0.25, 0.62, corners)
    return [
        (size / 2 + r * math.cos(t), size / 2 + r * math.sin(t)) for r, t in zip(radii, math.tau * turns, strict=True)
    ]


def _broken_star(rng: np.random.Generator, size: int):
    """The star of the blocks, with three or four of its tips drawn in."""
    star, drawn_in = render.star_corners(size), render.star_corners(size, tips=render.STAR_DENTS)
    for tip in rng.permutation(5)[: int(rng.integers(3, 5))]:
        star[2 * tip] = drawn_in[2 * tip]
    return star


@cache
def sprite(number: int) -> tuple[render.Layer, ...]:
    """Piece `number`, always the same. At least two of its cells are covered whole: they tell its colour."""
    rng = np.random.default_rng((number, 1280))
    while True:
        cells = int(rng.choice(SIDES))
        corners = (_polygon, _broken_star)[number % 2](rng, cells * render.CELL)
        (layer,) = render.polygon_sprite(cells, corners)
        whole = layer.mask.reshape(cells, render.CELL, cells, render.CELL).min((1, 3)) == 1
        if whole.sum() >= 2:
            return (layer,)


def layout(rng: np.random.Generator) -> render.Layout:
    """A background and one piece in each quarter of the picture, as render.layout gives them for a scene."""
    placed = []
    for row in (0, _QUARTER):
        for column in (0, _QUARTER):
            piece = sprite(int(rng.integers(COUNT)))
            down, right = (int(v) for v in rng.integers(0, _QUARTER + 1 - len(piece[0].mask) // render.CELL, 2))
            colour, shade = str(rng.choice(COLOURS)), float(rng.choice(render.SHADES))
            placed.append(render.Placed(piece, row + down, column + right, {"fill": colour}, shade))
    return str(rng.choice(render.BACKGROUND_NAMES)), placed
