"""What nvcc makes of the kernels for sm_90a: registers, shared memory and spills, kept in docs/cuda_resources.md, and the
instructions that were meant. `python tests/test_cuda_build.py` writes the table anew."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/cuda_resources.md"
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc")
TYPES = {"__half": "fp16", "__nv_bfloat16": "bf16"}


def cuobjdump() -> str | None:
    """On PATH, or the one that comes with triton."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    bundled = [str(Path(folder, "backends/nvidia/bin/cuobjdump")) for folder in folders or []]
    return shutil.which("cuobjdump") or next((path for path in bundled if Path(path).is_file()), None)


pytestmark = pytest.mark.skipif(not NVCC or not shutil.which("c++filt"), reason="no nvcc or no c++filt here")


class Kernel(NamedTuple):
    name: str
    registers: int
    static_shared: int
    stack: int
    spills: int


def compile_one(source: Path, folder: Path) -> list[Kernel]:
    """Makes <folder>/<source>.cubin."""
    flags = ["-std=c++17", "-O3", "-cubin", "-arch=sm_90a", "-Werror", "all-warnings", "-Xptxas", "-v"]
    out = folder / f"{source.stem}.cubin"
    command = [str(NVCC), *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return kernels_of(done.stdout + done.stderr)


def kernels_of(report: str) -> list[Kernel]:
    """From what ptxas -v prints."""
    found = []
    for part in re.split(r"Compiling entry function '", report)[1:]:
        numbers = [
            re.search(pattern, part) for pattern in (r"Used (\d+) reg", r"(\d+) bytes smem", r"(\d+) bytes stack")
        ]
        registers, shared, stack = (int(match[1]) if match else 0 for match in numbers)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        mangled = part.partition("'")[0]
        plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
        match = re.search(r"(\w+)(?:<(.*)>)?\([^()]*\)\s*$", plain.replace("(anonymous namespace)::", ""))
        assert match, plain
        arguments = re.sub(r"\(\w+(?:::\w+)*\)", "", match[2] or "")  # (int)64, (dalle_fast::DType)3
        for long, short in TYPES.items():
            arguments = arguments.replace(long, short)
        found.append(Kernel(match[1] + (f" {arguments}" if arguments else ""), registers, shared, stack, spills))
    return found


def compile_all(folder: Path) -> dict[str, list[Kernel]]:
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: compile_one(source, folder), SOURCES)
    return {source.name: sorted(kernels) for source, kernels in zip(SOURCES, made, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture(scope="module")
def compiled(folder: Path) -> dict[str, list[Kernel]]:
    return compile_all(folder)


def version() -> str:
    done = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    assert match
    return match[1]


def table(compiled: dict[str, list[Kernel]]) -> str:
    lines = ["| source | kernel | registers | static shared memory | spills |", "|---|---|---:|---:|---:|"]
    for source, kernels in compiled.items():
        lines += [f"| {source} | {k.name} | {k.registers} | {k.static_shared} | {k.spills} |" for k in kernels]
    return f"nvcc {version()}, sm_90a:\n\n" + "\n".join(lines) + "\n"


def test_no_spill_and_no_stack_frame(compiled: dict[str, list[Kernel]]) -> None:
    assert all(kernels for kernels in compiled.values())
    for kernel in (k for kernels in compiled.values() for k in kernels):
        assert kernel.registers > 0 and kernel.stack == kernel.spills == 0, kernel


def test_the_document_is_current(compiled: dict[str, list[Kernel]]) -> None:
    text = DOCUMENT.read_text()
    if f"nvcc {version()}," not in text:
        pytest.skip(f"docs/cuda_resources.md is of another nvcc than {version()}")
    assert table(compiled) in text, "run python tests/test_cuda_build.py"


# LDG: global memory to registers; LDGSTS: to shared memory, asynchronously (cp.async); LDSM: ldmatrix; HMMA: mma.
MEANT = {
    "decode_attention.cu": (r"LDG\.E\.128", r"LDGSTS\.E[.A-Z]*\.128", r"LDSM\.16\.MT?88\.4", r"HMMA\.16816\.F32"),
    "sample.cu": (r"ATOMS\.", r"LDS\.128"),
    "skinny_linear.cu": (r"(LDG|LDGSTS)\.E[.A-Z]*\.128", r"HMMA\.16816\.F32"),
}  # fmt: skip


@pytest.mark.parametrize("source", [path.name for path in SOURCES])
def test_the_instructions_that_were_meant(compiled: dict[str, list[Kernel]], folder: Path, source: str) -> None:
    if not (tool := cuobjdump()):
        pytest.skip("no cuobjdump here")
    command = [tool, "--dump-sass", str((folder / source).with_suffix(".cubin"))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in MEANT[source]:
        assert re.search(rf"\b{instruction}", text), f"no {instruction} in {source}"
    assert not re.search(r"\b(LDL|STL)\b", text), f"{source} uses local memory"


def test_the_report_is_read() -> None:
    text = """ptxas info    : Compiling entry function '_Z4plusIfLi64EEvPT_' for 'sm_80'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 360 bytes cmem[0]
"""
    assert kernels_of(text) == [Kernel("plus float, 64", 40, 128, 8, 16)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        fresh = table(compile_all(Path(scratch)))
    DOCUMENT.write_text(DOCUMENT.read_text().partition("\nnvcc ")[0] + "\n" + fresh)
    sys.stdout.write(fresh)
