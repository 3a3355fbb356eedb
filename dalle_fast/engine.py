"""What the sampling loop drives: something that holds the cache and turns the tokens drawn into the next logits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dalle_fast import backends
from dalle_fast.cache import Cache
from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel


class Engine(Protocol):
    """Decodes prompts x candidates sequences side by side. Candidate b belongs to prompt b // candidates.

    batch_invariant: a candidate's logits do not depend, to the bit, on how many others are decoded with it.
    backend: who computes the ops ("auto": chosen for each).
    """

    config: ModelConfig
    batch_invariant: bool
    backend: str

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


class TorchEngine:
    """The engine of the plain model, on any device, one op at a time."""

    batch_invariant = False  # a matrix product's rounding depends on its shape

    def __init__(self, model: DalleModel, chunk: int = 1, backend: str = "auto") -> None:
        """chunk: known tokens fed at a time. Each costs a slot in every ring, and a ring that a step reads whole is the
        fastest, so leave it at 1 where nothing is known."""
        self.model, self.config = model, model.config
        self.chunk, self.backend = chunk, backend
        self.cache: Cache | None = None

    @torch.inference_mode()
    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        weight = self.model.head.weight
        shape = (text.shape[0], candidates, weight.dtype)
        if self.cache is None or (self.cache.prompts, self.cache.batch // self.cache.prompts, weight.dtype) != shape:
            self.cache = Cache(
                self.config, text.shape[0], candidates, chunk=self.chunk, dtype=weight.dtype, device=weight.device
            )
        with backends.use(self.backend):
            return at_least_float32(self.model.prefill(text.to(weight.device), self.cache))

    def step(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens[:, None])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        assert self.cache is not None, "prefill comes first"
        with backends.use(self.backend):
            for part in torch.split(tokens, self.chunk, dim=1):
                logits = self.model.step(part, self.cache)
        return at_least_float32(logits)

    @torch.inference_mode()
    def fork(self, candidates: int) -> None:
        assert self.cache is not None, "prefill comes first"
        self.cache.fork(candidates)

    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes()


def at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
