"""A step: one token for each of `batch` candidates of one caption, logits out, averaged over all cells of the picture.

Peers with a growing cache are sampled at evenly spaced cells; dalle_fast plays the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from itertools import cycle

import pytest
import torch
from torch import Tensor

from bench import work
from bench.conftest import Measure
from bench.device import BEST, DEVICE, ON_GPU, clock
from bench.neighbours import neighbours
from bench.peers import Stepper, dalle_pytorch, dense, rows, rudalle
from bench.subjects import MAKERS, Subject
from dalle_fast import cpu_engine
from dalle_fast.engine import Engine, TorchEngine
from dalle_fast.graph_engine import GraphEngine
from dalle_fast.model import DalleModel


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
    return Ours(TorchEngine(s.cast(getattr(torch, dtype)), backend="auto" if ON_GPU else "torch"), s, batch)


def ours_cpu(s: Subject, dtype: str, batch: int) -> Stepper:
    if reason := cpu_engine.why_not(s.config, dtype):
        pytest.skip(reason)
    return Ours(cpu_engine.CpuEngine(s.model, dtype=dtype), s, batch)


def ours_graph(s: Subject, dtype: str, batch: int) -> Stepper:
    return Ours(GraphEngine(s.cast(getattr(torch, dtype)), 1, "auto"), s, batch)


def dense_whole(s: Subject, dtype: str, batch: int) -> Stepper:
    return dense.DenseStepper(*fed(s, dtype), batch, sliced=False)


def dense_sliced(s: Subject, dtype: str, batch: int) -> Stepper:
    return dense.DenseStepper(*fed(s, dtype), batch, sliced=True)


def dense_compiled(s: Subject, dtype: str, batch: int) -> Stepper:
    return dense.CompiledStepper(*fed(s, dtype), batch)


def fed(s: Subject, dtype: str) -> tuple[DalleModel, Tensor, Tensor]:
    return s.cast(getattr(torch, dtype)), s.text.to(DEVICE), s.tokens.to(DEVICE)


def dalle_pytorch_forward(s: Subject, dtype: str, batch: int) -> Stepper:
    model = dalle_pytorch.in_type(deepcopy(s.peer), getattr(torch, dtype)).to(DEVICE)
    return dalle_pytorch.ForwardStepper(model, s.text.to(DEVICE), s.tokens.to(DEVICE), batch)


def rudalle_forward(s: Subject, dtype: str, batch: int) -> Stepper:
    model = deepcopy(s.peer).to(DEVICE, getattr(torch, dtype))
    return rudalle.ForwardStepper(model, s.text.to(DEVICE), s.tokens.to(DEVICE), batch)


@lru_cache(maxsize=2)
def subject(architecture: str, small: bool) -> Subject:
    return MAKERS[architecture](small)


Contender = Callable[[Subject, str, int], Stepper]
OURS: list[tuple[Contender, str]] = [
    *((ours_cpu, dtype) for dtype in ("bfloat16", "int8", "float32")),
    *((ours_torch, dtype) for dtype in ("bfloat16", "float32")),
]
if ON_GPU:
    OURS = [(ours_graph, "bfloat16"), (ours_torch, "bfloat16")]
PEERS: dict[str, list[tuple[Contender, str]]] = {
    "dalle-pytorch": [(dalle_pytorch_forward, "bfloat16"), (dalle_pytorch_forward, "float32")],
    "rudalle": [(rudalle_forward, "bfloat16"), (rudalle_forward, "float32")],
    "paper": [
        *((dense_sliced, dtype) for dtype in ("bfloat16", "float32")),
        *((dense_whole, dtype) for dtype in ("bfloat16", "float32")),
        (dense_compiled, BEST),
    ],
}
NAMES = {
    ours_cpu: "dalle_fast, cpu backend",
    ours_torch: "dalle_fast, torch backend",
    ours_graph: "dalle_fast, CUDA graph",
    dense_whole: "dense cache, masked, all of it read",
    dense_sliced: "dense cache, masked, read up to the cell",
    dense_compiled: "dense cache, masked, torch.compile",
    dalle_pytorch_forward: "DALLE-pytorch 1.6.6, forward with cache",
    rudalle_forward: "ruDALL-E 1.1.3, forward with cache",
}
TITLES = {
    "dalle-pytorch": "A step of DALLE-pytorch's architecture: 512 wide, 8 layers, 257 + 32×32",
    "rudalle": "A step of ruDALL-E's architecture: 512 wide, 8 layers, 128 + 32×32",
    "paper": "A step of the paper's architecture: 512 wide, 8 layers, 256 + 32×32",
}


class Beside:
    """What others are measured in turns with. Called, it plays a whole picture and returns the seconds of each step."""

    def __init__(self, contender: Contender, dtype: str, s: Subject, batch: int) -> None:
        self.contender, self.dtype = contender, dtype
        self.stepper, self.steps = contender(s, dtype, batch), s.config.cells - 1

    def __call__(self) -> list[float]:
        self.stepper.seek(0)
        times = []
        for _ in range(self.steps):
            neighbours.rest()
            start = clock()
            self.stepper.step()
            times.append(clock() - start)
        return times


@lru_cache(maxsize=1)
def beside(architecture: str, batch: int, small: bool) -> Beside:
    """Our first contender, for the others of its column."""
    s, (contender, dtype) = subject(architecture, small), OURS[0]
    if contender is ours_cpu and cpu_engine.why_not(s.config, dtype):
        contender, dtype = ours_torch, "float32"
    return Beside(contender, dtype, s, batch)


def cases() -> list[object]:
    params = []
    for batch in (1, 8, 32):
        for architecture, peers in PEERS.items():
            for contender, dtype in (*OURS, *peers):
                best = "bfloat16" if contender is ours_cpu else BEST
                if (dtype, best) == ("bfloat16", "float32"):
                    continue  # products one element at a time
                second = (dtype, best) == ("float32", "bfloat16")
                spare = contender is ours_cpu or (contender is ours_torch and architecture != "paper")
                if second and (batch == 32 or (batch == 8 and spare)):
                    continue  # nobody's best type
                short = architecture != "paper" and not second
                marks = [pytest.mark.importance(5 if ON_GPU else 3 if batch == 32 else 1 if short else 2)]
                if contender is dense_compiled:
                    marks.append(pytest.mark.compiles)
                name = f"{architecture}-{batch}-{contender.__name__}-{dtype}"
                params.append(pytest.param(architecture, batch, contender, dtype, id=name, marks=marks))
    return params


@pytest.mark.parametrize(("architecture", "batch", "contender", "dtype"), cases())
def test_step(architecture: str, batch: int, contender: Contender, dtype: str, measure: Measure) -> None:
    s = subject(architecture, measure.small)
    measure.describe(TITLES[architecture], f"batch {batch}", NAMES[contender], dtype, batch=batch)
    stepper = contender(s, dtype, batch)
    against = None if ON_GPU else beside(architecture, batch, measure.small)
    if against and (against.contender, against.dtype) == (contender, dtype):
        measure.facts["ratio"], against = 1.0, None
    time_steps(measure, s, stepper, dtype, batch, against)
    measure.facts["cache_bytes"] = stepper.nbytes()
    measure.save()


@pytest.mark.skipif(ON_GPU, reason="a case of the cpu backend")
@pytest.mark.importance(2)
@pytest.mark.parametrize("candidates", [1, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_candidates(dtype: str, candidates: int, measure: Measure) -> None:
    """What more candidates of a caption cost: in turns with one."""
    s = subject("dalle-pytorch", measure.small)
    title = "Candidates of one caption: " + TITLES["dalle-pytorch"][0].lower() + TITLES["dalle-pytorch"][1:]
    measure.describe(title, dtype, f"dalle_fast, cpu backend, {candidates} at once", dtype)
    stepper, against = ours_cpu(s, dtype, candidates), None
    if candidates == 1:
        measure.facts["ratio"] = 1.0
    else:
        against = Beside(ours_cpu, dtype, s, 1)
    time_steps(measure, s, stepper, dtype, candidates, against)


PUBLIC = "Drawing one token with DALLE-pytorch's public generate_images: 512 wide, 8 layers, 257 + 32×32"


@pytest.mark.importance(2)
@pytest.mark.parametrize("dtype", sorted({"float32", BEST}, reverse=True))
@pytest.mark.parametrize("batch", [1, 8])
def test_generate_images(batch: int, dtype: str, measure: Measure) -> None:
    """Its loop passes no cache on: what a token costs its users."""
    s = subject("dalle-pytorch", measure.small)
    measure.describe(PUBLIC, f"batch {batch}", "DALLE-pytorch 1.6.6, generate_images", dtype, batch=batch)
    model = dalle_pytorch.in_type(deepcopy(s.peer), getattr(torch, dtype)).to(DEVICE)
    stepper = dalle_pytorch.PublicStepper(model, s.text.to(DEVICE), s.tokens.to(DEVICE), batch)
    for cell in s.cells[-2:]:
        stepper.seek(cell)
        logits = rows(s.expected[cell], batch)
        drawn = logits.gather(1, stepper.step()[:, None].cpu())
        measure.check(drawn, logits.amax(1, keepdim=True), s.bound(dtype))  # the most likely one, up to rounding
    steps = s.config.cells - 2
    count = min(steps, stepper.positions)
    positions = [int((i + 0.5) * steps / count) for i in range(count)]
    turn = cycle(positions)
    measure(stepper.step, positions=positions, passes=1, setup=lambda: stepper.seek(next(turn)), warmup=0)


def time_steps(
    measure: Measure, s: Subject, stepper: Stepper, dtype: str, batch: int, against: Callable[[], list[float]] | None
) -> None:
    """Checks the logits at the cells of the subject, then times; what is played while timing is checked as well."""
    for cell in s.cells[:-2] if stepper.positions is None and not measure.small else s.cells:
        stepper.seek(cell)
        measure.check(stepper.step()[[0, -1]], rows(s.expected[cell], batch)[[0, -1]], s.bound(dtype))
    steps = s.config.cells - 1
    count = min(steps, stepper.positions or steps)
    positions = [int((i + 0.5) * steps / count) for i in range(count)]
    turn, last = cycle(positions), [-1, torch.empty(0)]

    def verify() -> None:
        if last[0] in s.expected:
            measure.check(last[1][[0, -1]], rows(s.expected[last[0]], batch)[[0, -1]], s.bound(dtype))

    def setup() -> None:
        verify()
        last[0] = next(turn)
        stepper.seek(last[0])

    def run() -> None:
        last[1] = stepper.step()

    least = work.step(s.config, batch, dtype)
    measure(run, work=least, positions=positions, passes=3, setup=setup, warmup=0, against=against)
