"""The decode_attention op: one cell of `batch` candidates of one caption, against the shared text and their neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import work
from bench.conftest import Measure
from bench.device import DEVICE, ON_GPU, Batch
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
    wide = [tensor.double().cpu() for tensor in x]
    if (
        x.tail_k.shape[2] == mask.layout.cells
    ):  # here in raster order, but with a slot a cell we may lay it out otherwise
        order = torch.from_numpy(mask.decode_tables(mask.layout.cells).slot_of_cell).long().argsort()
        wide[5:] = [tail[:, :, order] for tail in wide[5:]]
    return reference.decode_attention(*wide, torch.tensor([cell]), str(mask))


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


@pytest.mark.importance(3)
@pytest.mark.parametrize("contender", [*(f"dalle_fast, {b} backend" for b in OURS), *PEERS])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(shape: str, case: str, batch: int, contender: str, measure: Measure) -> None:
    (heads, dim, text), (pattern, row) = SHAPES[shape], CASES[case]
    dtype = torch.bfloat16 if not measure.small else torch.float32
    name = str(dtype).removeprefix("torch.")
    title = f"The decode_attention op: {case}, {heads} heads of {dim}, text {text}"
    measure.describe(title, f"batch {batch}", contender, name)
    layout = SequenceLayout(text // 8, 8, 8) if measure.small else SequenceLayout(text, 32, 32)
    mask = Mask(Pattern.parse(pattern), layout)
    cell = min(row, layout.height - 1) * layout.width + layout.width // 2

    if contender.startswith("dalle_fast"):
        backend = contender.split()[1]
        if reason := backends.why_not(backend, Call("decode_attention", DEVICE.type, dtype, dim)):
            pytest.skip(reason)
        slots = mask.tail_slots()
        ours = Ours(backend, mask, cell)

        def make(x: Inputs) -> Callable[[], Tensor]:
            if slots == layout.cells:
                order = torch.from_numpy(mask.decode_tables(slots).slot_of_cell).long().argsort().to(DEVICE)
                x = x._replace(tail_k=x.tail_k[:, :, order], tail_v=x.tail_v[:, :, order])
            return lambda: ours(x.q, x.k, x.v, x)
    else:
        slots = layout.cells
        read = torch.from_numpy(mask.neighbours()[0][cell, : mask.neighbours()[1][cell]]).long().to(DEVICE)

        def make(x: Inputs) -> Callable[[], Tensor]:
            peer = PEERS[contender](x.prefix_k, x.prefix_v, x.tail_k, x.tail_v, read)
            return lambda: peer(x.q, x.k, x.v)

    first = inputs(mask, heads, dim, batch, slots, dtype)
    wanted = expected(first, mask, cell)
    measure.check(make(first)(), wanted, BOUND[name])
    least = work.decode(mask, batch, heads, dim, name, cell)
    count = 2 if measure.small else max(2, min(64, math.ceil(CACHES / least.bytes)))
    sets = [make(inputs(mask, heads, dim, batch, slots, dtype)) for _ in range(count)]
    measure(Batch(lambda run: run(), [(run,) for run in sets]), work=least, passes=20, calls=count)
