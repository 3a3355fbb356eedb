"""The other ways to do the same: one small adapter each, which says why where it cannot run."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
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


def load_part(package: str, module: str, advice: str, stand_ins: dict[str, types.ModuleType] | None = None) -> Any:
    """Imports one module of a package without the package's own __init__.py, which imports much that a transformer does
    not need; or skips the case with the reason. stand_ins: modules of the package that are not imported either, by name."""
    name = f"{package}.{module}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed; {advice}")
    root = Path((spec.submodule_search_locations or [""])[0])
    parts = module.split(".")[:-1]
    for i in range(len(parts) + 1):
        empty = types.ModuleType(".".join([package, *parts[:i]]))
        empty.__path__ = [str(root.joinpath(*parts[:i]))]
        sys.modules[empty.__name__] = empty
    sys.modules.update(stand_ins or {})
    return load(name)


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
