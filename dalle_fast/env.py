"""`python -m dalle_fast.env`, or `dalle-fast info`: what was built, what can run here, and why not the rest."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dalle_fast

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pillow", "transformers")
# As Linux names them in /proc/cpuinfo: those that some kernel has a path for.
CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8"),
)
NOT_INSTALLED = "dalle_fast was not installed; run: pip install -e ."


def build_info() -> dict[str, dict[str, Any]]:
    """What setup.py wrote when this copy of the package was installed: {"cpp": …, "cuda": …}, each with "built"."""
    path = Path(dalle_fast.__file__).with_name("_build_info.json")
    try:
        info: dict[str, dict[str, Any]] = json.loads(path.read_text())
    except (OSError, ValueError):
        info = {part: {"built": False, "why_not": NOT_INSTALLED} for part in ("cpp", "cuda")}
    return info


def cpu() -> tuple[str, list[str]]:
    """The processor's name and those of CPU_FLAGS that it has (none where there is no /proc/cpuinfo)."""
    try:
        pairs = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    flags = fields.get("flags", "").split()
    return fields.get("model name", platform.machine()), [flag for flag in CPU_FLAGS if flag in flags]


def describe() -> str:
    """The whole report, one fact a line."""
    return "\n".join([*_versions(), "", *_machine(), "", *_build(), "", *_backends()])


def describe_preset(name: str) -> str:
    """Size of a model preset: parameters, bytes of weights, what a candidate adds to the cache. Allocates nothing.

    Raises ValueError for an unknown preset.
    """
    import torch

    from dalle_fast.cache import Cache
    from dalle_fast.config import ModelConfig
    from dalle_fast.model import DalleModel

    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = DalleModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    cache = Cache(config, 1, 1, dtype=torch.bfloat16, device="meta")
    tail, prefix = cache.tail_nbytes(), cache.nbytes() - cache.tail_nbytes()
    dense = 2 * config.layers * config.heads * config.head_dim * config.layout.total * 2
    shape = f"{config.layers} layers, {config.dim} wide, {config.heads} heads of {config.head_dim}, {config.layout}"
    return (
        f"{name}: {shape}\n"
        f"parameters: {parameters:,} with embeddings; {parameters * 2 / 1e9:.3f} GB in bfloat16\n"
        f"cache in bfloat16: {prefix / 1e6:.2f} MB a prompt and {tail / 1e6:.2f} MB a candidate; "
        f"a dense cache takes {dense / 1e6:.2f} MB a candidate"
    )


def _versions() -> Iterator[str]:
    yield f"dalle_fast {dalle_fast.__version__} ({Path(dalle_fast.__file__).parent})"
    yield f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package}: not installed"


def _machine() -> Iterator[str]:
    name, flags = cpu()
    yield f"CPU: {name}, {os.cpu_count()} cores, {' '.join(flags) or 'instruction sets unknown'}"
    try:
        import torch
    except ImportError as error:
        yield f"torch cannot be imported: {error}"
        return
    yield f"CPU threads that torch uses: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield (
                f"GPU {index}: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
                f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
            )
    elif torch.version.cuda or torch.version.hip:
        yield "GPU: none found, though torch is built for one"
    else:
        yield "GPU: none; torch is a CPU build"


def _build() -> Iterator[str]:
    info = build_info()
    cpp, cuda = info["cpp"], info["cuda"]
    if cpp["built"]:
        yield f"C++ kernels: built by {cpp['compiler']} for {', '.join(cpp['instruction_sets'])}"
        try:
            import_module("dalle_fast._C")
        except ImportError as error:
            yield f"C++ kernels: cannot be loaded: {error}"
    else:
        yield f"C++ kernels: not built: {cpp['why_not']}"
    if cuda["built"]:
        yield f"CUDA kernels: built by nvcc {cuda['nvcc']} for {', '.join(cuda['targets'])}"
    else:
        yield f"CUDA kernels: not built: {cuda['why_not']}"


def _backends() -> Iterator[str]:
    try:
        import torch

        from dalle_fast import backends
    except ImportError as error:
        yield f"backends: none, because of: {error}"
        return
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.bfloat16, torch.float32):
            yield f"Backends for {device}, {str(dtype).removeprefix('torch.')}, in order of preference:"
            for name, ops in backends.describe(device, dtype).items():
                yield f"  {name:<9} {_summary(ops)}"


def _summary(ops: dict[str, str | None]) -> str:
    """ "usable", or the ops that are, then each reason once with the ops that it keeps away."""
    reasons: dict[str, list[str]] = {}
    for op, reason in ops.items():
        reasons.setdefault(reason or "", []).append(op)
    usable = reasons.pop("", [])
    if not reasons:
        return "usable"
    if not usable and len(reasons) == 1:
        return f"not usable: {next(iter(reasons))}"
    refused = [f"not for {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "; ".join([f"usable for {', '.join(usable)}"] * bool(usable) + refused)


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
