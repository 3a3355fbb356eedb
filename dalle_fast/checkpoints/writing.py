"""Writing a converted folder: checked first, streamed tensor by tensor, and there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dalle_fast.weights import WeightError

CHUNK = 2**20  # values held in memory at a time
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass
class Part:
    """Files of a model folder: texts by file name, and one safetensors file whose tensors must fit `expected`."""

    texts: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    state: dict[str, Tensor] = field(default_factory=dict)  # emptied as it is written
    expected: Mapping[str, Tensor] = field(default_factory=dict)


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Missing and unexpected names, other shapes, types that aren't floating. No value is read."""
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unexpected" for name in sorted(set(state) - set(expected))]
    for name in (name for name in expected if name in state):
        tensor, shape = state[name], expected[name].shape
        if tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype not in TYPES:
            problems.append(f"{name} is {tensor.dtype}, expected floating point")
    return problems


def finite(tensor: Tensor) -> bool:
    """Chunk by chunk: isfinite of the whole would take as much memory again."""
    return all(bool(chunk.isfinite().all()) for chunk in torch.split(tensor.reshape(-1), CHUNK))


def check_all(parts: Sequence[Part]) -> None:
    """Raises WeightError naming every problem of every part; looks at values only if there is one, to name them all."""
    problems = [problem for part in parts for problem in check(part.state, part.expected)]
    if problems:
        floating = (
            (name, x) for part in parts for name, x in part.state.items() if name in part.expected and x.dtype in TYPES
        )
        problems += [f"{name} has values that are not finite" for name, x in floating if not finite(x)]
        raise WeightError("; ".join(problems))


def write_parts(folder: Path, parts: Sequence[Part], dtype: torch.dtype | None = None) -> None:
    """Raises WeightError naming every tensor with a value that is not finite (in dtype, if given)."""
    problems: list[str] = []
    for part in parts:
        for name, text in part.texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        if part.weights:
            with (folder / part.weights).open("wb") as file:
                problems += stream(file, part.state, dtype)
    if problems:
        raise WeightError("; ".join(f"{name} has values that are not finite" for name in problems))


def stream(file: BinaryIO, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> list[str]:
    """Writes the safetensors format (8 bytes of header length, JSON, values), a chunk at a time, dropping each tensor once
    it is written: shards of which no tensor is left are unmapped. Wider types come first, so that all are aligned;
    then the order of addresses, which is a mapped file's own. Rotary angles keep their type. Returns the names of tensors
    that are not finite."""
    kinds = {name: x.dtype if dtype is None or name == "rotary" else dtype for name, x in state.items()}
    names = sorted(state, key=lambda name: (-kinds[name].itemsize, state[name].data_ptr()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    start = 0
    for name in names:
        end = start + state[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": TYPES[kinds[name]], "shape": list(state[name].shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    problems = []
    for name in names:
        whole = True
        for chunk in torch.split(state.pop(name).detach().reshape(-1), CHUNK):
            values = chunk.to(kinds[name])
            whole = whole and bool(values.isfinite().all())
            file.write(values.view(torch.uint8).numpy().data)
        if not whole:
            problems.append(name)
    return problems


@contextmanager
def staged(dst: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside dst, whose files move into dst when the block ends well; else nothing is left, made parents included.

    Raises WeightError if dst is a file, or (unless overwrite) if one of the files is there already.
    """
    if dst.exists() and not dst.is_dir():
        raise WeightError(f"got {dst}, which is a file, expected a folder to write into")
    made = [folder for folder in (dst, *dst.parents) if not folder.exists()]
    staging: Path | None = None
    done = False
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
        yield staging
        files = sorted(p.relative_to(staging) for p in staging.rglob("*") if p.is_file())
        if there := [str(name) for name in files if (dst / name).exists() and not overwrite]:
            raise WeightError(f"{dst} already holds {', '.join(there)}; name another folder, or overwrite")
        for name in sorted(files, key=lambda name: str(name) == "config.json"):  # last: it makes a folder a model
            (dst / name).parent.mkdir(parents=True, exist_ok=True)
            os.chmod(staging / name, 0o644)
            os.replace(staging / name, dst / name)
        done = True
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in [] if done else made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
