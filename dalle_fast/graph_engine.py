"""The engine for GPUs: one step is one CUDA graph, captured once and replayed for every position.

What a step reads stands at fixed addresses: the tokens fed, the position (which the step itself moves on), the cache. The
host never waits for the device; whoever reads the logits or the tokens decides when to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dalle_fast import backends, ops
from dalle_fast.cache import Cache
from dalle_fast.engine import Drawn, at_least_float32, check_draw, check_fed, log_probability
from dalle_fast.model import DalleModel
from dalle_fast.planning import plan_memory

log = logging.getLogger(__name__)

WARM_UP = 2  # runs before a capture: the first compiles kernels and lets libraries allocate their workspaces
MAX_GRAPHS = (
    8  # one a number of cells fed and one a set of sampling settings; they share the memory of their activations
)


class GraphEngine:
    """Decodes prompts x candidates sequences (engine.Engine says what each method does).

    model    on a CUDA device; on a CPU with capture=False, which runs the same step function without a graph
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
        self.chunk, self.backend, self.fp8_tails = chunk, backend, fp8_tails
        self.capture = on_gpu if capture is None else capture
        self.cache: Cache | None = None
        self._free = free or (lambda: free_memory(weight.device)) if on_gpu or free else None
        self._steps: dict[Any, _Step] = {}
        # Graphs are replayed one after another, and what each returns stays alive: scratch may be common to all.
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None

    @torch.inference_mode()
    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        weight = self.model.image_embedding.weight
        if self.cache is None or (self.cache.prompts, self.cache.batch) != (len(text), len(text) * candidates):
            self.cache = None  # before the new one is allocated: both might not fit
            self._steps.clear()
            self.cache = Cache(
                self.config, len(text), candidates, chunk=self.chunk, dtype=weight.dtype, fp8_tails=self.fp8_tails,
                device=weight.device,
            )  # fmt: skip
        with backends.use(self.backend):
            return at_least_float32(self.model.prefill(text.to(weight.device), self.cache))

    def step(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens[:, None])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        check_fed(tokens, 0 if self.cache is None else self.cache.batch)
        for part in torch.split(tokens, self.chunk, dim=1):
            logits = self._step(part.shape[1], None).run(part)[0]
        return logits

    @torch.inference_mode()
    def fork(self, candidates: int) -> None:
        self._steps.clear()  # the tails move
        self._cache().fork(candidates)

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
        positions and given tokens are not."""
        check_draw(tokens, candidates, given, guidance_scale, 0 if self.cache is None else self.cache.batch)
        ops.check_sampling(temperature, top_k, top_p, self.config.image_vocab)
        step = self._step(1, (temperature, top_k, top_p, guidance_scale, seed))
        logits, drawn, log_p = step.run(tokens[:, None], candidates, given)
        assert drawn is not None and log_p is not None
        return Drawn(drawn, log_p, logits)

    def _step(self, n: int, settings: tuple[float, int, float, float, int] | None) -> _Step:
        key = (n, settings)
        if key not in self._steps:
            while len(self._steps) >= MAX_GRAPHS:
                self._steps.pop(next(iter(self._steps)))
            self._steps[key] = _Step(self, n, settings)
        return self._steps[key]

    def _cache(self) -> Cache:
        if self.cache is None:
            raise ValueError("got a step without a cache, expected prefill to come first")
        return self.cache


_Result = tuple[Tensor, Tensor | None, Tensor | None]  # logits, and of a step that draws: tokens and their log p


class _Step:
    """One graph and the addresses that it reads: n cells of every candidate, and the draw if there are settings."""

    def __init__(self, engine: GraphEngine, n: int, settings: tuple[float, int, float, float, int] | None) -> None:
        cache = engine._cache()
        device = cache.position.device
        self.engine, self.cache, self.settings = engine, cache, settings
        count = cache.batch // (2 if settings is not None and settings[3] != 1 else 1)
        self.tokens = torch.zeros(cache.batch, n, dtype=torch.int64, device=device)
        self.candidates = torch.zeros(count, dtype=torch.int64, device=device)
        self.given = torch.full((count,), -1, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: _Result | None = None
        if engine.capture:
            self._record()

    def run(self, tokens: Tensor, candidates: Tensor | None = None, given: Tensor | None = None) -> _Result:
        self.tokens.copy_(tokens, non_blocking=True)
        if candidates is not None:
            self.candidates.copy_(candidates, non_blocking=True)
            self.given.fill_(-1) if given is None else self.given.copy_(given, non_blocking=True)
        if self.graph is None:
            return self._step()
        self.graph.replay()
        assert self.result is not None
        return self.result

    def _step(self) -> _Result:
        """The work of one step, without a host synchronisation on a GPU; also what tests run where there is none."""
        with backends.use(self.engine.backend):
            logits = at_least_float32(self.engine.model.step(self.tokens, self.cache))
            if self.settings is None:
                return logits, None, None
            temperature, top_k, top_p, guidance_scale, seed = self.settings
            n = len(self.candidates)
            mixed = torch.lerp(logits[n:], logits[:n], guidance_scale) if guidance_scale != 1 else logits
            index = self.cache.position - self.engine.config.first_cell  # of the token that the logits predict
            drawn = ops.sample(
                mixed, self.candidates, index, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
            )
            tokens = torch.where(self.given >= 0, self.given, drawn)
            return logits, tokens, log_probability(logits[:n], tokens)

    def _record(self) -> None:
        """Warms up on a side stream, then captures. The warm-up writes the slots of the current cells only, and the first
        replay writes the very same ones again; the position is all that must be put back."""
        position = self.cache.position.clone()
        stream: Any = cast(Any, torch.cuda).Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.cache.position.copy_(position)
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.position.copy_(position)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.engine.pool):  # records, and runs nothing
            self.result = self._step()


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a CUDA device: free ones, and those that torch holds without using them."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
