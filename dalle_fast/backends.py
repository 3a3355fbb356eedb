"""Who computes an op: one ordered table of backends, each of which can say why it does not serve a call.

Automatic choice takes the first that answers None and logs it once; a backend asked for by name (`use`, or the
environment variable DALLE_FAST_BACKEND) raises its reason instead. Nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

OPS = (
    "sparse_attention",
    "sparse_attention_backward",
    "decode_attention",
    "decode_attention_fp8",
    "sample",
    "draw",
    "skinny_linear",
)

# In order of preference. Each module holds one function an op, with the op's signature, and why_not(call).
MODULES = {
    "cuda": "dalle_fast.cuda_backend",
    "triton": "dalle_fast.triton_backend",
    "cpu": "dalle_fast.cpu_backend",
    "torch": "dalle_fast.torch_backend",
    "reference": "dalle_fast.reference",
}


class Call(NamedTuple):
    """What a choice depends on."""

    op: str
    device: str  # torch's device type
    dtype: torch.dtype
    head_dim: int  # 0 where the op has none


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot serve the call; the message says why."""


_forced: ContextVar[str | None] = ContextVar("dalle_fast_backend", default=None)


def check_name(name: str) -> str:
    """Returns the name; raises ValueError if no backend is called so."""
    if name not in MODULES:
        raise ValueError(f"got backend {name!r}, expected one of auto, {', '.join(MODULES)}")
    return name


@contextlib.contextmanager
def use(name: str | None) -> Iterator[None]:
    """Within the block every op is computed by this backend, or raises BackendUnavailable. None or "auto": choose."""
    token = _forced.set(None if name in (None, "auto") else check_name(str(name)))
    try:
        yield
    finally:
        _forced.reset(token)


def why_not(name: str, call: Call) -> str | None:
    """None if the backend serves the call, else the reason why not."""
    if name == "reference":
        return None
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        return f"it cannot be imported: {error}"
    if not hasattr(module, call.op):
        return f"it has no {call.op}"
    reason: str | None = module.why_not(call)
    return reason


@cache
def _choose(call: Call, forced: str | None) -> ModuleType:
    if forced:
        check_name(forced)
        if reason := why_not(forced, call):
            raise BackendUnavailable(
                f"backend {forced!r} cannot compute {call.op} ({call.device}, {call.dtype}): {reason}"
            )
        return importlib.import_module(MODULES[forced])
    reasons = {}
    for name, path in MODULES.items():
        if name == "reference":  # only by name: it is slow on purpose
            continue
        reasons[name] = why_not(name, call)
        if reasons[name] is None:
            log.info("%s (%s, %s) runs on the %s backend", call.op, call.device, call.dtype, name)
            return importlib.import_module(path)
    raise BackendUnavailable(f"no backend for {call}: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))


def asked_for() -> str | None:
    """The backend that is asked for by name: by `use`, else by DALLE_FAST_BACKEND."""
    return _forced.get() or os.environ.get("DALLE_FAST_BACKEND") or None


def choose(call: Call) -> ModuleType:
    """The module that computes the call. Raises BackendUnavailable if none can, or the one asked for can't."""
    return _choose(call, asked_for())


def describe(
    device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> dict[str, dict[str, str | None]]:
    """{backend: {op: None, or why not}} for one device type: what `dalle-fast info` prints."""
    return {name: {op: why_not(name, Call(op, device, dtype, head_dim)) for op in OPS} for name in MODULES}
