"""Compiles every entry of the tile table for its device, without one, and prints what each kernel needs as JSON.

A process of its own: where there is no GPU the tests define the kernels for the interpreter, which can't compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dalle_fast.kernels import configs, decode_attention, sample, sparse_attention
from dalle_fast.kernels.configs import Tile

INT32 = ("order", "offsets", "split", "blocks", "mask_ids", "bits", "slot_of_cell", "neighbours", "counts", "arrived")
FLOAT32 = ("lse", "delta_rows", "result", "partial", "tail_k_scale", "tail_v_scale")
INT64 = ("candidates", "position", "tokens")
FLOATS = ("scale", "scale_plain", "temperature", "top_p_high", "top_p_low")
POINTERS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv", "prefix_k", "prefix_v", "tail_k", "tail_v", "logits")


def kernels_of(op: str, head_dim: int, tile: Tile) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    sizes = {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "D": head_dim}
    if op == "sparse_attention":
        yield op, sparse_attention.forward, sizes
    elif op == "sparse_attention_backward":
        yield "delta", sparse_attention.delta, {"BLOCK": 64, "D": head_dim}
        for kernel in (
            sparse_attention.backward_text,
            sparse_attention.backward_image,
            sparse_attention.backward_query,
        ):
            yield kernel.__name__, kernel, sizes
    elif op == "decode_attention":
        for splits, fp8 in ((1, False), (4, False), (1, True)):
            more = {"NEAR": tile.near, "SPLITS": splits, "FP8": fp8, "MASK_PREFIX": False}
            yield f"{op}, {splits} splits{', fp8' if fp8 else ''}", decode_attention.decode_attention, sizes | more
    else:
        yield op, sample.sample, {"BLOCK": 8192, "TOP_K": True, "TOP_P": True}


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> tuple[dict[str, str], dict[Any, Any]]:
    """Argument types, and what a launch would know of them: pointers and strides divisible by 16, rows of the table whole."""
    types, attributes = {}, {}
    tail = "u8" if constants.get("FP8") else dtype
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        if name in FLOATS:
            types[name] = "fp32"
            continue
        kinds = [(INT32, "*i32"), (FLOAT32, "*fp32"), (INT64, "*i64"), (("tail_k", "tail_v"), f"*{tail}")]
        kinds += [(POINTERS, f"*{dtype}")]
        types[name] = next((kind for names, kind in kinds if name in names), "i32")
        if types[name].startswith("*") or re.search(r"_[bhnspt]$|^d_|^length$|^text$", name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, attributes


def spills(kernel: Any, arch: str) -> int | None:
    """Bytes of registers spilled. NVIDIA: the local memory that the assembler's resource usage lists beyond the stack."""
    if arch.startswith("gfx"):
        found = re.findall(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])
        return max(map(int, found))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return int(stack) + int(local)


def main(archs: list[str]) -> None:
    for (arch, op, head_dim), tile in configs.TABLE.items():
        if archs and arch not in archs:
            continue
        target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
        for name, kernel, constants in kernels_of(op, head_dim, tile):
            types, attributes = signature(kernel, constants, "bf16")
            source = ASTSource(
                kernel, types, {(kernel.arg_names.index(n),): x for n, x in constants.items()}, attributes
            )
            compiled = triton.compile(
                source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages}
            )
            asm = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
            facts = {
                "shared": compiled.metadata.shared,
                "spills": spills(compiled, arch),
                "dots": len(re.findall(r"\bmma\.|wgmma\.mma|tcgen05\.mma|v_mfma", asm)),
                "approximate_log": "lg2.approx" in asm,
            }
            print(json.dumps({"arch": arch, "op": op, "head_dim": head_dim, "kernel": name} | facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
