"""What follows from logits, op by op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability [N] of tokens [N] under logits [N, V], float64."""
    return (logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)).double()


def at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def ending_with(sample: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op draw, op by op, around a backend's own sample."""

    def draw(
        logits: Tensor, temperature: float, top_k: int, top_p: float, guidance_scale: float, seed: int, candidates: Tensor,
        given: Tensor, position: Tensor, first_cell: int, x: Tensor, table: Tensor, rows: Tensor | None,
        columns: Tensor | None, first_place: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logits = at_least_float32(logits)
        own, index = logits[: len(candidates)], position - first_cell
        mixed = own if guidance_scale == 1 else torch.lerp(logits[len(candidates) :], own, guidance_scale)
        drawn = sample(mixed, temperature, top_k, top_p, seed, candidates, index)
        tokens = torch.where(given >= 0, given, drawn)
        values = table[tokens]
        if rows is not None and columns is not None:
            # Past the last place x may hold anything: nothing asks the device where it stands.
            place = (index + first_place).clamp(max=len(rows) * len(columns) - 1)
            values = values + rows[place // len(columns)] + columns[place % len(columns)]
        x.view(-1, *values.shape).copy_(values)
        return tokens, log_probability(own, tokens)

    return draw
