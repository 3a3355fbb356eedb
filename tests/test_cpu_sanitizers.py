"""tests/cpu_harness.cpp under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
# Each set beside the flag of /proc/cpuinfo that it asks most of.
SETS = {"avx2": "avx2", "avx512_vnni": "avx512_vnni", "avx512": "avx512_bf16", "amx": "amx_bf16"}
PORTABLE = [p for p in sorted((SOURCES / "cpu").glob("*.cpp")) if not p.stem.endswith(tuple("_" + isa for isa in SETS))]

pytestmark = pytest.mark.skipif(COMPILER is None or not SOURCES.is_dir(), reason="no C++ compiler or no sources here")


def compile_all(folder, sanitizers):
    """The harness with all kernels, or skips if the compiler lacks the sanitizer's library."""
    assert COMPILER is not None
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-pthread",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        f"-I{SOURCES}",
    ]
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    if subprocess.run([COMPILER, *flags, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode:
        pytest.skip(f"{COMPILER} has no {sanitizers} sanitizer here")
    flags_of = runpy.run_path(str(HERE.parent / "setup.py"))["ISA_FLAGS"]
    sets, wide, define = ["portable"], [], []
    has = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    for isa, flag in SETS.items():
        if flag in has:
            sets.append(isa)
            wide.append((SOURCES / f"cpu/kernels_{isa}.cpp", flags_of[isa]))
            define.append(f"-DDALLE_FAST_HAS_{isa.upper()}=1")
    objects = []
    for source, own in [*((p, define) for p in PORTABLE), *wide, (HERE / "cpu_harness.cpp", [])]:
        objects.append(str(folder / f"{source.stem}.o"))
        done = subprocess.run(
            [COMPILER, *flags, *own, "-c", str(source), "-o", objects[-1]], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    subprocess.run([COMPILER, *flags, *objects, "-ldl", "-o", str(folder / "harness")], check=True)
    return folder / "harness", sets


def check(harness, isa):
    environment = {**os.environ, "DALLE_FAST_CPU_ISA": isa, "DALLE_FAST_CPU_POOL": "own", "LD_PRELOAD": ""}
    done = subprocess.run([str(harness)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == f"done {isa} own", done.stdout + done.stderr[-4000:]


def test_memory_and_undefined_behaviour(tmp_path):
    harness, sets = compile_all(tmp_path, "address,undefined")
    for isa in sets:
        check(harness, isa)


def test_threads(tmp_path):
    harness, sets = compile_all(tmp_path, "thread")
    check(harness, sets[-1])
