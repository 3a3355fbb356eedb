"""setup.py: what it builds, what it leaves out and why, and what a wheel holds. A tiny package stands in for ours."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = (
    "DALLE_FAST_BUILD",
    "DALLE_FAST_BUILD_CUDA",
    "CUDA_HOME",
    "TORCH_CUDA_ARCH_LIST",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
)

PYPROJECT = """
[project]
name = "dalle_fast"
version = "1.2.3"
[tool.setuptools]
packages = ["dalle_fast"]
"""
BINDINGS = """
#include <Python.h>
int portable(); int wide();
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddIntConstant(m, "portable", portable());
  PyModule_AddIntConstant(m, "has_avx512", DALLE_FAST_HAS_AVX512);
  PyModule_AddStringConstant(m, "version", DALLE_FAST_VERSION);
  return m;
}
"""
PORTABLE = """
#include "answer.h"
#ifdef __AVX2__
#error "portable code was compiled for AVX2"
#endif
int portable() { return ANSWER; }
"""
WIDE = """
#if !defined(__AVX512F__) || !defined(__AVX512BF16__) || !defined(__AVX512VNNI__)
#error "compiled without AVX-512"
#endif
int wide() { return 512; }
"""
KERNEL = "__global__ void add(float* x) { x[threadIdx.x] += 1.f; }\n"
STACK_FRAME = """
__global__ void stack(float* x, int j) {
  float a[100];
  for (int i = 0; i < 100; i++) a[i] = x[i * 1024 + threadIdx.x];
  x[0] = a[j];
}
"""
SPILL = """
__global__ void __launch_bounds__(1024, 2) spill(float* x) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; i++) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = a[i] * a[(i * 7 + 3) % 64];
}
"""


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dalle_fast_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Project:
    """A small checkout with the real setup.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.write("csrc/bindings.cpp", BINDINGS)
        self.write("csrc/cpu/portable.cpp", PORTABLE)
        self.write("csrc/cpu/wide_avx512.cpp", WIDE)
        self.write("csrc/answer.h", "#define ANSWER 42\n")
        self.write("dalle_fast/__init__.py", '__version__ = "1.2.3"\n')
        self.write("pyproject.toml", PYPROJECT)
        shutil.copy(ROOT / "setup.py", folder)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(self, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(self.out)]
        return subprocess.run(command, cwd=self.folder, env=clean | env, capture_output=True, text=True, check=False)

    @property
    def module(self) -> Path:
        return self.out / "dalle_fast" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))

    def info(self) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = json.loads((self.out / "dalle_fast/_build_info.json").read_text())
        return found


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "a folder with spaces")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")


@needs_compiler
def test_builds_a_module_and_only_what_changed(project: Project) -> None:
    assert project.build(DALLE_FAST_BUILD="1", DALLE_FAST_BUILD_CUDA="0").returncode == 0
    assert project.info()["cpp"]["built"] and "portable" in str(project.info()["cpp"]["instruction_sets"])
    assert "DALLE_FAST_BUILD_CUDA=0" in str(project.info()["cuda"]["why_not"])
    code = "from dalle_fast import _C; print(_C.portable, _C.version)"
    run = [sys.executable, "-P", "-c", code]
    shutil.copy(project.folder / "dalle_fast/__init__.py", project.module.parent)
    environment = os.environ | {"PYTHONPATH": str(project.out)}
    assert subprocess.run(run, env=environment, capture_output=True, text=True).stdout == "42 1.2.3\n"
    assert "no work to do" in project.build(DALLE_FAST_BUILD_CUDA="0").stdout
    project.write("csrc/answer.h", "#define ANSWER 43\n")
    again = project.build(DALLE_FAST_BUILD_CUDA="0").stdout
    assert "portable.cpp" in again and "bindings.cpp" not in again
    assert subprocess.run(run, env=environment, capture_output=True, text=True).stdout == "43 1.2.3\n"


def test_without_a_compiler_it_installs_and_says_how_to_get_one(project: Project) -> None:
    assert project.build(PATH="").returncode == 0
    assert not project.module.exists()
    assert project.info()["cpp"]["built"] is False
    assert "apt install g++ python3-dev" in str(project.info()["cpp"]["why_not"])
    assert "no C++ compiler was found" in last_line(project.build(PATH="", DALLE_FAST_BUILD="1"))
    assert "DALLE_FAST_BUILD_CUDA=1" in last_line(project.build(PATH="", DALLE_FAST_BUILD_CUDA="1"))


def test_it_can_be_switched_off(project: Project) -> None:
    assert project.build(DALLE_FAST_BUILD="0").returncode == 0 and not project.module.exists()
    assert "DALLE_FAST_BUILD=0" in str(project.info()["cpp"]["why_not"])
    assert "expected auto, 1 or 0" in last_line(project.build(DALLE_FAST_BUILD="yes"))


@needs_compiler
def test_an_error_in_the_sources_is_loud(project: Project) -> None:
    project.write("csrc/cpu/portable.cpp", "int portable() { return }\n")
    done = project.build(DALLE_FAST_BUILD_CUDA="0")
    assert "DALLE_FAST_BUILD=0 leaves that part out" in last_line(done) and "expected primary-expression" in done.stdout


