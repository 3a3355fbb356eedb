"""Whole pictures of the large presets on a GPU, drawing included: one candidate, many, a training step.

On a CPU they run at a toy size only, to see that they are right.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle

import pytest
import torch
from torch import Tensor

from bench import work
from bench.conftest import Measure
from bench.device import DEVICE, ON_GPU
from bench.peers import dense
from bench.test_large import RandomWeights, plain, preset
from dalle_fast import backends, packed_model, sampling
from dalle_fast.config import ModelConfig
from dalle_fast.engine import TorchEngine
from dalle_fast.graph_engine import GraphEngine
from dalle_fast.model import DalleModel
from dalle_fast.sampling import SamplingSettings

SIZES = {"rudalle-malevich": "1.3B", "openai-12b": "12B"}
TYPE = torch.bfloat16
NAME = "dalle_fast, CUDA graph"
BOUND = {"bfloat16": 0.05, "int8": 0.1, "int4": 0.9}  # of logits against those in bfloat16; both sides are rounded


def needs_gpu(measure: Measure, size: str = "") -> None:
    if not (ON_GPU or measure.small):
        pytest.skip("these sizes are for a GPU")
    if measure.small and size == "openai-12b":
        pytest.skip("at a toy size all presets are the same")


def caption(config: ModelConfig) -> Tensor:
    text = torch.zeros(1, config.caption_len, dtype=torch.int64)
    text[0, :8] = torch.arange(1, 9)
    return text.to(DEVICE)


def started(name: str, small: bool) -> ModelConfig:
    """The preset with a start cell, which the dense baseline is written for and which costs a step nothing."""
    return preset(name, small).replace(start="learned")


@lru_cache(maxsize=1)
def plain_model(name: str, small: bool) -> DalleModel:
    return plain(started(name, small), TYPE)


def graph_engine(name: str, dtype: str, small: bool) -> GraphEngine:
    """As loading.load_engine makes it."""
    if dtype == "bfloat16":
        return GraphEngine(plain_model(name, small), capture=ON_GPU)
    if ON_GPU and (reason := packed_model.why_not(dtype, DEVICE.type)):
        pytest.skip(reason)
    config = started(name, small)
    model = packed_model.PackedModel(RandomWeights(config, device=DEVICE), config, kind=dtype, device=DEVICE)
    return GraphEngine(model, capture=ON_GPU)


@pytest.mark.importance(1)
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.importance(2)) for d in ("int8", "int4"))]
)
@pytest.mark.parametrize("size", SIZES)
def test_a_whole_picture(size: str, dtype: str, batch: int, measure: Measure) -> None:
    """The prefill and 1024 steps, drawing included, divided by 1024."""
    needs_gpu(measure, size)
    title = f"A step of {SIZES[size]} on a GPU, drawing included, mean over whole pictures"
    measure.describe(title, f"batch {batch}", NAME, dtype, batch=batch)
    engine = graph_engine(size, dtype, measure.small)
    config = engine.config
    check_against_dense(measure, engine, plain_model(size, measure.small), BOUND[dtype])
    text, candidates, settings = caption(config), torch.arange(batch), SamplingSettings(seed=1)

    def run(cells: int = config.cells) -> None:
        for _ in itertools.islice(sampling.draw(engine, text, candidates, settings), cells):
            pass

    run(3)  # compiles and captures
    passes = 1 if size == "openai-12b" else 3
    measure(run, work=work.step(config, batch, dtype), passes=passes, calls=config.cells, warmup=0)
    measure.facts["cache_bytes"] = engine.nbytes()
    measure.save()


def check_against_dense(measure: Measure, engine: GraphEngine, model: DalleModel, bound: float) -> None:
    """A few steps of two candidates against the dense baseline of the same model."""
    tokens = torch.randint(model.config.image_vocab, (2, 3), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    other = dense.DenseEngine(model)
    for engine_, results in ((engine, ours := []), (other, theirs := [])):
        results.append(engine_.prefill(caption(model.config), 2).clone())
        results.extend(engine_.step(tokens[:, i]).clone() for i in range(3))
    for got, want in zip(ours, theirs, strict=True):
        measure.check(got, want, bound)


@pytest.mark.compiles
@pytest.mark.importance(2)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", SIZES)
def test_a_compiled_step(size: str, batch: int, measure: Measure) -> None:
    """The peer: the same step, drawing not included, by torch.compile and one CUDA graph over a dense cache."""
    needs_gpu(measure, size)
    title = f"A step of {SIZES[size]} on a GPU, drawing included, mean over whole pictures"
    measure.describe(
        title, f"batch {batch}", "dense cache, torch.compile and CUDA graph, no drawing", "bfloat16", batch=batch
    )
    model = plain_model(size, measure.small)
    config = model.config
    tokens = torch.randint(config.image_vocab, (1, config.cells), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    engine = TorchEngine(model)
    engine.prefill(caption(config), 1)
    stepper = dense.CompiledStepper(model, caption(config), tokens, batch)
    for cell in range(3):
        want = engine.step(tokens[:, cell])
        stepper.seek(cell)
        measure.check(stepper.step()[:1], want, BOUND["bfloat16"])
    count = min(32, config.cells - 1)
    positions = [int((i + 0.5) * (config.cells - 1) / count) for i in range(count)]
    turn = cycle(positions)
    measure(
        stepper.step, work=work.step(config, batch, "bfloat16"), positions=positions, passes=5,
        setup=lambda: stepper.seek(next(turn)), warmup=0,
    )  # fmt: skip


@pytest.mark.importance(3)
@pytest.mark.parametrize("size", SIZES)
def test_512_candidates(size: str, measure: Measure) -> None:
    """Tokens of 512 candidates of one caption, in the waves that memory allows; pictures and ranking not included."""
    needs_gpu(measure, size)
    measure.describe("512 candidates of one caption on a GPU", SIZES[size], NAME, "bfloat16")
    engine = graph_engine(size, "bfloat16", measure.small)
    config, n, wave = engine.config, 4 if measure.small else 512, 2 if measure.small else None
    settings, waves = SamplingSettings(seed=1), []

    def run() -> None:
        waves[:] = sampling.sample(engine, caption(config), n, settings, wave=wave)

    measure(run, passes=1, warmup=0)
    assert sum(len(w.candidates) for w in waves) == n
    again = next(iter(sampling.sample(engine, caption(config), 1, settings, wave=wave)))
    if not ON_GPU:  # where rounding depends on the size of the wave, a tie may fall otherwise
        assert again.tokens[0].equal(waves[0].tokens[0])
    measure.facts["wave"] = len(waves[0].candidates)
    measure.save()


@pytest.mark.importance(4)
@pytest.mark.parametrize("contender", ["dalle_fast", "dense masks in plain PyTorch"])
def test_training_step(contender: str, measure: Measure) -> None:
    """Loss and gradients of eight pictures."""
    needs_gpu(measure)
    measure.describe("Forward and backward of 1.3B on a GPU, 8 pictures", "8 pictures", contender, "bfloat16")
    config = preset("rudalle-malevich", measure.small)
    batch = 2 if measure.small else 8
    model = plain(config, TYPE).requires_grad_(True)
    g = torch.Generator().manual_seed(1)
    text = caption(config).repeat(batch, 1)
    image = torch.randint(config.image_vocab, (batch, config.cells), generator=g).to(DEVICE)

    def loss_and_gradient(backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            with backends.use(backend):
                loss = model.loss(text, image)
                loss.backward()
            return loss.detach()

        return run

    reference = loss_and_gradient("reference")
    run = reference if contender != "dalle_fast" else loss_and_gradient("auto")
    wanted = reference()[None]
    gradient = model.get_parameter("blocks.0.qkv.weight").grad
    assert gradient is not None
    gradient = gradient.clone()
    measure.check(run()[None], wanted, 0.01)
    measure.check(model.get_parameter("blocks.0.qkv.weight").grad, gradient, BOUND["bfloat16"])  # type: ignore[arg-type]
    measure(run, passes=5)


@pytest.mark.importance(4)
@pytest.mark.parametrize("corner", [16, 24])
@pytest.mark.parametrize("size", SIZES)
def test_bottom_right_rectangle(size: str, corner: int, measure: Measure) -> None:
    """From (corner, corner) to the bottom-right cell, one candidate: what is known is not drawn again."""
    needs_gpu(measure, size)
    measure.describe(
        "A rectangle to the bottom-right corner on a GPU", f"{SIZES[size]} from {corner}", NAME, "bfloat16"
    )
    model = plain_model(size, measure.small)
    config = model.config
    at = corner * config.height // 32
    grid = torch.randint(config.image_vocab, (config.height, config.width), generator=torch.Generator().manual_seed(3))
    known = grid.clone()
    known[at:, at:] = -1
    engine = GraphEngine(model, chunk=max(1, at), capture=ON_GPU)

    def run() -> Tensor:
        settings = SamplingSettings(seed=1)
        return next(iter(sampling.sample(engine, caption(config), 1, settings, wave=1, known=known.view(-1)))).tokens

    out = run().view_as(grid)
    assert bool((out[known >= 0] == grid[known >= 0]).all()), "known cells must stay"
    measure(run, passes=3)
