"""A rectangle of 16×16 cells drawn anew, its other cells known: all of it, drawing included, and only what it needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.conftest import Measure
from bench.device import BEST, DEVICE, ON_GPU, clock
from bench.peers import dense
from bench.subjects import MAKERS, Subject
from dalle_fast import sampling
from dalle_fast.cpu_engine import CpuEngine
from dalle_fast.engine import Engine, TorchEngine
from dalle_fast.graph_engine import GraphEngine
from dalle_fast.regions import Box, known_outside
from dalle_fast.sampling import SamplingSettings

TITLE = "A rectangle of 16×16 cells drawn anew: 512 wide, 8 layers, 256 + 32×32, candidates: "
OURS = "dalle_fast, cpu backend"
CHUNK = 32  # known cells fed at once, as Pipeline.regenerate has it: a row


@lru_cache(maxsize=1)
def subject(small: bool) -> Subject:
    return MAKERS["paper"](small)


def engine_of(s: Subject, contender: str) -> Engine:
    if "cpu backend" in contender:
        if ON_GPU:
            pytest.skip("the cpu backend is measured on machines without a GPU")
        return CpuEngine(s.model, dtype="bfloat16", chunk=CHUNK)
    model = s.cast(getattr(torch, BEST))
    if contender.startswith("dense"):
        return dense.DenseEngine(model, sliced=True)
    return GraphEngine(model, CHUNK) if ON_GPU else TorchEngine(model, CHUNK, "torch")


@lru_cache(maxsize=1)
def beside(batch: int, box: Box, small: bool) -> Callable[[], list[float]]:
    """The cpu backend's rectangle, which the others are measured in turns with: seconds a rectangle."""
    s = subject(small)
    known = known_outside(s.tokens[0], [box], s.config.height, s.config.width)
    run = drawn(engine_of(s, OURS), s.text, known, batch)

    def seconds() -> list[float]:
        start = clock()
        run()
        return [clock() - start]

    return seconds


@pytest.mark.importance(3)
@pytest.mark.parametrize(
    ("contender", "whole"),
    [
        (OURS, False),
        ("dalle_fast, cpu backend, whole picture", True),
        ("dalle_fast, torch backend" if not ON_GPU else "dalle_fast, CUDA graph", False),
        ("dense cache, the rectangle only", False),
    ],
    ids=["cpu", "cpu-whole", "torch", "dense"],
)
@pytest.mark.parametrize("corner", ["bottom right", "middle"])
@pytest.mark.parametrize("batch", [1, 8])
def test_rectangle(batch: int, corner: str, contender: str, whole: bool, measure: Measure) -> None:
    dtype = "bfloat16" if "cpu backend" in contender else BEST
    measure.describe(f"{TITLE}{batch}", f"at the {corner}", contender, dtype, batch=batch)
    s = subject(measure.small)
    config = s.config
    side = config.height // 2
    at = side if corner == "bottom right" else side // 2
    box = Box(at, at, at + side, at + side)
    picture = s.tokens[0]
    known = torch.full_like(picture, -1) if whole else known_outside(picture, [box], config.height, config.width)
    engine = engine_of(s, contender)
    batch = min(batch, 2) if measure.small else batch
    run = drawn(engine, s.text.to(DEVICE), known, batch)
    out = run()
    fixed = known >= 0
    assert bool((out[:, fixed] == picture[fixed]).all()), "known cells must stay"
    check(measure, s, out, box, config.width)
    against = None if ON_GPU or contender == OURS else beside(batch, box, measure.small)
    if contender == OURS:
        measure.facts["ratio"] = 1.0
    measure(run, passes=3, warmup=0, against=against)


def drawn(engine: Engine, text: Tensor, known: Tensor, n: int) -> Callable[[], Tensor]:
    settings = SamplingSettings(seed=3)
    return lambda: next(iter(sampling.sample(engine, text, n, settings, wave=n, known=known))).tokens


def check(measure: Measure, s: Subject, tokens: Tensor, box: Box, width: int) -> None:
    """What was drawn must be likely under the model: log p of the drawn cells by one full pass, against the same of cells
    drawn at random. A cache that lost its known cells draws from another distribution."""
    with torch.inference_mode():
        logits = s.cast(torch.float32)(s.text.to(DEVICE), tokens[:1].to(DEVICE))[1][0].log_softmax(-1).cpu()
    rows_, columns = torch.arange(box.top, box.bottom), torch.arange(box.left, box.right)
    cells = (rows_[:, None] * width + columns).flatten()
    log_p = logits[cells, tokens[0, cells]].mean()
    entropy = -(logits.exp() * logits)[cells].sum(-1)
    # The mean of log p over n draws has a deviation of about that of a single draw / sqrt(n); 6 of them.
    spread = ((logits.exp() * logits.square())[cells].sum(-1) - entropy.square()).clamp(min=0).sqrt().mean()
    bound = float(6 * spread / len(cells) ** 0.5) + 0.01
    assert abs(float(log_p + entropy.mean())) < bound, (
        f"drawn cells have a mean log p of {float(log_p):.3f}, expected {float(-entropy.mean()):.3f} ± {bound:.3f}"
    )
    measure.facts["error"] = abs(float(log_p + entropy.mean()))
