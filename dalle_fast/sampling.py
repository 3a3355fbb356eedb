"""The decode loop: waves of candidates, a random stream each, guidance, and pictures of which a part is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_fast import backends, ops
from dalle_fast.engine import Engine

DEFAULT_WAVE = 8


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn from logits. The paper samples at temperature 1 from all tokens.

    top_k = 0 and top_p = 1 keep every token. guidance_scale s draws from uncond + s * (cond - uncond), where uncond is the
    model given an empty caption; 1 means none and costs nothing.
    Raises ValueError for a value that no distribution has (top_k is checked against the vocabulary by `check`).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.check(2**31)
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"got guidance_scale={self.guidance_scale}, expected a finite number")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"got seed={self.seed}, expected 0 to 2^63 - 1")

    def check(self, vocab: int) -> None:
        ops.check_sampling(self.temperature, self.top_k, self.top_p, vocab)


@dataclass(frozen=True)
class Wave:
    """Finished candidates of one prompt."""

    candidates: Tensor  # [n] int64: their numbers, which key their random streams
    tokens: Tensor  # [n, cells] int64
    log_likelihood: Tensor  # [n] float64, nats: log p of the drawn (and scored) tokens, before temperature and cuts


def draw(
    engine: Engine,
    text: Tensor,
    candidates: Tensor,
    settings: SamplingSettings,
    known: Tensor | None = None,
    score_known: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Draws one batch of candidates of one caption and yields (j, tokens [N], log p [N]) for every image token j in turn.

    text [1, caption_len]; candidates [N] int64; known [cells] int64 holds the tokens that are given and -1 where one is to
    be drawn. Leading known tokens are computed once for all candidates, later runs are fed in chunks, and those after the
    last drawn token not at all, unless score_known asks for their log p. log p is the model's own log-probability of the
    token (temperature 1, no guidance, no cuts), and 0 for known tokens that are not scored.
    """
    config, n = engine.config, len(candidates)
    settings.check(config.image_vocab)
    given = torch.full((config.cells,), -1) if known is None else known
    check_known(given, config.cells, config.image_vocab)
    end = int((given < 0).nonzero().max()) + 1 if bool((given < 0).any()) else 0
    lead = _run(given, 0)
    guided = settings.guidance_scale != 1
    prompts = torch.cat([text, torch.zeros_like(text)]) if guided else text
    shared = 0 < lead < config.cells
    logits = engine.prefill(prompts, 1 if shared else n)
    given, candidates = given.to(logits.device), candidates.to(logits.device)
    nothing = torch.zeros(n, dtype=torch.float64, device=logits.device)
    for j in range(lead):
        yield j, given[j].expand(n), nothing
    if shared:
        logits = engine.feed(given[:lead].expand(len(prompts), -1)).repeat_interleave(n, dim=0)
        engine.fork(n)
    j = lead
    while j < config.cells:
        fed = 1
        if given[j] < 0:
            tokens = _draw_token(engine, logits, candidates, settings, j)
            yield j, tokens, _log_p(logits[:n], tokens)
        elif score_known:
            tokens = given[j].expand(n)
            yield j, tokens, _log_p(logits[:n], tokens)
        else:
            fed = _run(given, j)
            for i in range(j, j + fed):
                yield i, given[i].expand(n), nothing
        j += fed
        if j == config.cells or (j >= end and not score_known):
            break
        if fed > 1:
            logits = engine.feed(given[j - fed : j].expand(len(logits), -1))
        else:
            token = given[j - 1].expand(n) if given[j - 1] >= 0 else tokens
            logits = engine.step(torch.cat([token, token]) if guided else token)
    for i in range(j, config.cells):
        yield i, given[i].expand(n), nothing


def _draw_token(engine: Engine, logits: Tensor, candidates: Tensor, settings: SamplingSettings, j: int) -> Tensor:
    """One token a candidate from logits [N, V], or [2 N, V] where the second half is the empty caption's."""
    n = len(candidates)
    if settings.guidance_scale != 1:
        logits = torch.lerp(logits[n:], logits[:n], settings.guidance_scale)
    with backends.use(engine.backend):
        return ops.sample(
            logits,
            candidates,
            torch.tensor([j], device=logits.device),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
        )


def _log_p(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability [N] of tokens [N] under logits [N, V], float64."""
    return (logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)).double()


def sample(
    engine: Engine,
    text: Tensor,
    n: int,
    settings: SamplingSettings,
    *,
    wave: int = DEFAULT_WAVE,
    first: int = 0,
    known: Tensor | None = None,
    score_known: bool = False,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Wave]:
    """Draws candidates first … first + n - 1 of one caption, `wave` at a time, and yields each finished wave.

    Candidate i of a seed is the same picture whatever n is: its random stream is keyed by its number, and where the
    engine's rounding depends on the batch, every wave is filled up to the same size. on_token(j, tokens [wave]) is called
    after every token, for progress and previews. Raises ValueError for n or wave below 1.
    """
    if n < 1 or wave < 1:
        raise ValueError(f"got n={n} candidates in waves of {wave}, expected at least 1 of each")
    for start in range(0, n, wave):
        count = min(wave, n - start)
        size = count if engine.batch_invariant else wave
        candidates = torch.arange(first + start, first + start + size)
        tokens = torch.empty(size, engine.config.cells, dtype=torch.int64)
        log_likelihood = torch.zeros(size, dtype=torch.float64)
        for j, drawn, log_p in draw(engine, text, candidates, settings, known, score_known):
            tokens[:, j] = drawn.cpu()
            log_likelihood += log_p.cpu()
            if on_token is not None:
                on_token(j, tokens[:count])
        yield Wave(candidates[:count], tokens[:count], log_likelihood[:count])


def check_known(known: Tensor, cells: int, vocab: int) -> None:
    """Raises ValueError unless known is [cells] int64 of tokens below vocab, or -1."""
    if known.shape != (cells,) or known.dtype != torch.int64:
        raise ValueError(f"got known tokens {list(known.shape)} {known.dtype}, expected [{cells}] int64")
    if int(known.min()) < -1 or int(known.max()) >= vocab:
        raise ValueError(f"got known tokens from {int(known.min())} to {int(known.max())}, expected -1 to {vocab - 1}")


def _run(known: Tensor, start: int) -> int:
    """How many known tokens there are in a row from `start`."""
    unknown = (known[start:] < 0).nonzero()
    return int(unknown[0]) if len(unknown) else len(known) - start
