"""The decode loop: waves of candidates, a random stream each, guidance, and pictures of which a part is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dalle_fast import backends, ops
from dalle_fast.engine import DrawingEngine, Engine
from dalle_fast.logits import log_probability
from dalle_fast.planning import even_waves, halving

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
    """Finished candidates, of several captions caption after caption."""

    candidates: Tensor  # [n] int64: their numbers, which key their random streams; each caption has the same
    tokens: Tensor  # [n, cells] int64
    log_likelihood: Tensor  # [n] float64, nats: log p of the drawn tokens, before temperature, guidance and cuts
    known_log_p: Tensor  # [n] float64, nats: log p of the known tokens after the first drawn one, where scored, else 0


def draw(
    engine: Engine,
    text: Tensor,
    candidates: Tensor,
    settings: SamplingSettings,
    known: Tensor | None = None,
    score_known: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Draws one batch of candidates and yields (j, tokens [N], log p [N]) for every image token j in turn.

    text [P, caption_len]; candidates [N / P] int64, of each caption; known [cells] int64 holds the tokens that are given
    and -1 where one is to be drawn. Leading known tokens are computed once for all candidates of a caption, later runs are
    fed in chunks, and those after the last drawn token not at all, unless score_known asks for their log p. log p is the
    model's own log-probability of the token (temperature 1, no guidance, no cuts), and 0 for known tokens that are not scored.

    What is yielded is on the engine's device, may be its own buffer, and holds until the next token is asked for. Nothing
    here waits for the device.
    """
    config, each, n = engine.config, len(candidates), len(text) * len(candidates)
    settings.check(config.image_vocab)
    how = asdict(settings)
    known = torch.full((config.cells,), -1) if known is None else known
    check_known(known, config.cells, config.image_vocab)
    host = known.tolist()  # what is to be done is decided here, and never asks the device
    end = max((j + 1 for j, token in enumerate(host) if token < 0), default=0)
    lead = _run(host, 0)
    guided = settings.guidance_scale != 1
    prompts = torch.cat([text, torch.zeros_like(text)]) if guided else text
    shared = 0 < lead < config.cells
    logits = engine.prefill(prompts, 1 if shared else each)
    given, candidates = known.to(logits.device), candidates.repeat(len(text)).to(logits.device)
    places = torch.arange(config.cells, device=logits.device)
    nothing = torch.zeros(n, dtype=torch.float64, device=logits.device)
    for j in range(lead):
        yield j, given[j].expand(n), nothing
    if shared:
        logits = engine.feed(given[:lead].expand(len(prompts), -1)).repeat_interleave(each, dim=0)
        engine.fork(each)
    j, ahead = lead, None  # ahead: what the last step has drawn already
    waiting: list[Tensor] = []  # [N, k] each: tokens that the engine has not been given yet
    while j < end or (j < config.cells and score_known):
        if host[j] >= 0 and not score_known:
            run = _run(host, j)
            for i in range(j, j + run):
                yield i, given[i].expand(n), nothing
            waiting.append(given[j : j + run].expand(n, -1))
            j += run
            continue
        if waiting:  # the last token drawn and the known ones after it, at once
            last = torch.cat(waiting, dim=1) if len(waiting) > 1 else waiting[0]
            if isinstance(engine, DrawingEngine):
                if last.shape[1] > 1:
                    engine.feed(_of_batch(last[:, :-1], guided))
                forced = None if host[j] < 0 else given[j].expand(n)
                ahead = engine.sample(last[:, -1], candidates, given=forced, **how)
            else:
                logits = engine.feed(_of_batch(last, guided))
        if ahead is not None:
            tokens, log_p = ahead.tokens, ahead.log_p
        else:
            tokens = (
                given[j].expand(n) if host[j] >= 0 else _draw(engine, logits, candidates, settings, places[j : j + 1])
            )
            log_p = log_probability(logits[:n], tokens)
        yield j, tokens, log_p
        waiting = [tokens[:, None]]
        j += 1
    for i in range(j, config.cells):
        yield i, given[i].expand(n), nothing


def _of_batch(tokens: Tensor, guided: bool) -> Tensor:
    """[N, k] -> [B, k]: with guidance, the empty caption's sequences get the same tokens."""
    return torch.cat([tokens, tokens]) if guided else tokens


