"""Tile sizes, a literal table: (architecture, op, head dim) -> tile.

Entries with `microseconds` are the fastest of those tried on an H100 (bench/results): of sparse_attention a row layer at batch
8 of the 12B or 1.3B preset, of its backward pass likewise. There one stage was two to three times as fast as two or three:
rows gathered through a table are pipelined at a loss. All others are predictions from that and from register and shared-memory
budgets. Every one is compiled ahead of time in the tests, where a spilled register or a tile that does not fit fails.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """block_q x block_k elements of the score matrix a step; in decode_attention block_q counts rows (candidates x cells),
    block_k prefix keys, and `near` tail keys a row; in sample block_q is unused."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    near: int = 0
    microseconds: float | None = None  # None: not measured


# 64 x 64 and not 128 x 128: at 256 + 32x32 a raster row then keeps 2.00 instead of 1.62 times fewer tiles than dense causal.
TABLE: dict[tuple[str, str, int], Tile] = {
    ("sm_80", "sparse_attention", 64): Tile(64, 64, 4, 1),
    ("sm_80", "sparse_attention", 128): Tile(64, 64, 4, 1),
    ("sm_80", "sparse_attention_backward", 64): Tile(64, 64, 8, 2),
    ("sm_80", "sparse_attention_backward", 128): Tile(64, 32, 4, 1),
    ("sm_80", "decode_attention", 64): Tile(16, 64, 8, 2, 8),
    ("sm_80", "decode_attention", 128): Tile(16, 64, 8, 2, 4),
    ("sm_80", "sample", 0): Tile(0, 0, 16, 1),
    ("sm_90", "sparse_attention", 64): Tile(64, 64, 4, 1, microseconds=249.0),
    ("sm_90", "sparse_attention", 128): Tile(64, 32, 4, 1, microseconds=95.8),
    ("sm_90", "sparse_attention_backward", 64): Tile(64, 64, 4, 1, microseconds=823.8),
    ("sm_90", "sparse_attention_backward", 128): Tile(64, 32, 4, 1, microseconds=391.7),
    ("sm_90", "decode_attention", 64): Tile(16, 64, 8, 2, 8),
    ("sm_90", "decode_attention", 128): Tile(16, 64, 8, 2, 4),
    ("sm_90", "sample", 0): Tile(0, 0, 8, 1),
    ("sm_100", "sparse_attention", 64): Tile(64, 64, 4, 1),
    ("sm_100", "sparse_attention", 128): Tile(64, 64, 8, 1),
    ("sm_100", "sparse_attention_backward", 64): Tile(64, 64, 8, 1),
    ("sm_100", "sparse_attention_backward", 128): Tile(64, 32, 4, 1),
    ("sm_100", "decode_attention", 64): Tile(16, 64, 8, 2, 8),
    ("sm_100", "decode_attention", 128): Tile(16, 64, 8, 2, 4),
    ("sm_100", "sample", 0): Tile(0, 0, 8, 1),
    ("gfx942", "sparse_attention", 64): Tile(64, 32, 4, 1),
    ("gfx942", "sparse_attention", 128): Tile(64, 32, 4, 1),
    ("gfx942", "sparse_attention_backward", 64): Tile(32, 32, 4, 1),
    ("gfx942", "sparse_attention_backward", 128): Tile(32, 32, 4, 1),
    ("gfx942", "decode_attention", 64): Tile(16, 64, 4, 1, 4),
    ("gfx942", "decode_attention", 128): Tile(16, 32, 4, 1, 2),
    ("gfx942", "sample", 0): Tile(0, 0, 8, 1),
}

INTERPRETER = Tile(32, 32, 4, 1, 16)  # on a CPU, for tests
HEAD_DIMS = (16, 32, 64, 128)


def tile(arch: str, op: str, head_dim: int = 0) -> Tile:
    """The tile for a device. Newer devices of a maker take the newest known; head dims below 64 take 64's.

    Raises KeyError for a maker that the table does not know.
    """
    if arch == "interpreter":
        return INTERPRETER
    known = {key[0] for key in TABLE}
    if arch not in known:
        family = [x for x in known if x[:2] == arch[:2]]
        version = int("".join(filter(str.isdigit, arch)) or 0)
        older = [x for x in family if not x.startswith("sm_") or int(x[3:]) <= version]
        if not older:
            raise KeyError(f"got architecture {arch}, expected one of {', '.join(sorted(known))}")
        arch = max(older, key=lambda x: int("".join(filter(str.isdigit, x))))
    return TABLE[arch, op, 0 if op == "sample" else max(64, head_dim)]
