"""Weight files: safetensors in and out, checked before use, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class WeightError(ValueError):
    """A weight or config file is missing, unreadable or not what the model needs; the message is one line."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write with a temporary path beside `path` and moves the result into place once the disk holds it: even after a
    power failure the file is whole or not there. That it is there by then is up to `sync`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        sync(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Returns once the disk holds a file's content, or of a folder the names in it. Raises OSError if it can't."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def save(path: Path, state: Mapping[str, Tensor]) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary))


def load(
    path: Path,
    expected: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    exact: Collection[str] = (),
) -> dict[str, Tensor]:
    """Reads the tensors named in `expected` (their shapes count, meta tensors will do), floating ones in `dtype`; those
    named in `exact` are widened to it, never narrowed.

    Raises WeightError listing every problem: missing and unexpected names, other shapes, values that are not finite.
    """
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            problems = _misfits(file, expected)
            for name in (name for name in expected if name in file.keys()):  # noqa: SIM118
                tensor = file.get_tensor(name)
                if not _finite(tensor):
                    problems.append(f"{name} has values that are not finite")
                kind = dtype if tensor.is_floating_point() else None
                if kind is not None and name in exact:
                    kind = torch.promote_types(kind, tensor.dtype)
                state[name] = tensor.to(device=device, dtype=kind)
    except (OSError, SafetensorError) as error:
        raise WeightError(f"cannot read {path}: {error}") from None
    _refuse(path, problems)
    return state


class WeightFile(Mapping[str, Tensor]):
    """The tensors of a file, each read when asked for, so that no copy of the whole is ever in memory. Names and shapes are
    checked on opening, values on reading. Raises WeightError as load does."""

    def __init__(self, path: Path, expected: Mapping[str, Tensor]) -> None:
        self.path, self._names = path, list(expected)
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
            problems = _misfits(self._file, expected)
        except (OSError, SafetensorError) as error:
            raise WeightError(f"cannot read {path}: {error}") from None
        _refuse(path, problems)

    def __enter__(self) -> WeightFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        if not _finite(tensor):
            _refuse(self.path, [f"{name} has values that are not finite"])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _misfits(file: Any, expected: Mapping[str, Tensor]) -> list[str]:
    names = set(file.keys())
    problems = [f"{name} is missing" for name in expected if name not in names]
    problems += [f"{name} is unexpected" for name in sorted(names - set(expected))]
    for name in (name for name in expected if name in names):
        shape, wanted = list(file.get_slice(name).get_shape()), list(expected[name].shape)
        if shape != wanted:
            problems.append(f"{name} is {shape}, expected {wanted}")
    return problems


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightError(f"{path} does not fit: {'; '.join(problems[:8])}{more}")
