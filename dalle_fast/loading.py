"""Which engine serves a model folder on a device, in a type, by a backend."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from dalle_fast import backends, cpu_engine, onednn, packed_model, weights
from dalle_fast.backends import Call
from dalle_fast.config import ModelConfig
from dalle_fast.engine import Engine, TorchEngine
from dalle_fast.graph_engine import GraphEngine
from dalle_fast.model import DalleModel
from dalle_fast.packed_model import PackedModel

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("int8", "int4")


def load_engine(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    chunk: int = 1,
    fp8_tails: bool = False,
) -> Engine:
    """The fastest engine that serves the model of a folder on a device, in a type, by a backend; "auto" chooses.

    fp8_tails: the longest tails of the cache in 8 bits (cache.Cache): nearly twice the candidates of a wave on a GPU.

    Raises ValueError for unknown names, BackendUnavailable for a backend that can't run here, WeightError for bad files.
    """
    if dtype not in ("auto", *DTYPES, *QUANTIZED):
        raise ValueError(f"got dtype {dtype!r}, expected one of auto, {', '.join((*DTYPES, *QUANTIZED))}")
    if backend != "auto":
        backends.check_name(backend)
    where = check_device(device)
    if where.type == "cpu" and backend in ("auto", "cpu"):
        reason = cpu_engine.why_not(ModelConfig.from_json(weights.read_text(folder / "config.json")), dtype)
        if reason is None and fp8_tails:
            reason = "it keeps tails in bfloat16 or float32"
        if reason is None:
            engine: Engine = cpu_engine.CpuEngine.load(folder, dtype=dtype, chunk=chunk)
            return engine
        if backend == "cpu":
            raise backends.BackendUnavailable(f"backend 'cpu' cannot run this model in {dtype}: {reason}")
        if dtype in QUANTIZED:
            raise backends.BackendUnavailable(f"dtype {dtype!r} needs the cpu backend: {reason}")
        log.info("the model runs on the torch backend: %s", reason)
    if dtype in QUANTIZED:
        if reason := packed_model.why_not(dtype, where.type, backend):
            raise backends.BackendUnavailable(
                f"dtype {dtype!r} needs the cpu backend, or a GPU and the cuda backend, got device {where} and backend "
                f"{backend!r}: {reason}"
            )
        packed = PackedModel.load_packed(folder, kind=dtype, device=where)
        # "auto": a forced cuda backend would have to compute the whole-sequence attention of the text as well
        return GraphEngine(packed, chunk, "auto", fp8_tails=fp8_tails)
    kind = gpu_dtype(where, dtype) if where.type == "cuda" else DTYPES.get(dtype, torch.float32)
    if backend != "auto" and (reason := backends.why_not(backend, Call("decode_attention", where.type, kind, 64))):
        raise backends.BackendUnavailable(f"backend {backend!r} cannot run here: {reason}")
    if where.type == "cpu" and kind == torch.bfloat16 and (reason := onednn.why_not(torch.empty(0, dtype=kind))):
        log.warning("bfloat16 by PyTorch is slower than float32 here: %s", reason)
    model = DalleModel.load(folder, dtype=kind, device=where)
    if where.type == "cuda" and backend != "reference":  # which looks positions up on the host
        return GraphEngine(model, chunk, backend, fp8_tails=fp8_tails)
    return TorchEngine(model, chunk, backend, fp8_tails=fp8_tails)


def gpu_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """The type of a model on a GPU: bfloat16 unless asked otherwise, float16 where the GPU has none (below Ampere).
    Raises BackendUnavailable for bfloat16 there."""
    if dtype not in ("auto", "bfloat16"):
        return DTYPES[dtype]
    if torch.version.hip or (capability := torch.cuda.get_device_capability(device)) >= (8, 0):
        return torch.bfloat16
    which = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    if dtype == "bfloat16":
        raise backends.BackendUnavailable(f"dtype 'bfloat16' cannot run here: {which} has none; use float16")
    log.warning("%s has no bfloat16: the model runs in float16", which)
    return torch.float16


def check_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one. Raises ValueError for an unknown device or one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"got device {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"got device {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"got device {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device
