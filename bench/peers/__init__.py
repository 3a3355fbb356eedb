"""The other ways to do the same: one small adapter each, which says why where it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, Protocol

import pytest
from torch import Tensor


class Stepper(Protocol):
    """Decodes given pictures token by token: what a step benchmark drives."""

    positions: int | None  # how many cells to sample, where playing a whole picture would take minutes; None: all

    def seek(self, cell: int) -> None:
        """Gets ready to take image token `cell` of every candidate."""
        ...

    def step(self) -> Tensor:
        """Takes it and returns the logits of the next one, [B, image_vocab]."""
        ...

    def nbytes(self) -> int:
        """Bytes of the cache."""
        ...


def rows(x: Tensor, batch: int) -> Tensor:
    """The streams [2, …] that a benchmark decodes, dealt out to the candidates: [B, …]."""
    return x[[i % len(x) for i in range(batch)]]


def load(module: str) -> Any:
    """Imports a peer, or skips the case with the reason."""
    try:
        return import_module(module)
    except Exception as error:  # a peer's own failing imports are a reason like any other
        pytest.skip(f"{module} cannot be imported: {error}")


def needs(reason: Callable[[], str | None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Skips the case where reason() answers with one."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if why := reason():
                pytest.skip(why)
            return function(*args, **kwargs)

        return wrapper

    return decorate
