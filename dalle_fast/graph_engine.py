"""The engine for GPUs: one step is one CUDA graph, captured once and replayed for every position.

What a step reads stands at fixed addresses: the tokens fed, the position (which the step itself moves on), the cache. A step
that draws leaves the embedding of its tokens, so that the next one starts with its first layer. The host never waits for the
device; whoever reads the logits or the tokens decides when to.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from dalle_fast import backends, ops
from dalle_fast.cache import Cache
from dalle_fast.engine import Drawn, check_draw, check_fed
from dalle_fast.logits import at_least_float32
from dalle_fast.model import DalleModel
from dalle_fast.packed_model import fused
from dalle_fast.planning import plan_memory

log = logging.getLogger(__name__)
Result = TypeVar("Result")

WARM_UP = 2  # runs before a capture: the first compiles kernels and lets libraries allocate their workspaces
MAX_GRAPHS = (
    8  # one a number of cells fed and one a set of sampling settings; they share the memory of their activations
)


class GraphEngine:
    """Decodes prompts x candidates sequences (engine.Engine says what each method does).

    model    on a CUDA device; on a CPU with capture=False, which runs the same step function without a graph. On a GPU its
             steps are those of packed_model.fused(model)
    chunk    known tokens fed at a time; each costs a slot in every ring
    backend  who computes the ops; "auto" chooses for each
    free     says how many bytes of memory are free; None: asks the device
    fp8_tails  half the bytes for the longest tails (cache.Cache); costs a little accuracy

    Returned logits and tokens are the graph's own buffers: they hold until the next step. Raises ValueError for a capture
    on a CPU.
    """

    batch_invariant = False  # a matrix product's rounding depends on its shape

    def __init__(
        self,
        model: DalleModel,
        chunk: int = 1,
        backend: str = "auto",
        *,
        capture: bool | None = None,
        free: Callable[[], int] | None = None,
        fp8_tails: bool = False,
    ) -> None:
        weight = model.image_embedding.weight
        on_gpu = weight.device.type == "cuda"
        if capture and not on_gpu:
            raise ValueError(f"got capture=True for a model on {weight.device}, expected a CUDA device")
        if not 1 <= chunk <= model.config.cells:
            raise ValueError(f"got chunk={chunk}, expected 1 to {model.config.cells}")
        self.model, self.config = model, model.config
        self.stepper = fused(model, backend)
        self.chunk, self.backend, self.fp8_tails = chunk, backend, fp8_tails
        self.capture = on_gpu if capture is None else capture
        self.cache: Cache | None = None
        self._free = free or (lambda: free_memory(weight.device)) if on_gpu or free else None
        self._steps: dict[DrawSettings | int, _Feed | _Draw] = {}
        self._x: Tensor | None = None  # [B, d]: what a step that draws starts from
        self._ahead: Tensor | None = None  # the tokens whose embedding stands there, if any
        self._forget()

    @torch.inference_mode()
    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        weight, self._ahead = self.model.image_embedding.weight, None
        if self.cache is None or (self.cache.prompts, self.cache.batch) != (len(text), len(text) * candidates):
            self.cache = None  # before the new one is allocated: both might not fit
            self._forget()
            self.cache = Cache(
                self.config, len(text), candidates, chunk=self.chunk, dtype=weight.dtype, fp8_tails=self.fp8_tails,
                device=weight.device,
            )  # fmt: skip
            self._x = self._inputs()
        with backends.use(self.backend):
            return at_least_float32(self.model.prefill(text.to(weight.device), self.cache))

    def step(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens[:, None])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        check_fed(tokens, 0 if self.cache is None else self.cache.batch)
        self._ahead = None
        for part in torch.split(tokens, self.chunk, dim=1):
            logits = self._feeds(part.shape[1]).run(part)
        return logits

    @torch.inference_mode()
    def fork(self, candidates: int) -> None:
        self._forget()  # the tails move
        self._ahead = None
        self._cache().fork(candidates)
        self._x = self._inputs()

    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes()

    def most_candidates(self, guided: bool = False) -> int | None:
        """By planning.plan_memory. Raises ValueError, with what is there and what it takes, where not even one fits."""
        if self._free is None:
            return None
        weight = self.model.image_embedding.weight
        free = self._free() + self.nbytes()  # the cache of the last wave makes room for the next
        plan = plan_memory(
            self.config, free, dtype=weight.dtype, weights_loaded=True, fp8_tails=self.fp8_tails, chunk=self.chunk,
            guided=guided,
        )  # fmt: skip
        if not plan.candidates:
            needed = plan.total(1) - plan.weights
            raise ValueError(
                f"got {free / 1e9:.2f} GB of free memory on {weight.device} beside the weights, expected at least "
                f"{needed / 1e9:.2f} GB for one candidate"
            )
        log.info(
            "%.2f GB free beside %.2f GB of weights: %d candidates of %.1f MB each fit at a time",
            free / 1e9, plan.weights / 1e9, plan.candidates, (plan.tail + plan.work) / 1e6,
        )  # fmt: skip
        return plan.candidates

    @torch.inference_mode()
    def sample(
        self,
        tokens: Tensor,
        candidates: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        seed: int = 0,
        given: Tensor | None = None,
    ) -> Drawn:
        """As engine.DrawingEngine says, all in one graph. Other settings are another graph; other tokens, candidates,
        positions and given tokens are not. Tokens other than the ones drawn last are embedded ahead of it."""
        check_draw(tokens, candidates, given, guidance_scale, 0 if self.cache is None else self.cache.batch)
        ops.check_sampling(temperature, top_k, top_p, self.config.image_vocab)
        assert self._x is not None
        if self._ahead is None or tokens.data_ptr() != self._ahead.data_ptr() or tokens.shape != self._ahead.shape:
            x = self.model.embed_image(tokens[:, None], self._cache().position - self.config.first_cell)
            self._x.view(-1, *x[:, 0].shape).copy_(x[:, 0])
        self._ahead = None  # until the step has run
        step = self._draws(DrawSettings(temperature, top_k, top_p, guidance_scale, seed), self._x)
        drawn = step.run(candidates, given)
        self._ahead = drawn.tokens
        return drawn

    def _forget(self) -> None:
        """Drops all graphs. Those to come are replayed one after another, and what each returns stays alive, so that
        scratch may be common to all; but a pool whose last graph is gone must not be captured into again."""
        self._steps.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None

    def _inputs(self) -> Tensor:
        return self.model.image_embedding.weight.new_empty(self._cache().batch, self.config.dim)

    def _feeds(self, n: int) -> _Feed:
        step = self._steps.get(n) or self._keep(n, _Feed(self, n))
        assert isinstance(step, _Feed)
        return step

    def _draws(self, settings: DrawSettings, x: Tensor) -> _Draw:
        step = self._steps.get(settings) or self._keep(settings, _Draw(self, settings, x))
        assert isinstance(step, _Draw)
        return step

    def _keep(self, key: DrawSettings | int, step: _Feed | _Draw) -> _Feed | _Draw:
        while len(self._steps) >= MAX_GRAPHS:
            self._steps.pop(next(iter(self._steps)))
        self._steps[key] = step
        return step

    def _cache(self) -> Cache:
        if self.cache is None:
            raise ValueError("got a step without a cache, expected prefill to come first")
        return self.cache


class DrawSettings(NamedTuple):
    """What is fixed in a graph that draws."""

    temperature: float
    top_k: int
    top_p: float
    guidance_scale: float
    seed: int


class _Recorded(ABC, Generic[Result]):
    """Work without a host synchronisation on a GPU, recorded as one graph; where nothing is captured it runs as it is, which
    is also what tests do where there is no GPU. `moved`: what the work reads and overwrites, and must stand as it was when
    the graph is first replayed."""

    def __init__(self, engine: GraphEngine, *moved: Tensor) -> None:
        self.engine, self.cache = engine, engine._cache()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result | None = None
        self.moved = (self.cache.position, *moved)

    @abstractmethod
    def work(self) -> Result:
        """What is recorded."""

    def replay(self) -> Result:
        if not self.engine.capture:
            with backends.use(self.engine.backend):
                return self.work()
        if self.graph is None:
            self.record()
        assert self.graph is not None and self.result is not None
        self.graph.replay()
        return self.result

    def record(self) -> None:
        """Warms up on a side stream, then captures. The warm-up writes the slots of the current cells only, and the first
        replay writes the very same ones again; what it moved on is all that must be put back."""
        before = [x.clone() for x in self.moved]

        def put_back() -> None:
            for x, value in zip(self.moved, before, strict=True):
                x.copy_(value)

        stream: Any = cast(Any, torch.cuda).Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), backends.use(self.engine.backend):
            for _ in range(WARM_UP):
                self.work()
                put_back()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.engine.pool), backends.use(self.engine.backend):
            self.result = self.work()  # recorded, not run


class _Feed(_Recorded[Tensor]):
    """Appends n tokens of every sequence; gives the logits."""

    def __init__(self, engine: GraphEngine, n: int) -> None:
        super().__init__(engine)
        self.tokens = torch.zeros(self.cache.batch, n, dtype=torch.int64, device=self.cache.position.device)

    def run(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens, non_blocking=True)
        return self.replay()

    def work(self) -> Tensor:
        return at_least_float32(self.engine.stepper.step(self.tokens, self.cache))


class _Draw(_Recorded[Drawn]):
    """Appends the tokens whose embedding stands in x [B, d], draws the next ones, and leaves theirs there."""

    def __init__(self, engine: GraphEngine, settings: DrawSettings, x: Tensor) -> None:
        super().__init__(engine, x)
        self.settings, self.x = settings, x
        count, device = self.cache.batch // (1 if settings.guidance_scale == 1 else 2), x.device
        self.candidates = torch.zeros(count, dtype=torch.int64, device=device)
        self.given = torch.full((count,), -1, dtype=torch.int64, device=device)
        self.any_given = False

    def run(self, candidates: Tensor, given: Tensor | None) -> Drawn:
        self.candidates.copy_(candidates, non_blocking=True)
        if given is not None:
            self.given.copy_(given, non_blocking=True)
        elif self.any_given:
            self.given.fill_(-1)
        self.any_given = given is not None
        return self.replay()

    def work(self) -> Drawn:
        model = self.engine.stepper
        logits = model.advance(self.x[:, None], self.cache)
        tokens, log_p = ops.draw(
            logits, self.candidates, self.given, self.cache.position, model.config.first_cell, self.x,
            model.image_embedding_tables(), **self.settings._asdict(),
        )  # fmt: skip
        return Drawn(tokens, log_p, logits)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a CUDA device: free ones, and those that torch holds without using them."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