def _draw(engine: Engine, logits: Tensor, candidates: Tensor, settings: SamplingSettings, place: Tensor) -> Tensor:
    """One token a candidate from logits [N, V], or [2 N, V] where the second half is the empty caption's."""
    n = len(candidates)
    if settings.guidance_scale != 1:
        logits = torch.lerp(logits[n:], logits[:n], settings.guidance_scale)
    with backends.use(engine.backend):
        return ops.sample(
            logits,
            candidates,
            place,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
        )


def default_wave(engine: Engine, n: int, settings: SamplingSettings | None = None) -> int:
    """How many of n candidates are drawn at a time where nobody says: on a GPU the fewest even waves that its memory holds,
    elsewhere DEFAULT_WAVE. Raises ValueError, with how much is missing, where not even one candidate fits."""
    most = engine.most_candidates(settings is not None and settings.guidance_scale != 1)
    return DEFAULT_WAVE if most is None else even_waves(n, most)[0]


def sample(
    engine: Engine,
    text: Tensor,
    n: int,
    settings: SamplingSettings,
    *,
    wave: int | None = None,
    first: int = 0,
    known: Tensor | None = None,
    score_known: bool = False,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Wave]:
    """Draws candidates first … first + n - 1 of each caption of text [P, caption_len], `wave` at a time, and yields each
    finished wave. Several captions are drawn side by side: the engine must hold P * wave candidates, and where its rounding
    depends on the batch, it may round otherwise than for one.

    wave: None for default_wave. One that runs out of device memory is begun anew at half the size, with a warning.
    Candidate i of a seed is the same picture whatever n is, in waves of the same size: its random stream is keyed by its
    number, and where the engine's rounding depends on the batch, every wave is filled up to the same size.
    on_token(j, tokens [wave]) is called for every token, in turn, for progress and previews: at once on a CPU, after each
    row on a GPU, where a picture is else copied once, when it is finished. Raises ValueError for n or wave below 1.
    """
    if n < 1 or (wave is not None and wave < 1):
        raise ValueError(f"got n={n} candidates in waves of {wave}, expected at least 1 of each")
    wave = default_wave(engine, n, settings) if wave is None else wave
    given = [False] * engine.config.cells if known is None else (known >= 0).tolist()

    def run(start: int, count: int, most: int) -> Wave:
        size = count if engine.batch_invariant else most
        candidates = torch.arange(first + start, first + start + size)

        def asked(rows: Tensor) -> Tensor:  # of each caption those that are no filling
            return rows.view(len(text), size, *rows.shape[1:])[:, :count].flatten(0, 1)

        tokens, sums, shown = None, None, 0
        for j, drawn, log_p in draw(engine, text, candidates, settings, known, score_known):
            if tokens is None or sums is None:
                tokens = drawn.new_empty(len(drawn), engine.config.cells)
                sums = log_p.new_zeros(2, len(drawn))  # of what is drawn, of what is known
            tokens[:, j] = drawn
            sums[int(given[j])] += log_p
            if on_token is not None and (drawn.device.type == "cpu" or (j + 1) % engine.config.width == 0):
                for column in asked(tokens[:, shown : j + 1]).cpu().unbind(1):
                    on_token(shown, column)
                    shown += 1
        assert tokens is not None and sums is not None
        return Wave(candidates[:count].repeat(len(text)), asked(tokens).cpu(), *(asked(x).cpu() for x in sums))

    yield from halving(n, wave, run)


def check_known(known: Tensor, cells: int, vocab: int) -> None:
    """Raises ValueError unless known is [cells] int64 of tokens below vocab, or -1."""
    if known.shape != (cells,) or known.dtype != torch.int64:
        raise ValueError(f"got known tokens {list(known.shape)} {known.dtype}, expected [{cells}] int64")
    if int(known.min()) < -1 or int(known.max()) >= vocab:
        raise ValueError(f"got known tokens from {int(known.min())} to {int(known.max())}, expected -1 to {vocab - 1}")


def _run(known: list[int], start: int) -> int:
    """How many known tokens there are in a row from `start`."""
    return next((j for j in range(start, len(known)) if known[j] < 0), len(known)) - start
