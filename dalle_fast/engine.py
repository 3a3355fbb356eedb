"""What the sampling loop drives: something that holds the cache and turns the tokens drawn into the next logits."""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dalle_fast import backends, onednn
from dalle_fast.cache import Cache
from dalle_fast.config import ModelConfig
from dalle_fast.logits import at_least_float32
from dalle_fast.model import DalleModel

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Decodes prompts x candidates sequences side by side. Candidate b belongs to prompt b // candidates.

    batch_invariant: a candidate's logits do not depend, to the bit, on how many others are decoded with it.
    backend: who computes the ops ("auto": chosen for each). chunk: known tokens fed at a time.
    """

    config: ModelConfig
    batch_invariant: bool
    backend: str
    chunk: int

    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        """Starts anew with captions [P, caption_len] int64; returns the logits of image token 0, [P * N, image_vocab]."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Takes the token just drawn for every candidate, [B]; returns the logits of the next one, [B, image_vocab]."""
        ...

    def feed(self, tokens: Tensor) -> Tensor:
        """Takes k known tokens at once, [B, k]; returns the logits of the token after them."""
        ...

    def fork(self, candidates: int) -> None:
        """Turns every candidate into `candidates` equal ones, which go their own ways from here."""
        ...

    def nbytes(self) -> int:
        """Bytes of the cache."""
        ...

    def most_candidates(self, guided: bool = False) -> int | None:
        """How many candidates of one prompt the device's memory holds, twice each where guided; None: ask someone else."""
        ...


class Drawn(NamedTuple):
    """What a step that draws returns, N candidates. May be the engine's own buffers, which hold until its next step and are
    not to be written to."""

    tokens: Tensor  # [N] int64
    log_p: Tensor  # [N] float64: log_probability of the tokens
    logits: Tensor  # [B, image_vocab] of any floating type: the model's own, before guidance and cuts


@runtime_checkable
class DrawingEngine(Engine, Protocol):
    """An engine whose step ends with the draw of the next token, all of it one piece of work."""

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
        """Feeds the token of every candidate, [N] int64, and draws its next one; candidates [N] int64.

        N = B, or B / 2 with guidance, where the second half of the batch has the empty caption and both halves get the same
        tokens. given [N] int64: the next token where it is known, -1 where it is to be drawn. Other arguments as in
        ops.sample. Raises ValueError for other shapes or settings out of range.
        """
        ...


class TorchEngine:
    """The engine of the plain model, on any device, one op at a time."""

    batch_invariant = False  # a matrix product's rounding depends on its shape

    def __init__(self, model: DalleModel, chunk: int = 1, backend: str = "auto", *, fp8_tails: bool = False) -> None:
        """chunk: known tokens fed at a time. Each costs a slot in every ring, and a ring that a step reads whole is the
        fastest, so leave it at 1 where nothing is known. fp8_tails: as in cache.Cache."""
        reason = (
            onednn.why_not(model.image_embedding.weight) if backend in ("auto", "torch") else f"backend {backend!r}"
        )
        log.info("linear layers are %s", f"plain: {reason}" if reason else "packed by oneDNN")
        self.model: DalleModel = model if reason else onednn.OneDnnModel(model)
        self.config = model.config
        self.chunk, self.backend, self.fp8_tails = chunk, backend, fp8_tails
        self.cache: Cache | None = None

    @torch.inference_mode()
    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        weight = self.model.head.weight
        shape = (text.shape[0], candidates, weight.dtype)
        if self.cache is None or (self.cache.prompts, self.cache.batch // self.cache.prompts, weight.dtype) != shape:
            self.cache = Cache(
                self.config, text.shape[0], candidates, chunk=self.chunk, dtype=weight.dtype, fp8_tails=self.fp8_tails,
                device=weight.device,
            )  # fmt: skip
            self._lay_out()
        with backends.use(self.backend):
            return at_least_float32(self.model.prefill(text.to(weight.device), self.cache))

    def step(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens[:, None])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        check_fed(tokens, 0 if self.cache is None else self.cache.batch)
        assert self.cache is not None
        with backends.use(self.backend):
            for part in torch.split(tokens, self.chunk, dim=1):
                logits = self.model.step(part, self.cache)
        return at_least_float32(logits)

    @torch.inference_mode()
    def fork(self, candidates: int) -> None:
        assert self.cache is not None, "prefill comes first"
        self.cache.fork(candidates)
        self._lay_out()

    def _lay_out(self) -> None:
        if isinstance(self.model, onednn.OneDnnModel) and self.cache is not None:
            self.model.lay_out(self.cache.batch * self.chunk)

    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes()

    def most_candidates(self, guided: bool = False) -> int | None:
        return None


def check_fed(tokens: Tensor, batch: int) -> None:
    """Raises ValueError unless an engine of so many sequences (0: before prefill) can be fed these tokens."""
    if not batch:
        raise ValueError("got a step without a cache, expected prefill to come first")
    if tokens.ndim != 2 or tokens.shape[0] != batch or not tokens.shape[1] or tokens.dtype != torch.int64:
        raise ValueError(f"got tokens {list(tokens.shape)} {tokens.dtype}, expected [{batch}, k] int64, k at least 1")


def check_draw(tokens: Tensor, candidates: Tensor, given: Tensor | None, guidance_scale: float, batch: int) -> None:
    """Raises ValueError unless DrawingEngine.sample of so many sequences can take these arguments."""
    if not batch:
        raise ValueError("got a step without a cache, expected prefill to come first")
    halves, why = (1, "") if guidance_scale == 1 else (2, f", half of the batch, with {guidance_scale=}")
    for name, x in (("tokens", tokens), ("candidates", candidates), ("given", candidates if given is None else given)):
        if x.ndim != 1 or len(x) * halves != batch or x.dtype != torch.int64:
            raise ValueError(f"got {name} {list(x.shape)} {x.dtype}, expected [{batch / halves:g}] int64{why}")
