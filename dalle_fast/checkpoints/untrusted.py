"""Reading weight files of unknown origin: none of their code ever runs."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dalle_fast.weights import WeightError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Inert:
    """Stands for an object of a class that is not torch's own: keeps what the file says about it, and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def sha256(path: Path) -> str:
    """Raises WeightError if the file can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightError(f"cannot read {path}: {error.strerror}") from None


def read(path: Path, *, trust_pickle: bool = False, trusted: Collection[str] = ()) -> tuple[Any, dict[str, str]]:
    """What torch.save or safetensors wrote, memory-mapped where the format allows, and the SHA-256 of each file by name.

    A folder is read shard by shard and must hold flat dictionaries of tensors, which are joined (of a whole module, its
    tensors under the file's stem: OpenAI's encoder.pkl and decoder.pkl). Only tensors and plain
    containers are read (torch's weights_only). Files that hold objects of other classes, such as whole modules, need
    trust_pickle and their SHA-256 among `trusted`; they become Inert objects, and even then no code of theirs runs.
    Raises WeightError for a file that doesn't qualify, or that has none of the digests in `trusted` if there are any.
    """
    if trust_pickle and not trusted:
        raise WeightError("got trust_pickle without a SHA-256, expected the one of each file that you trust")
    if not path.is_dir():
        content, digest = _read_file(path, trust_pickle, trusted)
        return content, {path.name: digest}
    shards = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    if not shards:
        raise WeightError(f"got folder {path} without weight files, expected one of {', '.join(SUFFIXES)}")
    joined: dict[str, Any] = {}
    digests = {}
    for shard in shards:
        content, digests[shard.name] = _read_file(shard, trust_pickle, trusted)
        if isinstance(content, Inert):
            content = dict(module_tensors(content, f"{shard.stem}."))
        if not isinstance(content, Mapping):
            raise WeightError(f"{shard} is no dictionary of tensors, expected shards of one")
        if twice := sorted(set(content) & set(joined)):
            raise WeightError(f"{shard} holds {', '.join(map(str, twice[:8]))} again, expected shards without overlap")
        joined |= content
    return joined, digests


def _read_file(path: Path, trust_pickle: bool, trusted: Collection[str]) -> tuple[Any, str]:
    digest = sha256(path)
    if trusted and digest not in {known.lower() for known in trusted}:
        raise WeightError(f"got {path} with SHA-256 {digest}, expected {' or '.join(trusted)}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path), digest
        except SafetensorError as error:
            raise WeightError(f"cannot read {path}: {error}") from None
    foreign = _foreign_classes(path)
    if foreign and not trust_pickle:
        more = " …" if len(foreign) > 3 else ""
        raise WeightError(
            f"cannot read {path}: it holds objects of {', '.join(foreign[:3])}{more}, not only tensors; "
            f"if you trust it, say so with its SHA-256 {digest}"
        )
    stand_ins: list[Any] = [(type("Inert", (Inert,), {}), name) for name in foreign]
    for mmap in (True, False):  # torch's format of before 1.6 can't be mapped
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True), digest
        except (
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            pickle.UnpicklingError,
            EOFError,
            OSError,
            AttributeError,
            ImportError,
        ) as error:
            problem = (str(error) or type(error).__name__).splitlines()[0]
    raise WeightError(f"cannot read {path}: {problem}")


def _foreign_classes(path: Path) -> list[str]:
    """Names of the classes and functions in a file that torch's weights_only refuses; none for what is no torch file."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # whatever is wrong with the file, torch.load says it better
        return []


def module_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module that was read as Inert objects, by their names in its state_dict."""
    for kind in ("_parameters", "_buffers"):
        for name, tensor in dict(getattr(module, kind, None) or {}).items():
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor.detach()
    for name, child in dict(getattr(module, "_modules", None) or {}).items():
        yield from module_tensors(child, f"{prefix}{name}.")
