"""Models too large to check against float64 at ease: the presets, with random weights, one candidate on a CPU.

Weights are made tensor by tensor when they are asked for, so that the memory measured is what the engine holds.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import cycle
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from bench import work
from bench.conftest import Measure
from bench.device import BEST, DEVICE, ON_GPU, clock, peak
from bench.peers import dense
from bench.subjects import MATRICES
from dalle_fast import backends, cpu_engine
from dalle_fast.config import ModelConfig
from dalle_fast.engine import TorchEngine
from dalle_fast.model import DalleModel
from dalle_fast.quantize import GROUP, Int4, Quantized

CELLS = 24  # steps that are timed: at these sizes the position hardly matters, weights are 99 % of what is read
BLOCK = 2**20 + 7  # random numbers that are repeated, with an odd period, so that no two rows are alike
# Relative errors of logits. Of two float32 runs, and of bfloat16; int8 and int4 as rounding the weights of a model of
# this kind moves them (docs/performance.md shows what was measured).
BOUND = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1, "int4": 0.9}


class RandomWeights(Mapping[str, "Tensor | Quantized"]):
    """Parameters of a config by name: normal, of a deviation that keeps activations at 1; int4: packed at once."""

    def __init__(self, config: ModelConfig, int4: bool = False, device: torch.device | str = "cpu") -> None:
        with torch.device("meta"):
            self.shapes = {name: p.shape for name, p in DalleModel(config).state_dict().items()}
        self.config, self.int4, self.device = config, int4, device

    def __getitem__(self, name: str) -> Tensor | Quantized:
        shape, g = self.shapes[name], torch.Generator().manual_seed(crc32(name.encode()))
        if len(shape) == 1:
            vector = torch.ones(shape) if name.endswith("weight") else 0.02 * torch.randn(shape, generator=g)
            return vector.to(self.device)
        residual = name.endswith(("out.weight", "down.weight"))
        scale = shape[1] ** -0.5 / (2 * self.config.layers) ** (0.5 * residual) if name.endswith(MATRICES) else 0.5
        if self.int4 and name.endswith(MATRICES) and not name.startswith("head"):
            groups, bytes_ = -(-shape[1] // GROUP), -(-shape[1] // 2)
            block = torch.randint(0, 256, (BLOCK,), generator=g, dtype=torch.uint8)
            levels = 4.6  # deviation of a nibble - 8 that is drawn evenly
            return Int4(tiled(block, (shape[0], bytes_)), torch.full((shape[0], groups), scale / levels), shape[1])
        return tiled(torch.randn(BLOCK, generator=g).mul_(scale).bfloat16().to(self.device), tuple(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def tiled(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The block over and over."""
    out = torch.empty(shape, dtype=block.dtype, device=block.device)
    flat = out.view(-1)
    for start in range(0, len(flat), len(block)):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])
    return out


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """A caption [1, caption_len] and tokens [1, CELLS]."""
    g = torch.Generator().manual_seed(1)
    text = torch.zeros(1, config.caption_len, dtype=torch.int64)
    used = min(24, config.caption_len // 2)
    text[0, :used] = torch.randint(1, config.text_vocab, (used,), generator=g)
    return text, torch.randint(0, config.image_vocab, (1, CELLS), generator=g)


def plain(config: ModelConfig, dtype: torch.dtype) -> DalleModel:
    with torch.device("meta"):
        model = DalleModel(config)
    state: Any = RandomWeights(config, device=DEVICE)
    model.load_state_dict({k: state[k].to(dtype) for k in state}, assign=True)
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def expected(config: ModelConfig) -> list[Tensor]:
    """Logits after the prefill and after each of the first four tokens, in float32 by the torch backend."""
    text, tokens = inputs(config)
    with backends.use("torch"):
        engine = TorchEngine(plain(config, torch.float32))
        return [engine.prefill(text, 1), *(engine.step(tokens[:, i]) for i in range(4))]


def preset(name: str, small: bool) -> ModelConfig:
    return ModelConfig.preset("tiny", dim=256, heads=2, head_dim=128) if small else ModelConfig.preset(name)


class Beside:
    """Our bfloat16, which the others are measured in turns with. Called, it takes three steps and returns seconds a step."""

    def __init__(self, config: ModelConfig, batch: int) -> None:
        self.engine = cpu_engine.CpuEngine(RandomWeights(config), config, dtype="bfloat16")
        text, self.tokens = inputs(config)
        self.batch, self.turn = batch, cycle(range(CELLS))
        self.engine.prefill(text, batch)

    def __call__(self) -> list[float]:
        start = clock()
        for _ in range(3):
            self.engine.step(self.tokens[:, next(self.turn)].expand(self.batch))
        return [(clock() - start) / 3]


beside = lru_cache(maxsize=2)(Beside)
ONE_B = "A step of ruDALL-E Malevich's size (1.3B, random weights)"


@pytest.mark.importance(2)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_1b(batch: int, dtype: str, measure: Measure) -> None:
    if ON_GPU:
        pytest.skip("the cpu backend is measured on machines without a GPU")
    config = preset("rudalle-malevich", measure.small)
    measure.describe(ONE_B, f"batch {batch}", "dalle_fast, cpu backend", dtype, batch=batch)
    text, tokens = inputs(config)
    wanted = expected(config)
    engine = cpu_engine.CpuEngine(RandomWeights(config), config, dtype=dtype)
    measure.check(engine.prefill(text, batch)[:1], wanted[0], BOUND[dtype])
    for i in range(4):
        measure.check(engine.step(tokens[:, i].expand(batch))[-1:], wanted[i + 1], BOUND[dtype])
    turn = cycle(range(4, CELLS))
    rounds = CELLS - 4
    least = work.step(config, batch, dtype)
    measure.facts |= {"weight_bytes": engine.weight_nbytes(), "cache_bytes": engine.nbytes()}
    against = None if dtype == "bfloat16" else beside(config, batch)
    if against is None:
        measure.facts["ratio"] = 1.0
    run = lambda: engine.step(tokens[:, next(turn)].expand(batch))  # noqa: E731
    measure(run, work=least, passes=rounds, warmup=0, against=against)


@pytest.mark.compiles
@pytest.mark.importance(2)
@pytest.mark.parametrize("batch", [1, 8])
def test_1b_compiled(batch: int, measure: Measure) -> None:
    """The same step by torch.compile over a dense cache."""
    config = preset("rudalle-malevich", measure.small)
    measure.describe(ONE_B, f"batch {batch}", "dense cache, masked, torch.compile", BEST, batch=batch)
    # The baseline is written for models with a start embedding: one more cell, which costs a step nothing.
    config = config.replace(start="learned")
    text, tokens = inputs(config)
    model = plain(config, getattr(torch, BEST))
    engine = TorchEngine(model)
    engine.prefill(text, 1)
    wanted = [engine.step(tokens[:, i]) for i in range(4)]
    stepper = dense.CompiledStepper(model, text, tokens, batch)
    for i in range(4):
        stepper.seek(i)
        measure.check(stepper.step()[-1:], wanted[i], BOUND[BEST])
    stepper.seek(CELLS - 2)
    against = beside(preset("rudalle-malevich", measure.small), batch) if not ON_GPU else None
    measure(stepper.step, work=work.step(config, batch, BEST), passes=20, against=against)


@pytest.mark.importance(3)
def test_12b_int4(measure: Measure) -> None:
    """OpenAI's size in int4: does it load in the memory of a laptop, and how long is a step?"""
    if ON_GPU:
        pytest.skip("the cpu backend is measured on machines without a GPU")
    config = preset("openai-12b", measure.small)
    measure.describe(
        "A step of OpenAI's size (12B, random weights)", "batch 1", "dalle_fast, cpu backend", "int4", batch=1
    )
    text, tokens = inputs(config)
    engine = cpu_engine.CpuEngine(RandomWeights(config, int4=True), config, dtype="int4")
    logits = engine.prefill(text, 1)
    assert bool(logits.isfinite().all()) and 0.05 < float(logits.std()) < 20
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    measure.facts |= {"weight_bytes": engine.weight_nbytes(), "cache_bytes": engine.nbytes(), "major_faults": faults}
    turn = cycle(range(CELLS))
    measure(lambda: engine.step(tokens[:, next(turn)]), work=work.step(config, 1, "int4"), passes=5)
    if not measure.small:
        assert measure.facts["peak_bytes"] < 10e9, f"got {peak() / 1e9:.1f} GB, expected less than 10"
