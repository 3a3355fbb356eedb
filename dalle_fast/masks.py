"""Which image cells a cell may read. One predicate a pattern; everything that kernels and caches use is derived from it.

Text attends causally to text, and every image cell attends to all text, in every pattern; what differs between layers is
the image-to-image rule. Sources: the row, column and convolutional masks of Ramesh et al. 2021 (arXiv 2102.12092,
appendix B.1 and Figure 11), ruDALL-E 1.1.3 and DALLE-pytorch 1.6.6.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dalle_fast.layout import SequenceLayout

Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

WINDOWS = ("raster", "in_row")
BOUNDARIES = ("flat", "clip", "torus", "quadrant")


@dataclass(frozen=True)
class Pattern:
    """The image-to-image rule of a layer. Options that a kind does not have must keep their default.

    kind      "full" | "row" | "column" | "conv"
    window    of "row": "raster" reads the last W + 1 cells, across the row boundary (paper, ruDALL-E);
              "in_row" the cells of the same row (DALLE-pytorch's axial_row)
    kernel    of "conv": odd side of the square window
    boundary  of "conv": "flat" works on raster indices (the paper's "wraparound"), "clip" on the grid (ruDALL-E v3),
              "torus" on the grid with both axes modulo its size (ruDALL-E v2), "quadrant" looks only up and left
              (DALLE-pytorch's conv_like)
    dilation  of "conv" with boundary "quadrant": spacing of the window

    Raises ValueError for an unknown kind or option.
    """

    kind: str = "full"
    window: str = "raster"
    kernel: int = 11
    boundary: str = "flat"
    dilation: int = 1

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise ValueError(f"got pattern kind {self.kind!r}, expected one of {', '.join(RULES)}")
        if self.window not in WINDOWS:
            raise ValueError(f"got window={self.window!r}, expected one of {', '.join(WINDOWS)}")
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"got boundary={self.boundary!r}, expected one of {', '.join(BOUNDARIES)}")
        if self.kernel < 1 or (self.kernel % 2 == 0 and self.boundary != "quadrant"):
            raise ValueError(f"got kernel={self.kernel}, expected an odd number from 1")
        if self.dilation < 1:
            raise ValueError(f"got dilation={self.dilation}, expected at least 1")
        if self.dilation != 1 and self.boundary != "quadrant":
            raise ValueError(
                f"got dilation={self.dilation} with boundary={self.boundary!r}, expected boundary='quadrant'"
            )
        for name, default in _DEFAULTS.items():
            if name not in self._options and getattr(self, name) != default:
                raise ValueError(f"got {name}={getattr(self, name)!r}, which pattern kind {self.kind!r} does not have")

    @property
    def _options(self) -> tuple[str, ...]:
        if self.kind == "conv":
            return ("kernel", "boundary", "dilation") if self.boundary == "quadrant" else ("kernel", "boundary")
        return ("window",) if self.kind == "row" else ()

    def __str__(self) -> str:
        options = ",".join(f"{name}={getattr(self, name)}" for name in self._options)
        return f"{self.kind}({options})" if options else self.kind

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The inverse of str(): "column", "row(window=in_row)", "conv(kernel=11,boundary=flat)"."""
        match = re.fullmatch(r"(\w+)(?:\(([\w=,]*)\))?", text.replace(" ", ""))
        if not match:
            raise ValueError(f"got pattern {text!r}, expected KIND or KIND(OPTION=VALUE,…)")
        options: dict[str, Any] = {}
        for item in filter(None, (match[2] or "").split(",")):
            name, _, value = item.partition("=")
            if name not in _DEFAULTS:
                raise ValueError(f"got pattern option {item!r}, expected one of {', '.join(_DEFAULTS)}")
            if isinstance(_DEFAULTS[name], int) and not value.isdigit():
                raise ValueError(f"got pattern option {item!r}, expected a whole number")
            options[name] = int(value) if isinstance(_DEFAULTS[name], int) else value
        return cls(match[1], **options)


# The rules. Each says which of two *causal* cells (query >= key) may meet; q and k broadcast.


def _full(p: Pattern, h: int, w: int, q: Ints, k: Ints) -> Bools:
    return np.ones(np.broadcast(q, k).shape, dtype=bool)


def _row(p: Pattern, h: int, w: int, q: Ints, k: Ints) -> Bools:
    return np.asarray(q - k <= w if p.window == "raster" else q // w == k // w)


def _column(p: Pattern, h: int, w: int, q: Ints, k: Ints) -> Bools:
    return np.asarray((q - k) % w == 0)


def _conv(p: Pattern, h: int, w: int, q: Ints, k: Ints) -> Bools:
    radius = p.kernel // 2
    if p.boundary == "flat":  # delta = w * dr + dc for some 0 <= dr <= radius, |dc| <= radius
        delta = q - k
        return np.asarray(np.logical_or.reduce([np.abs(delta - w * dr) <= radius for dr in range(radius + 1)]))
    rows, columns = q // w - k // w, q % w - k % w
    if p.boundary == "quadrant":
        near = [(x >= 0) & (x <= (p.kernel - 1) * p.dilation) & (x % p.dilation == 0) for x in (rows, columns)]
    elif p.boundary == "torus":
        near = [np.minimum(x % side, -x % side) <= radius for x, side in ((rows, h), (columns, w))]
    else:
        near = [np.abs(x) <= radius for x in (rows, columns)]
    return np.asarray(near[0] & near[1])


RULES: dict[str, Callable[[Pattern, int, int, Ints, Ints], Bools]] = {
    "full": _full,
    "row": _row,
    "column": _column,
    "conv": _conv,
}
_DEFAULTS = {field.name: field.default for field in fields(Pattern) if field.name != "kind"}


class DecodeTables(NamedTuple):
    """What a decoding step reads. `slots[c, :counts[c]]` hold the neighbours of cell c, ascending by cell; the rest of the
    row repeats the cell's own slot, which is always written, so that a kernel may load it and mask the score."""

    slot_of_cell: NDArray[np.int32]  # [cells]
    slots: NDArray[np.int32]  # [cells, max_neighbours]
    counts: NDArray[np.int32]  # [cells]


class BlockPlan(NamedTuple):
    """The image-to-image tiles that a whole-sequence kernel visits.

    Index i of the image section stands for cell `order[i]`. Query block b visits key blocks
    `blocks[offsets[b]:offsets[b + 1]]`; entry j is free of a mask where `mask_ids[j] < 0` and otherwise uses the bits of
    `bits[mask_ids[j]]`: bit c % 32 of word [r, c // 32] is set where row r may read column c. The `key_*` lists are the
    same tiles by key block, for the backward pass: entries index `mask_ids`/`bits` through `key_entries`.
    """

    block_q: int
    block_k: int
    order: NDArray[np.int32]  # [cells]
    offsets: NDArray[np.int32]  # [query blocks + 1]
    blocks: NDArray[np.int32]  # [tiles]
    mask_ids: NDArray[np.int32]  # [tiles]
    bits: NDArray[np.int32]  # [masks, block_q, ceil(block_k / 32)]
    key_offsets: NDArray[np.int32]  # [key blocks + 1]
    key_blocks: NDArray[np.int32]  # [tiles]: the query block
    key_entries: NDArray[np.int32]  # [tiles]: the entry in blocks / mask_ids

    def tiles(self, text_len: int) -> int:
        """Tiles of the whole sequence: causal text, image against text, image against image."""
        text_q, text_k = -(-text_len // self.block_q), -(-text_len // self.block_k)
        causal = sum(min(text_k, -(-(b + 1) * self.block_q // self.block_k)) for b in range(text_q))
        return causal + (len(self.offsets) - 1) * text_k + len(self.blocks)


@dataclass(frozen=True)
class Mask:
    """A pattern on a layout. str(mask) names it in op arguments; Mask.parse reads it back."""

    pattern: Pattern
    layout: SequenceLayout

    def __str__(self) -> str:
        return self._name

    @cached_property
    def _name(self) -> str:
        return f"{self.pattern}@{self.layout}"

    @staticmethod
    def parse(text: str) -> Mask:
        """The inverse of str(): "row(window=raster)@256+32x32". Cached: the same object for the same text."""
        return _parse(text)

    def allowed(self, query_cell: Any, key_cell: Any) -> Bools:
        """Whether the query of one cell may read the key of another; the arguments broadcast."""
        q, k = np.asarray(query_cell), np.asarray(key_cell)
        layout = self.layout
        return np.asarray((q >= k) & RULES[self.pattern.kind](self.pattern, layout.height, layout.width, q, k))

    def image(self) -> Bools:
        """[cells, cells]: the image-to-image part."""
        cells = np.arange(self.layout.cells, dtype=np.int32)
        return self.allowed(cells[:, None], cells[None, :])

    def dense(self) -> Bools:
        """[total, total]: the whole sequence."""
        text, total = self.layout.text_len, self.layout.total
        mask = np.tril(np.ones((total, total), dtype=bool))
        mask[text:, text:] = self.image()
        return mask

    def neighbours(self) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """([cells, max_neighbours] int16, [cells] counts): the cells that each cell reads, ascending, itself last."""
        return _neighbours(self)

    @cached_property  # asked for at each step
    def reach(self) -> int:
        """The largest distance from a cell back to a neighbour."""
        table, _ = self.neighbours()
        return int((np.arange(len(table)) - table.min(axis=1)).max())

    def ring(self, chunk: int = 1) -> int:
        """The fewest slots that a candidate's tail can do with when `chunk` cells are appended at a time."""
        if not 1 <= chunk <= self.layout.cells:
            raise ValueError(f"got chunk={chunk}, expected 1 to {self.layout.cells}")
        return min(self.layout.cells, self.reach + chunk)

    def tail_slots(self, chunk: int = 1) -> int:
        """Slots that a tail gets: the ring, unless it would save less than a quarter; then a slot a cell, which can be
        laid out so that a step reads contiguous memory (a column's ring would be 993 of 1024 slots, 32 apart)."""
        ring = self.ring(chunk)
        return ring if 4 * ring <= 3 * self.layout.cells else self.layout.cells

    def decode_tables(self, slots: int) -> DecodeTables:
        """Tables for a tail of `slots` slots: a ring where that is fewer than the cells, otherwise a slot a cell in the
        order, raster or column-major, in which a step's reads fall into the fewest contiguous runs.

        Raises ValueError if `slots` is too few for the pattern.
        """
        return _decode_tables(self, slots)

    def block_plan(self, block_q: int, block_k: int) -> BlockPlan:
        """Tiles in the image order, raster or column-major, that needs the fewest of them (raster if equal)."""
        return _block_plan(self, block_q, block_k)


def _column_major(layout: SequenceLayout) -> NDArray[np.int32]:
    """order[i] = the cell at column-major index i."""
    return np.arange(layout.cells, dtype=np.int32).reshape(layout.height, layout.width).T.reshape(-1).copy()


@cache
def _parse(text: str) -> Mask:
    pattern, _, layout = text.rpartition("@")
    return Mask(Pattern.parse(pattern), SequenceLayout.parse(layout))


@lru_cache(maxsize=64)
def _neighbours(mask: Mask) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    allowed = mask.image()
    counts = allowed.sum(axis=1).astype(np.int16)
    width = int(counts.max())
    # A stable sort on "not allowed" puts the allowed cells first, ascending; pad with the cell itself.
    table = np.argsort(~allowed, axis=1, kind="stable")[:, :width]
    own = np.arange(len(table))[:, None]
    table = np.where(np.arange(width) < counts[:, None], table, own).astype(np.int16)
    return np.asarray(table, dtype=np.int16), np.asarray(counts, dtype=np.int16)


@lru_cache(maxsize=64)
def _decode_tables(mask: Mask, slots: int) -> DecodeTables:
    cells = mask.layout.cells
    if not mask.ring() <= slots <= cells:
        raise ValueError(f"got a tail of {slots} slots for {mask}, expected {mask.ring()} to {cells}")
    table, counts = mask.neighbours()
    raster = np.arange(cells, dtype=np.int32)
    if slots < cells:
        slot_of_cell = raster % np.int32(slots)
    else:
        transposed = np.argsort(_column_major(mask.layout)).astype(np.int32)
        slot_of_cell = min((raster, transposed), key=lambda order: _runs(order[table], counts))
    return DecodeTables(slot_of_cell, slot_of_cell[table], counts.astype(np.int32))


def _runs(slots: NDArray[np.int32], counts: Ints) -> int:
    """How many contiguous runs the reads of all cells fall into."""
    real = np.arange(1, slots.shape[1]) < counts[:, None]
    return int(((np.diff(slots, axis=1) != 1) & real).sum())


@lru_cache(maxsize=64)
def _block_plan(mask: Mask, block_q: int, block_k: int) -> BlockPlan:
    if min(block_q, block_k) < 1:
        raise ValueError(f"got blocks of {block_q}x{block_k}, expected at least 1x1")
    orders = (np.arange(mask.layout.cells, dtype=np.int32), _column_major(mask.layout))
    return min((_plan_in(mask, order, block_q, block_k) for order in orders), key=lambda plan: len(plan.blocks))


def _plan_in(mask: Mask, order: NDArray[np.int32], block_q: int, block_k: int) -> BlockPlan:
    cells = len(order)
    n_q, n_k, words = -(-cells // block_q), -(-cells // block_k), -(-block_k // 32)
    allowed = np.zeros((n_q * block_q, n_k * block_k), dtype=bool)  # beyond the last cell: never allowed
    allowed[:cells, :cells] = mask.image()[np.ix_(order, order)]
    tiles = allowed.reshape(n_q, block_q, n_k, block_k).transpose(0, 2, 1, 3)  # [n_q, n_k, block_q, block_k]
    query, key = np.nonzero(tiles.any(axis=(2, 3)))
    live = tiles[query, key]  # [tiles, block_q, block_k]
    padded = np.zeros((len(live), block_q, words * 32), dtype=bool)
    padded[:, :, :block_k] = live
    packed = np.packbits(padded, axis=2, bitorder="little").view("<i4")  # [tiles, block_q, words]
    partial = ~live.all(axis=(1, 2))
    mask_ids = np.full(len(live), -1, dtype=np.int32)
    bits = np.zeros((0, block_q, words), dtype=np.int32)
    if partial.any():  # equal masks are stored once
        bits, ids = np.unique(packed[partial], axis=0, return_inverse=True)
        mask_ids[partial] = ids.reshape(-1)
    by_key = np.lexsort((query, key))

    def offsets(blocks: Ints, count: int) -> NDArray[np.int32]:
        return np.concatenate([[0], np.cumsum(np.bincount(blocks, minlength=count))]).astype(np.int32)

    return BlockPlan(
        block_q,
        block_k,
        order,
        offsets(query, n_q),
        key.astype(np.int32),
        mask_ids,
        np.ascontiguousarray(bits, dtype=np.int32),
        offsets(key, n_k),
        query[by_key].astype(np.int32),
        by_key.astype(np.int32),
    )
