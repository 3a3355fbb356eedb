"""Weight files: safetensors in and out, checked before use, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

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
    problems: list[str] = []
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            problems += [f"{name} is missing" for name in expected if name not in names]
            problems += [f"{name} is unexpected" for name in sorted(names - set(expected))]
            for name in (name for name in expected if name in names):
                tensor = file.get_tensor(name)
                if tensor.shape != expected[name].shape:
                    problems.append(f"{name} is {list(tensor.shape)}, expected {list(expected[name].shape)}")
                    continue
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    problems.append(f"{name} has values that are not finite")
                kind = dtype if tensor.is_floating_point() else None
                if kind is not None and name in exact:
                    kind = torch.promote_types(kind, tensor.dtype)
                state[name] = tensor.to(device=device, dtype=kind)
    except (OSError, SafetensorError) as error:
        raise WeightError(f"cannot read {path}: {error}") from None
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightError(f"{path} does not fit: {'; '.join(problems[:8])}{more}")
    return state
