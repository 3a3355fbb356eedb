"""The shape of the code: which module may import which, what kernels may know, that documents name real files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dalle_fast

ROOT = Path(__file__).resolve().parent.parent

# Each module imports only from those before it. A new module gets its place here.
ORDER = [
    *("layout", "masks", "quantize", "packing", "reference", "backends", "logits"),
    *("kernels", "torch_attention", "torch_backend", "cpu_backend", "triton_backend", "cuda_backend"),
    *("ops", "linear", "config", "cache", "weights", "passes", "model"),
    *("planning", "onednn", "engine", "cpu_engine", "packed_model", "graph_engine", "loading", "sampling"),
    *(
        "tokenizer",
        "codec",
        "discrete_vae",
        "vqgan",
        "images",
        "ranking",
        "regions",
        "pipeline",
        "figures",
        "records",
        "jobs",
    ),
    *("checkpoints", "env", "commands", "cli"),
]
CODE = (".py", ".cpp", ".cu", ".cuh", ".h")
MAX_LINES = 400
MAX_ASSETS = 24 * 2**20  # bytes, what the bundled model may weigh


def files(*suffixes: str) -> list[Path]:
    """The project's own files of these kinds: what git tracks or would, or everything in an unpacked sdist."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = (
        listed.stdout.splitlines() if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    )
    return [ROOT / name for name in names if name.endswith(suffixes) and (ROOT / name).is_file()]


def imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, without the leading "dalle_fast."; strings given to import_module count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name == "kernels", f"{path}: relative import"
            whole = node.module == "dalle_fast"
            names = [f"dalle_fast.{alias.name}" for alias in node.names] if whole else [node.module or ""]
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        yield from (name.removeprefix("dalle_fast.") for name in names if name.startswith("dalle_fast."))


def top(name: str) -> str:
    return name.split(".")[0]


MODULES = sorted(p for p in (ROOT / "dalle_fast").rglob("*.py") if "kernels" not in p.parts and p.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "dalle_fast")))
def test_imports_go_one_way(path: Path) -> None:
    module = path.relative_to(ROOT / "dalle_fast").parts[0].removesuffix(".py")
    assert module in ORDER, f"{module} has no place in ORDER"
    for name in imports(path):
        if top(name) in ("_C", module):
            continue
        assert ORDER.index(top(name)) < ORDER.index(module), f"{module} imports {name}, which stands below it"


def test_kernels_import_triton_only() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                ours = name.startswith("dalle_fast.kernels")
                assert ours or top(name) in ("triton", *sys.stdlib_module_names), f"{path.name} imports {name}"


def test_cpp_knows_no_torch_and_one_file_knows_pybind11() -> None:
    sources = files(".cpp", ".cu", ".cuh", ".h")
    assert ROOT / "csrc/bindings.cpp" in sources
    for path in sources:
        if ROOT / "csrc" not in path.parents:
            continue
        headers = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
        assert not [h for h in headers if h.split("/")[0] in ("torch", "ATen", "c10")], path
        assert path.name == "bindings.cpp" or not [h for h in headers if h.startswith("pybind11")], path


def test_no_kernel_and_no_cache_names_a_pattern() -> None:
    """They read tables derived in masks.py, so that a new pattern is one predicate."""
    places = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "dalle_fast").glob("*_backend.py")]
    for path in [*places, *(ROOT / "dalle_fast" / name for name in ("ops.py", "cache.py", "passes.py", "model.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant):
                assert node.value not in ("row", "column", "conv"), f"{path.name}:{node.lineno} names a pattern"


def test_files_fit_in_a_head() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in files(".py", ".cpp", ".cu", ".cuh", ".h") if (n := lines(p)) > MAX_LINES
    }
    assert not long, f"files of more than {MAX_LINES} lines"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_assets_stay_small() -> None:
    assert sum(p.stat().st_size for p in (ROOT / "dalle_fast/assets").rglob("*")) <= MAX_ASSETS


def test_documents_name_real_paths() -> None:
    """Every link, and every `path/like/this` or `file.py` in backticks, in every Markdown file."""
    tracked = files("")
    names = {p.name for p in tracked}
    places = {str(q.relative_to(ROOT)) for p in tracked for q in (p, *p.parents) if ROOT in q.parents}
    places |= {place.replace("kernels", "dalle_fast/kernels", 1) for place in places if place.startswith("kernels")}
    roots = {place.split("/")[0] for place in places}
    missing = []
    for path in files(".md"):
        text = path.read_text()
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target and not (path.parent / target).exists():
                missing.append(f"{path.name}: link to {target}")
        for token in re.findall(r"`([\w.*-]+(?:/[\w.*-]*)*)`", text):
            token = token.rstrip("/")
            if "/" in token and token.split("/")[0] in roots:
                known = any(ROOT.glob(token)) if "*" in token else token in places
            elif re.fullmatch(r"[\w-]+\.(py|cpp|cu|cuh|md|toml)", token):
                known = token in names
            else:
                continue
            if not known:
                missing.append(f"{path.name}: {token}")
    assert not missing


def test_no_machine_paths_and_no_registries() -> None:
    folders = "work|root|home|opt|tmp|farm"
    machine = re.compile(rf"(?<![\w.}}$)*-])/(?:{folders})/\w")
    hosts = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch|crates\.io|registry\.npmjs")
    found = []
    for path in files(*CODE, ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".in", "Makefile", "run"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if machine.search(line) or hosts.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


def test_import_is_light() -> None:
    code = "import sys, dalle_fast; print(sorted({'torch', 'numpy', 'triton', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", dalle_fast.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(dalle_fast, name) is not None and name in dir(dalle_fast)


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Dalle'"):
        dalle_fast.Dalle  # noqa: B018


def test_constraints_pin_within_the_ranges_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    listed = [*project["project"]["dependencies"], *extras, *project["build-system"]["requires"]]
    wanted = [Requirement(line) for line in listed]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalpha()]
    versions = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    for requirement in wanted:
        if requirement.name in versions:
            assert requirement.specifier.contains(versions[requirement.name]), requirement
    assert {"torch", "triton", "numpy"} <= versions.keys() & {r.name for r in wanted}
