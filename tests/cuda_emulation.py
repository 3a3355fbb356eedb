"""Runs the functions of cuda_backend.py on kernels that g++ compiled against tests/cuda_on_cpu, or on a GPU.

The library is built once for all workers and sessions: its folder is named by what it was built from.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pybind11
import pytest
import torch
from torch import Tensor

from dalle_fast import cuda_backend

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = [
    "-std=c++17",
    "-O2",
    "-march=native",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
INCLUDE = [f"-I{HERE / 'cuda_on_cpu'}", f"-I{SOURCES}"]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

available = pytest.mark.skipif(
    COMPILER is None or "clang" in COMPILER or not SOURCES.is_dir(), reason="no g++ or no sources here"
)
MACHINES = {"forwards": pytest.mark.emulated, "backwards": pytest.mark.emulated, "gpu": pytest.mark.gpu}
machines = pytest.mark.parametrize(
    "machine", [pytest.param(m, marks=mark) for m, mark in MACHINES.items()], indirect=True
)


def compile_library(sources: Iterable[Path], target: Path, flags: Iterable[str] = ()) -> None:
    """A shared library of .cu and .cpp sources, two at a time."""
    assert COMPILER is not None

    def compile_one(source: Path) -> str:
        out = target.with_name(f"{target.stem.split('.')[0]}_{source.stem}.o")
        command = [COMPILER, *FLAGS, *INCLUDE, *flags, "-c", "-x", "c++", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.exit(f"{source.name} does not compile against tests/cuda_on_cpu:\n{done.stderr}", 1)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(target)], check=True)


@functools.cache
def build(name: str, *sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """The path of the library, built now or earlier by anybody."""
    inputs = [*sources, *SOURCES.glob("*.cuh"), *SOURCES.glob("*.h"), *(HERE / "cuda_on_cpu").glob("*.h")]
    digest = hashlib.sha256(repr((COMPILER, FLAGS, flags, SUFFIX)).encode())
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir(), f"dalle_fast_cuda_on_cpu-{os.getuid()}-{digest.hexdigest()[:16]}")
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to another user"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = folder / name
        if not target.exists():
            unfinished = folder / f"unfinished_{name}"
            compile_library(sources, unfinished, flags)
            unfinished.rename(target)
    return target


@functools.cache
def emulated() -> tuple[Any, ctypes.CDLL]:
    """(the module `_C` with its CUDA part only, the same library by ctypes)."""
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    defines = ["-DDALLE_FAST_HAS_CPU=0", "-DDALLE_FAST_HAS_CUDA=1", '-DDALLE_FAST_VERSION="tests"']
    sources = [*sorted(SOURCES.glob("*.cu")), SOURCES / "bindings.cpp"]
    path = build(f"_C{SUFFIX}", *sources, flags=(*includes, *defines))
    spec = importlib.util.spec_from_file_location("emulated._C", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda, control(path)


def control(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.cuda_on_cpu_allocate.restype = ctypes.c_void_p
    library.cuda_on_cpu_allocate.argtypes = [ctypes.c_size_t]
    return library


class Machine:
    """Calls a function of cuda_backend with its tensors where the kernels want them, and gives back what it changed."""

    def __init__(self, kind: str) -> None:
        self.device = "cuda" if kind == "gpu" else "cpu"
        if self.device == "cpu":
            self.kernels, self.library = emulated()
            self.library.cuda_on_cpu_backwards(int(kind == "backwards"))

    def guard(self, x: Tensor) -> Tensor:
        """A copy in memory that ends before a page nobody may touch."""
        if not x.numel():
            return x
        address = self.library.cuda_on_cpu_allocate(x.numel() * x.element_size())
        memory = (ctypes.c_char * (x.numel() * x.element_size())).from_address(address)
        copy = torch.frombuffer(memory, dtype=x.dtype).view(x.shape)
        return copy.copy_(x)

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Tensors are given, returned and changed on the CPU."""

        def each(result: Any, of: Callable[[Tensor], Tensor]) -> Any:
            return tuple(map(of, result)) if isinstance(result, tuple) else of(result)

        if self.device == "cuda":
            moved = [x.cuda() if isinstance(x, Tensor) else x for x in args]
            result = each(function(*moved, **options), Tensor.cpu)
        else:
            moved = [self.guard(x) if isinstance(x, Tensor) else x for x in args]
            reads = cuda_backend._reads
            made = {name: getattr(torch, name) for name in ("empty", "zeros")}
            counters = cuda_backend._Counters()
            with (
                patch.object(cuda_backend, "kernels", lambda: self.kernels),
                patch.object(cuda_backend, "_reads", lambda *key: tuple(self.guard(x) for x in reads(*key))),
                patch.object(cuda_backend, "counters", counters),
                patch.object(torch, "empty", lambda *a, **o: self.guard(made["empty"](*a, **o))),
                patch.object(torch, "zeros", lambda *a, **o: self.guard(made["zeros"](*a, **o))),
            ):
                result = each(function(*moved, **options), Tensor.clone)
            assert not any(x.any() for x in counters.of_stream.values()), "a kernel left its counters above zero"
        for given, now in zip(args, moved, strict=True):
            if isinstance(given, Tensor):
                given.copy_(now)
        if self.device == "cpu":
            self.library.cuda_on_cpu_release()
        return result
