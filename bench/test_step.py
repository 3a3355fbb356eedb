"""A step: one token for each of `batch` candidates of one caption, logits out, averaged over all cells of the picture.

Peers with a growing cache are sampled at evenly spaced cells; dalle_fast plays the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import cycle

import pytest
import torch
from torch import Tensor

from bench import work
from bench.conftest import Measure
from bench.device import DEVICE
from bench.peers import Stepper, dense, rows
from bench.subjects import BOUND, MAKERS, Subject
from dalle_fast.engine import Engine, TorchEngine

F32, BF16 = torch.float32, torch.bfloat16


class Ours:
    """Plays the streams through an engine of dalle_fast."""

    positions = None

    def __init__(self, engine: Engine, subject: Subject, batch: int) -> None:
        self.engine, self.text, self.batch = engine, subject.text.to(DEVICE), batch
        self.tokens = rows(subject.tokens.to(DEVICE), batch)
        self.cell = subject.config.cells

    def seek(self, cell: int) -> None:
        if cell < self.cell:
            self.engine.prefill(self.text, self.batch)
            self.cell = 0
        while self.cell < cell:
            self.step()

    def step(self) -> Tensor:
        self.cell += 1
        return self.engine.step(self.tokens[:, self.cell - 1])

    def nbytes(self) -> int:
        return self.engine.nbytes()


def ours_torch(s: Subject, dtype: str, batch: int) -> Stepper:
    return Ours(TorchEngine(s.cast(getattr(torch, dtype))), s, batch)


def dense_whole(s: Subject, dtype: str, batch: int) -> Stepper:
    return dense.DenseStepper(
        s.cast(getattr(torch, dtype)), s.text.to(DEVICE), s.tokens.to(DEVICE), batch, sliced=False
    )


def dense_sliced(s: Subject, dtype: str, batch: int) -> Stepper:
    return dense.DenseStepper(s.cast(getattr(torch, dtype)), s.text.to(DEVICE), s.tokens.to(DEVICE), batch, sliced=True)


def dense_compiled(s: Subject, dtype: str, batch: int) -> Stepper:
    return dense.CompiledStepper(s.cast(getattr(torch, dtype)), s.text.to(DEVICE), s.tokens.to(DEVICE), batch)


@lru_cache(maxsize=2)
def subject(architecture: str, small: bool) -> Subject:
    return MAKERS[architecture](small)


def cases() -> list[object]:
    params = []
    for batch in (1, 8, 32):
        for architecture, contender, dtype in CONTENDERS:
            marks = [pytest.mark.importance(2 if batch == 32 else 1)]
            if contender is dense_compiled:
                marks.append(pytest.mark.compiles)
            name = f"{architecture}-{batch}-{contender.__name__}-{dtype}"
            params.append(pytest.param(architecture, batch, contender, dtype, id=name, marks=marks))
    return params


CONTENDERS: list[tuple[str, Callable[[Subject, str, int], Stepper], str]] = [
    ("paper", ours_torch, "float32"),
    ("paper", ours_torch, "bfloat16"),
    ("paper", dense_whole, "float32"),
    ("paper", dense_sliced, "float32"),
    ("paper", dense_sliced, "bfloat16"),
    ("paper", dense_compiled, "bfloat16"),
]
NAMES = {
    ours_torch: "dalle_fast, torch backend",
    dense_whole: "dense cache, masked, all of it read",
    dense_sliced: "dense cache, masked, read up to the cell",
    dense_compiled: "dense cache, masked, torch.compile",
}
TITLES = {"paper": "A step of the paper's architecture: 512 wide, 8 layers, 256 + 32×32"}


@pytest.mark.parametrize(("architecture", "batch", "contender", "dtype"), cases())
def test_step(
    architecture: str, batch: int, contender: Callable[[Subject, str, int], Stepper], dtype: str, measure: Measure
) -> None:
    s = subject(architecture, measure.small)
    measure.describe(TITLES[architecture], f"batch {batch}", NAMES[contender], dtype, batch=batch)
    stepper = contender(s, dtype, batch)
    time_steps(measure, s, stepper, dtype, batch)
    measure.facts["cache_bytes"] = stepper.nbytes()
    measure.save()


def time_steps(measure: Measure, s: Subject, stepper: Stepper, dtype: str, batch: int) -> None:
    """Checks the logits at the cells of the subject, then times; what is played while timing is checked as well."""
    for cell in s.cells[:-2] if stepper.positions is None and not measure.small else s.cells:
        stepper.seek(cell)
        measure.check(stepper.step()[[0, -1]], rows(s.expected[cell], batch)[[0, -1]], BOUND[dtype])
    steps = s.config.cells - 1
    count = min(steps, stepper.positions or steps)
    positions = [int((i + 0.5) * steps / count) for i in range(count)]
    turn, last = cycle(positions), [-1, torch.empty(0)]

    def verify() -> None:
        if last[0] in s.expected:
            measure.check(last[1][[0, -1]], rows(s.expected[last[0]], batch)[[0, -1]], BOUND[dtype])

    def setup() -> None:
        verify()
        last[0] = next(turn)
        stepper.seek(last[0])

    def run() -> None:
        last[1] = stepper.step()

    passes = 1 if batch > 8 or stepper.positions is None else 3
    measure(run, work=work.step(s.config, batch, dtype), positions=positions, passes=passes, setup=setup, warmup=0)
