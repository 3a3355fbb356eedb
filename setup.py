"""Builds `dalle_fast._C`: C++ for CPUs and CUDA C++ for GPUs in one pybind11 module that knows no torch.

Because no torch header is involved, `pip install .` works in build isolation and one build serves every torch. ninja
compiles, in build/, so that a second build compiles only what changed. Which parts were built, and why one was not, is
written to `_build_info.json` beside the module; `dalle-fast info` prints it.

A source csrc/cpu/*_SET.cpp, SET one of ISA_FLAGS, is compiled for that instruction set; all others must run on any CPU.

Environment
  DALLE_FAST_BUILD       auto (default): build unless there is no compiler; 1: fail without one; 0: no `_C` at all
  DALLE_FAST_BUILD_CUDA  the same for the CUDA part (csrc/*.cu) and nvcc
  TORCH_CUDA_ARCH_LIST   GPUs to compile for, "8.0;9.0a;10.0+PTX" by default
  CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME as usual
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
INSTALL_COMPILER = "Debian and Ubuntu: apt install g++ python3-dev; then install dalle_fast again"
INSTALL_NVCC = "install the CUDA toolkit (or set CUDA_HOME), then install dalle_fast again"

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
VNNI_FLAGS = [*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")), "-mfma", "-mf16c"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512_vnni": VNNI_FLAGS,
    "avx512": [*VNNI_FLAGS, "-mavx512bf16"],
    "amx": [*VNNI_FLAGS, "-mavx512bf16", *(f"-mamx-{part}" for part in ("tile", "bf16", "int8"))],
}
DEFAULT_ARCH_LIST = "8.0;9.0a;10.0+PTX"
# A spill to local memory, a stack frame or any warning in a kernel fails the build: each costs more than it says.
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-pthread", "-Werror", "all-warnings"),
    *("-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror"),
]


class Unavailable(Exception):
    """This machine cannot build the part; the message says why."""


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        raise CompileError(f"got {name}={value!r}, expected auto, 1 or 0")
    return value


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


@dataclass
class Toolchain:
    """The host compiler: its command, its name and version, and the instruction sets it can compile for."""

    command: list[str]
    version: str
    instruction_sets: list[str]


def find_compiler() -> Toolchain:
    """Raises Unavailable without a compiler that makes Python modules from C++17."""
    if sys.byteorder != "little" or sys.maxsize <= 2**32:
        raise Unavailable(f"the C++ kernels need a 64-bit little-endian machine, got {platform.machine()}")
    if sys.platform == "win32":
        raise Unavailable("the C++ kernels are built by g++ or clang++; on Windows use WSL")
    if "CXX" in os.environ:
        command = shlex.split(os.environ["CXX"])
        if not command or not shutil.which(command[0]):
            raise Unavailable(f"CXX={os.environ['CXX']!r} is not found")
    else:
        found = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
        if not found:
            raise Unavailable(f"no C++ compiler was found. {INSTALL_COMPILER}")
        command = [found]
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        version = ".".join(map(str, sys.version_info[:2]))
        raise Unavailable(f"the headers of Python {version} (Python.h) were not found. {INSTALL_COMPILER}")
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.cpp")
        probe.write_text("#include <Python.h>\n#include <optional>\nstd::optional<int> probe() { return {}; }\n")

        def compiles(*flags: str) -> subprocess.CompletedProcess[str]:
            return run([*command, "-std=c++17", f"-I{include}", *flags, "-c", str(probe), "-o", str(probe) + ".o"])

        plain = compiles()
        if plain.returncode:
            reason = next((line for line in plain.stdout.splitlines() if "error" in line), "no message")
            raise Unavailable(f"{command[0]} does not compile C++17: {reason.strip()}. {INSTALL_COMPILER}")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        sets = [isa for isa, flags in ISA_FLAGS.items() if x86 and not compiles(*flags).returncode]
    return Toolchain(command, (run([*command, "--version"]).stdout.splitlines() or [command[0]])[0], sets)


@dataclass
class CudaToolkit:
    nvcc: Path
    version: str
    include: Path
    library_dir: Path
    targets: list[str] = field(default_factory=list)


def nvcc_candidates() -> list[Path]:
    """CUDA_HOME if set, else PATH, the nvidia-cuda-nvcc wheel, the usual folder."""
    if home := os.environ.get("CUDA_HOME"):
        return [Path(home, "bin", "nvcc")]
    # In build isolation sys.path lacks the environment's own packages; sysconfig still names their folder.
    packages = dict.fromkeys([sysconfig.get_path("purelib"), *sys.path])
    wheels = [nvcc for folder in packages if folder for nvcc in sorted(Path(folder, "nvidia").glob("*/bin/nvcc"))]
    on_path = shutil.which("nvcc")
    return [*([Path(on_path)] if on_path else []), *wheels, Path("/usr/local/cuda/bin/nvcc")]


def find_cuda() -> CudaToolkit:
    """Raises Unavailable without nvcc, the runtime's headers or its static library."""
    nvcc = next((c for c in nvcc_candidates() if c.is_file() and os.access(c, os.X_OK)), None)
    if not nvcc:
        home = os.environ.get("CUDA_HOME")
        raise Unavailable(f"{f'CUDA_HOME={home} holds no bin/nvcc' if home else 'no nvcc was found'}; {INSTALL_NVCC}")
    # nvcc itself knows best where its toolkit lies: the one on PATH is often a script or a link.
    dry = run([str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]).stdout
    match = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)
    top = Path(match[1].strip()) if match else nvcc.resolve().parent.parent
    places = [top, *top.glob("targets/*")]
    include = next((p / "include" for p in places if (p / "include/cuda_runtime.h").exists()), None)
    libraries = [p / lib for p in places for lib in ("lib64", "lib")]
    library = next((lib for lib in libraries if (lib / "libcudart_static.a").exists()), None)
    if not include or not library:
        missing = "libcudart_static.a" if include else "cuda_runtime.h"
        raise Unavailable(f"the toolkit of {nvcc} has no {missing} (wheel: nvidia-cuda-runtime); {INSTALL_NVCC}")
    release = re.search(r"release (\d+\.\d+)", run([str(nvcc), "--version"]).stdout)
    known = [int(n) for n in re.findall(r"sm_(\d+)", run([str(nvcc), "--list-gpu-code"]).stdout)]
    targets = cuda_targets(os.environ.get("TORCH_CUDA_ARCH_LIST"), known)
    return CudaToolkit(nvcc, release[1] if release else "unknown", include, library, targets)


