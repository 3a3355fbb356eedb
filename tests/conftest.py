"""What every test relies on: the installed package is under test, memory that nobody wrote is NaN, seeds are set."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import hypothesis
import numpy as np
import pytest
import torch
import torch.utils._device as torch_device

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when a kernel is defined: before we import any

import dalle_fast

# `with torch.device(...)` recognises torch.empty by identity, and remembers it when first used: before we replace it below.
# Without this line a 12-billion-parameter model "on the meta device" would be allocated.
torch_device._device_constructors()

# Two workers of pytest-xdist with two threads each would fight for two cores.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def installed_folders() -> list[Path]:
    """Where pip put dalle_fast: the checkout for an editable installation, else site-packages."""
    folders = []
    for distribution in metadata.distributions(name="dalle_fast"):
        if distribution.read_text("RECORD") is None:  # an egg-info folder that a build left in the checkout
            continue
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            folders.append(Path(unquote(urlparse(origin["url"]).path)) / "dalle_fast")
        else:
            folders.append(Path(str(distribution.locate_file("dalle_fast"))))
    return folders


def pytest_configure(config: pytest.Config) -> None:
    imported = Path(dalle_fast.__file__).resolve().parent
    installed = [folder.resolve() for folder in installed_folders()]
    if imported not in installed:
        advice = f"installed is {installed[0]}: use plain `pytest`" if installed else "run: pip install -e '.[test]'"
        raise pytest.UsageError(f"the tests would run on {imported}, which is not installed; {advice}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills with NaN, or with the largest integer, which no index survives."""
    if torch.compiler.is_compiling() or tensor.dtype == torch.bool:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.is_complex() else tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and its kin return NaN, so that a kernel which leaves a hole in its output cannot pass by luck."""

    def poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            return poison(make(*args, **kwargs))

        return wrapper

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    yield
