"""The engine for GPUs: one step is one CUDA graph, captured once and replayed for every position.

What a step reads stands at fixed addresses: the tokens fed, the position (which the step itself moves on), the cache. The
host never waits for the device; whoever reads the logits or the tokens decides when to.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dalle_fast import backends, ops
from dalle_fast.cache import Cache
from dalle_fast.engine import at_least_float32
from dalle_fast.model import DalleModel

WARM_UP = 2  # runs before a capture: the first compiles kernels and lets libraries allocate their workspaces
MAX_GRAPHS = 8  # each holds its own activations


class GraphEngine:
    """Decodes prompts x candidates sequences (engine.Engine says what each method does).

    model    on a CUDA device; on a CPU with capture=False, which runs the same step function without a graph
    chunk    known tokens fed at a time; each costs a slot in every ring
    backend  who computes the ops; "auto" chooses for each

    Returned logits are the graph's own buffer: they hold until the next step. Raises ValueError for a capture on a CPU.
    """

    batch_invariant = False  # a matrix product's rounding depends on its shape

    def __init__(
        self, model: DalleModel, chunk: int = 1, backend: str = "auto", *, capture: bool | None = None
    ) -> None:
        weight = model.head.weight
        on_gpu = weight.device.type == "cuda"
        if capture and not on_gpu:
            raise ValueError(f"got capture=True for a model on {weight.device}, expected a CUDA device")
        if not 1 <= chunk <= model.config.cells:
            raise ValueError(f"got chunk={chunk}, expected 1 to {model.config.cells}")
        self.model, self.config = model, model.config
        self.chunk, self.backend = chunk, backend
        self.capture = on_gpu if capture is None else capture
        self.cache: Cache | None = None
        self._steps: dict[Any, _Step] = {}

    @torch.inference_mode()
    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        weight = self.model.head.weight
        if self.cache is None or (self.cache.prompts, self.cache.batch) != (len(text), len(text) * candidates):
            self.cache = None  # before the new one is allocated: both might not fit
            self._steps.clear()
            self.cache = Cache(
                self.config, len(text), candidates, chunk=self.chunk, dtype=weight.dtype, device=weight.device
            )
        with backends.use(self.backend):
            return at_least_float32(self.model.prefill(text.to(weight.device), self.cache))

    def step(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens[:, None])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        cache = self._cache()
        if tokens.ndim != 2 or tokens.shape[0] != cache.batch or tokens.dtype != torch.int64 or not tokens.shape[1]:
            raise ValueError(f"got tokens {list(tokens.shape)} {tokens.dtype}, expected [{cache.batch}, k] int64")
        for part in torch.split(tokens, self.chunk, dim=1):
            n = part.shape[1]
            if n not in self._steps:
                self._steps[n] = _Step(self, n, None)
            logits = self._steps[n].run(part)[1]
        return logits

    @torch.inference_mode()
    def fork(self, candidates: int) -> None:
        self._steps.clear()  # the tails move
        self._cache().fork(candidates)

    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes()

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
    ) -> tuple[Tensor, Tensor]:
        """Feeds the tokens [B] drawn last and draws the next, all in one graph. Returns them, [N] int64, and the model's own
        logits, [B, image_vocab].

        candidates [N] int64, N = B, or B / 2 with guidance, where the second half of the batch has the empty caption and
        both halves get the same tokens. given [N] int64: the token where it is known, -1 where it is to be drawn. Both
        results are the graph's own buffers. Other settings are another graph; other tokens, candidates and positions are not.
        """
        cache, count = self._cache(), len(candidates)
        guided = guidance_scale != 1
        if cache.batch != count * (2 if guided else 1) or tokens.shape != (cache.batch,):
            raise ValueError(
                f"got tokens {list(tokens.shape)} for {count} candidates with guidance_scale={guidance_scale} and a cache "
                f"of {cache.batch}, expected [{count * (2 if guided else 1)}]"
            )
        ops.check_sampling(temperature, top_k, top_p, self.config.image_vocab)
        settings = (temperature, top_k, top_p, guidance_scale, seed)
        if settings not in self._steps:
            while len(self._steps) >= MAX_GRAPHS:
                self._steps.pop(next(iter(self._steps)))
            self._steps[settings] = _Step(self, 1, settings)
        drawn, logits = self._steps[settings].run(tokens[:, None], candidates, given)
        assert drawn is not None
        return drawn, logits

    def _cache(self) -> Cache:
        if self.cache is None:
            raise ValueError("got a step without a cache, expected prefill to come first")
        return self.cache


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
        self.result: tuple[Tensor | None, Tensor] | None = None
        if engine.capture:
            self._record()

    def run(
        self, tokens: Tensor, candidates: Tensor | None = None, given: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        self.tokens.copy_(tokens, non_blocking=True)
        if candidates is not None:
            self.candidates.copy_(candidates, non_blocking=True)
            self.given.fill_(-1) if given is None else self.given.copy_(given, non_blocking=True)
        if self.graph is None:
            return self._step()
        self.graph.replay()
        assert self.result is not None
        return self.result

    def _step(self) -> tuple[Tensor | None, Tensor]:
        """The work of one step, without a host synchronisation on a GPU; also what tests run where there is none."""
        with backends.use(self.engine.backend):
            logits = at_least_float32(self.engine.model.step(self.tokens, self.cache))
            if self.settings is None:
                return None, logits
            temperature, top_k, top_p, guidance_scale, seed = self.settings
            mixed = logits
            if guidance_scale != 1:
                n = len(self.candidates)
                mixed = torch.lerp(logits[n:], logits[:n], guidance_scale)
            index = self.cache.position - self.engine.config.first_cell  # of the token that the logits predict
            drawn = ops.sample(
                mixed, self.candidates, index, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
            )
            return torch.where(self.given >= 0, self.given, drawn), logits

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
        with torch.cuda.graph(self.graph):  # records, and runs nothing
            self.result = self._step()