def cuda_targets(arch_list: str | None, known: list[int]) -> list[str]:
    """["sm_80", "sm_90a", "compute_100"] from "8.0;9.0a;10.0+PTX"; of the default list, those that this nvcc knows."""
    targets, ptx = [], None
    for entry in re.split(r"[;, ]+", (arch_list or DEFAULT_ARCH_LIST).strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise CompileError(f"got {entry!r} in TORCH_CUDA_ARCH_LIST, expected entries such as 8.0, 9.0a or 10.0+PTX")
        major, minor, suffix, with_ptx = match.groups()
        if not arch_list and int(major + minor) not in known:
            continue
        if int(major) < 8:
            raise CompileError(f"got {entry!r} in TORCH_CUDA_ARCH_LIST, expected 8.0 or newer")
        targets.append(f"sm_{major}{minor}{suffix}")
        ptx = f"compute_{major}{minor}{suffix}" if with_ptx else ptx
    if not arch_list and not ptx:  # an nvcc older than the list
        ptx = "compute_" + targets[-1][3:].rstrip("af")
    return [*targets, *([ptx] if ptx else [])]


def gencode(targets: list[str]) -> list[str]:
    flags = []
    for target in targets:
        flags += ["-gencode", f"arch=compute_{target.partition('_')[2]},code={target}"]
    return flags


def needed(name: str, part: str, why: str) -> str:
    """Returns why the part is left out, or raises if it was asked for."""
    if switch(name) == "1":
        raise CompileError(f"{name}=1, but {part} cannot be built: {why}")
    return why


class NinjaBuild(build_ext):
    """Compiles with ninja, and lets the installation go on where a part cannot be built."""

    def run(self) -> None:
        package = Path(self.build_lib, "dalle_fast")
        package.mkdir(parents=True, exist_ok=True)
        info = self.compile(package / self.module_name())
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        if self.inplace:  # pip install -e
            for built, beside_source in self.get_output_mapping().items():
                Path(beside_source).unlink(missing_ok=True)  # a running Python may still map the old file
                shutil.copy2(built, beside_source)
            if not info["cpp"]["built"]:
                (ROOT / "dalle_fast" / self.module_name()).unlink(missing_ok=True)

    def module_name(self) -> str:
        return "_C" + sysconfig.get_config_var("EXT_SUFFIX")

    def get_outputs(self) -> list[str]:
        built = [Path(self.build_lib, "dalle_fast", name) for name in (self.module_name(), "_build_info.json")]
        return [str(path) for path in built if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {path: str(ROOT / "dalle_fast" / Path(path).name) for path in self.get_outputs()}

    def compile(self, module: Path) -> dict[str, dict[str, object]]:
        """Builds what can be built and returns what `_build_info.json` says."""
        cpp: dict[str, object] = {"built": False, "why_not": None}
        cuda: dict[str, object] = {"built": False, "why_not": None}
        info = {"cpp": cpp, "cuda": cuda}
        if switch("DALLE_FAST_BUILD") == "0":
            cpp["why_not"] = cuda["why_not"] = "switched off by DALLE_FAST_BUILD=0 when dalle_fast was installed"
            return info
        try:
            host = find_compiler()
        except Unavailable as error:
            cpp["why_not"] = cuda["why_not"] = needed("DALLE_FAST_BUILD", "the C++ kernels", str(error))
            if switch("DALLE_FAST_BUILD_CUDA") == "1":
                raise CompileError(f"DALLE_FAST_BUILD_CUDA=1, but the CUDA kernels cannot be built: {error}") from None
            return info
        toolkit = None
        try:
            if switch("DALLE_FAST_BUILD_CUDA") == "0":
                cuda["why_not"] = "switched off by DALLE_FAST_BUILD_CUDA=0 when dalle_fast was installed"
            elif not sorted((ROOT / "csrc").glob("*.cu")):
                cuda["why_not"] = "this version has no CUDA kernels"
            else:
                toolkit = find_cuda()
        except Unavailable as error:
            cuda["why_not"] = needed("DALLE_FAST_BUILD_CUDA", "the CUDA kernels", str(error))
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(host, toolkit, folder / module.name))
        ninja = shutil.which("ninja")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        result = run([*command, "-C", str(ROOT), "-f", str(folder / "build.ninja"), "-j", jobs])
        print(result.stdout)
        if result.returncode:
            cuda_failed = re.search(r"^FAILED: .*\.cu\.o", result.stdout, re.MULTILINE)
            tool, name = ("nvcc", "DALLE_FAST_BUILD_CUDA") if cuda_failed else (host.command[0], "DALLE_FAST_BUILD")
            raise CompileError(f"{tool} failed, see above; {name}=0 leaves that part out")
        shutil.copy2(folder / module.name, module)
        cpp.update(built=True, compiler=host.version, instruction_sets=["portable", *host.instruction_sets])
        if toolkit:
            cuda.update(built=True, nvcc=toolkit.version, targets=toolkit.targets)
        return info


def isa_of(source: Path) -> str | None:
    """The instruction set that a source is compiled for, by its name; None for any CPU."""
    return next((isa for isa in ISA_FLAGS if source.stem.endswith("_" + isa)), None)


def ninja_file(host: Toolchain, cuda: CudaToolkit | None, module: Path) -> str:
    """The text of build.ninja. Paths are relative to ROOT, from where ninja runs."""
    import pybind11

    def path(p: Path) -> str:
        return str(p.relative_to(ROOT)).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def words(*flags: str) -> str:
        return shlex.join(flags).replace("$", "$$")

    env_cxx, env_link = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
    defines = [f"-DDALLE_FAST_HAS_{isa.upper()}={int(isa in host.instruction_sets)}" for isa in ISA_FLAGS]
    defines.append(f"-DDALLE_FAST_HAS_CUDA={int(cuda is not None)}")
    cuda_include = ["-isystem", str(cuda.include)] if cuda else []
    python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    version = re.search(r'__version__ = "(.*)"', (ROOT / "dalle_fast/__init__.py").read_text())
    link = ["-shared", "-pthread"]
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined", "dynamic_lookup"]
    if cuda:
        link += [f"-L{cuda.library_dir}", "-lcudart_static", "-lrt", "-ldl"]
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {path(module.parent)}",
        "rule cxx",
        f"  command = {words(*host.command)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++ $in",
        "rule nvcc",  # -v makes ptxas report registers, shared memory and spills: kept beside each object
        f"  command = {words(str(cuda.nvcc)) if cuda else 'false'} $flags -MMD -MF $out.d -c $in -o $out"
        " > $out.txt 2>&1 || { cat $out.txt; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CUDA $in",
        "rule link",
        f"  command = {words(*host.command)} $in -o $out {words(*link, *env_link)}",
        "  description = link $out",
    ]
    objects = []

    def compile(rule: str, source: Path, flags: list[str]) -> None:
        output = path(module.parent / source.relative_to(ROOT)) + ".o"
        lines.extend([f"build {output}: {rule} {path(source)}", f"  flags = {words(*flags)}"])
        objects.append(output)

    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        isa = isa_of(source)
        if isa is None or isa in host.instruction_sets:
            compile("cxx", source, [*CXX_FLAGS, *(ISA_FLAGS[isa] if isa else []), "-Icsrc", *defines, *env_cxx])
    for source in sorted((ROOT / "csrc").glob("*.cu")) if cuda else []:
        ccbin = ["-ccbin", host.command[0]] if "CXX" in os.environ else []
        compile("nvcc", source, [*NVCC_FLAGS, *ccbin, *gencode(cuda.targets), "-Icsrc", *defines])
    macro = f'-DDALLE_FAST_VERSION="{version[1] if version else ""}"'
    binding_flags = [*CXX_FLAGS, "-Icsrc", *defines, macro, *python, *cuda_include, *env_cxx]
    compile("cxx", ROOT / "csrc/bindings.cpp", binding_flags)
    lines += [f"build {path(module)}: link {' '.join(objects)}", f"default {path(module)}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sources = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.c*"))]
    setup(ext_modules=[Extension("dalle_fast._C", sources)], cmdclass={"build_ext": NinjaBuild})