@needs_compiler
def test_the_cuda_part_needs_nvcc_only_when_asked_for(project: Project) -> None:
    assert project.build().returncode == 0
    assert project.info()["cuda"]["why_not"] == "this version has no CUDA kernels"
    project.write("csrc/add.cu", KERNEL)
    nowhere = str(project.folder / "nowhere")
    assert project.build(CUDA_HOME=nowhere).returncode == 0 and project.module.exists()
    assert "holds no bin/nvcc" in str(project.info()["cuda"]["why_not"])
    assert "holds no bin/nvcc" in last_line(project.build(CUDA_HOME=nowhere, DALLE_FAST_BUILD_CUDA="1"))


@needs_compiler
def test_a_failing_or_incomplete_nvcc(project: Project) -> None:
    project.write("csrc/add.cu", KERNEL)
    home = project.folder / "cuda"
    project.write("cuda/bin/nvcc", '#!/bin/sh\ncase "$1" in --*) echo "release 13.0, sm_80" ;; *) exit 3 ;; esac\n')
    (home / "bin/nvcc").chmod(0o755)
    assert project.build(CUDA_HOME=str(home)).returncode == 0
    assert "has no cuda_runtime.h" in str(project.info()["cuda"]["why_not"])
    project.write("cuda/include/cuda_runtime.h", "")
    project.write("cuda/lib64/libcudart_static.a", "")
    assert (
        "nvcc failed" in (line := last_line(project.build(CUDA_HOME=str(home)))) and "DALLE_FAST_BUILD_CUDA=0" in line
    )


@needs_nvcc
def test_cuda_builds_and_a_spill_or_a_stack_frame_fails_it(project: Project) -> None:
    project.write("csrc/add.cu", KERNEL)
    assert project.build(DALLE_FAST_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a+PTX").returncode == 0
    assert project.info()["cuda"]["targets"] == ["sm_90a", "compute_90a"]
    for source, message in ((STACK_FRAME, "size of stack frame"), (SPILL, "Registers are spilled")):
        project.write("csrc/add.cu", source)
        done = project.build(TORCH_CUDA_ARCH_LIST="8.0")
        assert "nvcc failed" in last_line(done) and message in done.stdout


@pytest.mark.parametrize(
    ("arch_list", "targets"),
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0a+PTX", ["sm_80", "sm_90a", "compute_90a"]),
        ("8.6, 12.0", ["sm_86", "sm_120"]),
        (None, ["sm_80", "sm_90a", "sm_100", "compute_100"]),
    ],
)
def test_cuda_targets(setup_py: ModuleType, arch_list: str | None, targets: list[str]) -> None:
    assert setup_py.cuda_targets(arch_list, [80, 90, 100]) == targets


def test_cuda_targets_of_an_older_nvcc(setup_py: ModuleType) -> None:
    assert setup_py.cuda_targets(None, [80, 86, 89, 90]) == ["sm_80", "sm_90a", "compute_90"]


@pytest.mark.parametrize("arch_list", ["Ampere", "80", "7.5", "8.0;;9.0x"])
def test_wrong_cuda_targets(setup_py: ModuleType, arch_list: str) -> None:
    with pytest.raises(setup_py.CompileError, match="in TORCH_CUDA_ARCH_LIST, expected"):
        setup_py.cuda_targets(arch_list, [80, 90])


@pytest.mark.parametrize(("name", "value"), [("byteorder", "big"), ("maxsize", 2**31 - 1)])
def test_big_endian_and_32_bit_are_refused(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(sys, name, value)
    with pytest.raises(setup_py.Unavailable, match="64-bit little-endian"):
        setup_py.find_compiler()


def checkout_files() -> set[str]:
    """Every Python file and asset of the package, as a wheel should name them."""
    package = ROOT / "dalle_fast"
    wanted = [
        p for p in package.rglob("*") if p.suffix in (".py", ".pyi", ".safetensors", ".json") or p.name == "py.typed"
    ]
    kernels = {f"dalle_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    return {str(p.relative_to(ROOT)) for p in wanted if "__pycache__" not in p.parts} | kernels


def test_sdist_and_wheel_hold_everything(tmp_path: Path) -> None:
    """checkout -> sdist -> wheel, without compiling; and what the wheel holds runs on its own."""
    checkout, unpacked = tmp_path / "checkout", tmp_path / "unpacked"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "out*", "__pycache__", "*.so", ".*_cache", "*.egg-info"
    )
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    env = os.environ | {"DALLE_FAST_BUILD": "0"}

    def backend(hook: str, folder: Path) -> Path:
        code = f"from setuptools import build_meta; print(build_meta.{hook}({str(tmp_path)!r}))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True
        )
        return tmp_path / done.stdout.splitlines()[-1]

    with tarfile.open(backend("build_sdist", checkout)) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
        sdist.extractall(unpacked, filter="data")
    assert {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "csrc/bindings.cpp",
        "LICENSE",
        "tests/conftest.py",
    } <= names
    assert checkout_files() - {"dalle_fast/_build_info.json"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "_build_info" in name]
    wheel = backend("build_wheel", next(unpacked.iterdir()))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(site)
    assert checkout_files() <= held | {"dalle_fast/_build_info.json"} and "dalle_fast/_build_info.json" in held
    assert not [name for name in held if not name.startswith(("dalle_fast/", "dalle_fast-"))]
    command = [sys.executable, "-P", "-m", "dalle_fast.env"]
    env = os.environ | {"PYTHONPATH": str(site)}
    report = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert str(site) in report
    assert "C++ kernels: not built: switched off by DALLE_FAST_BUILD=0" in report
