"""Pictures that are nearly right: what CLIP learns to rank below right ones (train_clip.py)."""

from __future__ import annotations

from functools import cache

import numpy as np

from . import checker, render
from .grammar import Scene

TRIES = 16  # of damaging a picture so that the checker sees it


def splice(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`a` with a band or a block of cells from `b` across its middle."""
    mixed = a.copy()
    y, x = (render.CELL * int(v) for v in rng.integers(6, 20, 2))
    height, width = (render.CELL * int(v) for v in rng.integers(3, 12, 2))
    if rng.random() < 0.5:
        mixed[y:] = b[y:]
    else:
        mixed[y : y + height, x : x + width] = b[y : y + height, x : x + width]
    return mixed


def stretch(a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`a` with one or two rows (or columns) of cells too many or too few in its middle: all it shows has wrong proportions."""
    axis, count, more = int(rng.integers(2)), render.CELL * int(rng.integers(1, 3)), rng.random() < 0.5
    at = render.CELL * int(rng.integers(9, 23))
    head, tail = np.split(a, [at], axis)
    if more:
        band, tail = np.take(head, range(at - count, at), axis), np.split(tail, [tail.shape[axis] - count], axis)[0]
    else:
        band, tail = np.repeat(np.take(a, [-1], axis), count, axis), np.split(tail, [count], axis)[1]
    return np.concatenate([head, band, tail] if more else [head, tail, band], axis)


@cache
def bent_sprite(shape: str, cells: int, axis: int, at: int, by: int) -> tuple[render.Layer, ...]:
    """A block with `by` rows (axis 0) or columns of cells too many at cell `at`, or -by missing from there on."""
    size, by = render.CELL * at, render.CELL * by

    def bent(mask: np.ndarray) -> np.ndarray:
        head, tail = np.split(mask, [size], axis)
        if by < 0:
            return np.concatenate([head, np.split(tail, [-by], axis)[1]], axis)
        return np.concatenate([head, np.repeat(np.take(mask, [size], axis), by, axis), tail], axis)

    return tuple(layer._replace(mask=bent(layer.mask)) for layer in render.block_sprite(shape, cells))


def bend(scene: Scene, layout: render.Layout, rng: np.random.Generator) -> np.ndarray:
    """A scene of blocks with one of them one or two cells too high, low, wide or narrow, which is what a transformer gets wrong
    most often: no square ends by itself. What it carries stays on it."""
    background, placed = layout
    i, axis, by = int(rng.integers(len(placed))), int(rng.integers(2)), int(rng.choice([-2, -1, 1, 2]))
    cells = len(placed[i].sprite[0].mask) // render.CELL
    piece = scene.blocks[min(i, len(scene.blocks) - 1)]
    bent = placed[i]._replace(sprite=bent_sprite(piece.shape, cells, axis, int(rng.integers(2, cells - 2)), by))
    placed = [*placed[:i], bent, *placed[i + 1 :]]
    if scene.arrangement in ("on_top", "tower") and axis == 0:
        last = min(i + 1, len(placed) - 1)  # the lowest block grows downwards, others push up what they carry
        placed = [part._replace(row=part.row - by) if j < last else part for j, part in enumerate(placed)]
    return render.finish(background, placed, rng)


def shifted(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`picture` moved by up to four cells each way, where nothing but background leaves it (and comes back opposite)."""
    for axis in range(2):
        by = 2 * render.CELL * int(rng.integers(-2, 3))
        leaving = np.take(picture, range(-by, 0) if by > 0 else range(-by), axis)
        if by and np.ptp(leaving.reshape(-1, 3), axis=0).max() <= 24:
            picture = np.roll(picture, by, axis)
    return picture


def damage(
    scene: Scene, layout: render.Layout, picture: np.ndarray, other: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The scene with a bent block, or `picture` stretched or spliced with `other`, which differs in one attribute: a picture
    that the checker refuses, for damage can miss all that a caption speaks of. Where no try spoils it, as with a clock whose
    time is not asked, it is `other`."""
    for _ in range(TRIES):
        kind = rng.random()
        if kind < 0.5 and scene.family == "blocks":
            spoilt = bend(scene, layout, rng)
        else:
            spoilt = stretch(picture, rng) if kind < 0.8 else splice(picture, other, rng)
        if not all(checker.check(spoilt, scene).values()):
            return spoilt
    return other
