"""The decode_attention op: one cell of `batch` candidates of one caption, against the shared text and their neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import work
from bench.conftest import Measure
from bench.device import BEST, DEVICE, ON_GPU, Batch
from bench.peers import flashinfer, sdpa, shared_prefix
from dalle_fast import backends, ops, reference
from dalle_fast.backends import Call
from dalle_fast.layout import SequenceLayout
from dalle_fast.masks import Mask, Pattern

# heads, head_dim, text_len: the paper's, ruDALL-E's, and one that a CPU is used for
SHAPES = {"12B": (62, 64, 256), "1.3B": (16, 128, 128)} if ON_GPU else {"512 wide": (8, 64, 256)}
BATCHES = (1, 8, 64, 171, 256, 512) if ON_GPU else (1, 8, 32)
CASES = {"row": ("row", 15), "column": ("column", 15), "conv": ("conv(kernel=11,boundary=flat)", 15)}
if ON_GPU:
    CASES |= {"column, first row": ("column", 0), "column, last row": ("column", 31)}
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
CACHES = 2**28 if ON_GPU else 2**26  # bytes: more than any cache holds


Run = Callable[[], Tensor]


class Inputs(NamedTuple):
    q: Tensor  # [B, H, 1, D], as k and v
    k: Tensor
    v: Tensor
    prefix_k: Tensor  # [1, H, T, D]
    prefix_v: Tensor
    tail_k: Tensor  # [B, H, slots, D]
    tail_v: Tensor


def inputs(mask: Mask, heads: int, dim: int, batch: int, slots: int, dtype: torch.dtype) -> Inputs:
    """Random; queries large enough that a wrong key shows."""
    text = mask.layout.text_len
    shapes = [(batch, heads, 1, dim)] * 3 + [(1, heads, text, dim)] * 2 + [(batch, heads, slots, dim)] * 2
    return Inputs(*(torch.randn(shape, device=DEVICE).mul_(1 + (i == 0)).to(dtype) for i, shape in enumerate(shapes)))


def expected(x: Inputs, mask: Mask, cell: int) -> Tensor:
    """In float64, a few candidates at a time: those of a large batch would not fit."""
    outs = []
    for first in range(0, len(x.q), 16):
        part = [y if name.startswith("prefix") else y[first : first + 16] for name, y in x._asdict().items()]
        wide = [tensor.double() for tensor in part]
        if (
            x.tail_k.shape[2] == mask.layout.cells
        ):  # here in raster order, but with a slot a cell we may lay it out otherwise
            order = torch.from_numpy(mask.decode_tables(mask.layout.cells).slot_of_cell).long().argsort()
            wide[5:] = [tail[:, :, order] for tail in wide[5:]]
        outs.append(reference.decode_attention(*wide, torch.tensor([cell]), str(mask)))
    return torch.cat(outs)


class Ours:
    def __init__(self, backend: str, mask: Mask, cell: int) -> None:
        self.backend, self.mask = backend, mask
        self.position = torch.tensor([cell], device=DEVICE)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Inputs) -> Tensor:
        with backends.use(self.backend):
            return ops.decode_attention(q, k, v, x.prefix_k, x.prefix_v, x.tail_k, x.tail_v, self.position, self.mask)


PEERS: dict[str, Callable[..., Any]] = {
    "shared prefix in PyTorch": shared_prefix.SharedPrefix,
    **{f"SDPA {b}, own text": (lambda *a, b=b: sdpa.OwnText(b, *a)) for b in ("math", "flash", "efficient", "cudnn")},
    "SDPA flash, dense cache": lambda *a: sdpa.Dense("flash", *a),
    "SDPA efficient, dense cache": lambda *a: sdpa.Dense("efficient", *a),
    "FlashInfer cascade": lambda *a: flashinfer.FlashInfer(*a, cascade=True),
    "FlashInfer paged": lambda *a: flashinfer.FlashInfer(*a, cascade=False),
}
OURS = ("cuda", "triton", "cpu", "torch")


def maker(contender: str, mask: Mask, cell: int, dtype: torch.dtype, dim: int) -> tuple[int, Callable[[Inputs], Run]]:
    """The slots of a tail that the contender keeps, and what turns inputs into a call of it. Skips the case, with the
    reason, if it cannot run here."""
    if contender.startswith("dalle_fast"):
        backend = contender.split()[1]
        if reason := why_not(backend, dtype, dim):
            pytest.skip(reason)
        slots = mask.tail_slots()
        ours = Ours(backend, mask, cell)

        def make(x: Inputs) -> Run:
            if slots == mask.layout.cells:
                order = torch.from_numpy(mask.decode_tables(slots).slot_of_cell).long().argsort().to(DEVICE)
                x = x._replace(tail_k=x.tail_k[:, :, order], tail_v=x.tail_v[:, :, order])
            return lambda: ours(x.q, x.k, x.v, x)

        return slots, make
    read = torch.from_numpy(mask.neighbours()[0][cell, : mask.neighbours()[1][cell]]).long().to(DEVICE)

    def make_peer(x: Inputs) -> Run:
        peer = PEERS[contender](x.prefix_k, x.prefix_v, x.tail_k, x.tail_v, read)
        return lambda: peer(x.q, x.k, x.v)

    return mask.layout.cells, make_peer


def why_not(backend: str, dtype: torch.dtype, dim: int) -> str | None:
    return backends.why_not(backend, Call("decode_attention", DEVICE.type, dtype, dim))


def batch_of(
    contender: str, mask: Mask, cell: int, shape: tuple[int, int, int], dtype: torch.dtype, count: int
) -> Batch:
    """`count` sets of inputs; shape: heads, head_dim, candidates."""
    heads, dim, batch = shape
    slots, make = maker(contender, mask, cell, dtype, dim)
    runs = [(make(inputs(mask, heads, dim, batch, slots, dtype)),) for _ in range(count)]
    return Batch(lambda run: run(), runs)


@lru_cache(maxsize=1)
def beside(mask: Mask, cell: int, shape: tuple[int, int, int], dtype: torch.dtype, count: int) -> tuple[str, Batch]:
    """Our first contender, which the others are measured in turns with."""
    contender = f"dalle_fast, {next(b for b in OURS if not why_not(b, dtype, shape[1]))} backend"
    return contender, batch_of(contender, mask, cell, shape, dtype, count)


def rated(values: Iterable[Any], important: tuple[Any, ...]) -> list[Any]:
    """On a GPU, where cases are many, all but these come last."""
    low = [pytest.mark.importance(5)] if ON_GPU else []
    return [pytest.param(value, marks=[] if value in important else low) for value in values]


@pytest.mark.importance(2 if ON_GPU else 3)
@pytest.mark.parametrize("contender", [*(f"dalle_fast, {b} backend" for b in OURS), *PEERS])
@pytest.mark.parametrize("batch", rated(BATCHES, (1, 64, 256)))
@pytest.mark.parametrize("case", rated(CASES, ("row",)))
@pytest.mark.parametrize("shape", rated(SHAPES, ("12B",)))
def test_decode_attention(shape: str, case: str, batch: int, contender: str, measure: Measure) -> None:
    (heads, dim, text), (pattern, row) = SHAPES[shape], CASES[case]
    name = "float32" if measure.small else BEST
    dtype = getattr(torch, name)
    title = f"The decode_attention op: {case}, {heads} heads of {dim}, text {text}"
    measure.describe(title, f"batch {batch}", contender, name)
    layout = SequenceLayout(text // 8, 8, 8) if measure.small else SequenceLayout(text, 32, 32)
    mask = Mask(Pattern.parse(pattern), layout)
    cell = min(row, layout.height - 1) * layout.width + layout.width // 2

    slots, make = maker(contender, mask, cell, dtype, dim)
    x = inputs(mask, heads, dim, batch, slots, dtype)
    measure.check(make(x)(), expected(x, mask, cell), BOUND[name])
    least = work.decode(mask, batch, heads, dim, name, cell)
    count = 2 if measure.small else max(2, min(64, math.ceil(CACHES / least.bytes)))
    timed = (mask, cell, (heads, dim, batch), dtype, count)
    batches, against = batch_of(contender, *timed), None
    if not ON_GPU:
        first, ours = beside(*timed)
        measure.facts |= {"ratio": 1.0} if contender == first else {}
        against = None if contender == first else ours.seconds
    measure(batches, work=least, passes=20, calls=count, against=against)
