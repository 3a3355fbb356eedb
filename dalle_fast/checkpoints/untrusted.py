"""Reading weight files of unknown origin: no code of theirs runs unless the user vouches for the file by its SHA-256."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch

from dalle_fast.weights import WeightError


def sha256(path: Path) -> str:
    """Raises WeightError if the file can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightError(f"cannot read {path}: {error.strerror}") from None


def read(path: Path, *, trust_pickle: bool = False, expected_sha256: str | None = None) -> tuple[Any, str]:
    """What torch.save wrote, memory-mapped where the format allows, and the file's SHA-256.

    Only tensors and plain containers are read (torch's weights_only). With trust_pickle, and only if the file has
    expected_sha256, arbitrary pickles too: they run code. Raises WeightError for a file that doesn't qualify.
    """
    digest = sha256(path)
    if expected_sha256 is not None and digest != expected_sha256.lower():
        raise WeightError(f"got {path} with SHA-256 {digest}, expected {expected_sha256.lower()}")
    if trust_pickle and expected_sha256 is None:
        raise WeightError("got trust_pickle without a SHA-256, expected the one of the file that you trust")
    for mmap in (True, False):  # torch's format of before 1.6 can't be mapped
        try:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=not trust_pickle), digest
        except (
            RuntimeError,
            ValueError,
            pickle.UnpicklingError,
            EOFError,
            OSError,
            AttributeError,
            ImportError,
        ) as error:
            problem = (str(error) or type(error).__name__).splitlines()[0]
    raise WeightError(f"cannot read {path}: {problem}")
