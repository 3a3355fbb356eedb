"""What the sampling loop drives: something that holds the cache and turns the tokens drawn into the next logits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dalle_fast import backends, weights
from dalle_fast.backends import Call
from dalle_fast.cache import Cache
from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Decodes prompts x candidates sequences side by side. Candidate b belongs to prompt b // candidates.

    batch_invariant: a candidate's logits do not depend, to the bit, on how many others are decoded with it.
    backend: who computes the ops ("auto": chosen for each).
    """

    config: ModelConfig
    batch_invariant: bool
    backend: str

    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        """Starts anew with captions [P, caption_len] int64; returns the logits of image token 0, [P * N, image_vocab]."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Takes the token just drawn for every candidate, [B]; returns the logits of the next one, [B, image_vocab]."""
        ...

    def feed(self, tokens: Tensor) -> Tensor:
        """Takes k known tokens at once, [B, k]; returns the logits of the token after them."""
        ...

    def fork(self, candidates: int) -> None:
        """Turns every candidate into `candidates` equal ones, which go their own ways from here."""
        ...

    def nbytes(self) -> int:
        """Bytes of the cache."""
        ...


class TorchEngine:
    """The engine of the plain model, on any device, one op at a time."""

    batch_invariant = False  # a matrix product's rounding depends on its shape

    def __init__(self, model: DalleModel, chunk: int = 1, backend: str = "auto") -> None:
        """chunk: known tokens fed at a time. Each costs a slot in every ring, and a ring that a step reads whole is the
        fastest, so leave it at 1 where nothing is known."""
        self.model, self.config = model, model.config
        self.chunk, self.backend = chunk, backend
        self.cache: Cache | None = None

    @torch.inference_mode()
    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        weight = self.model.head.weight
        shape = (text.shape[0], candidates, weight.dtype)
        if self.cache is None or (self.cache.prompts, self.cache.batch // self.cache.prompts, weight.dtype) != shape:
            self.cache = Cache(
                self.config, text.shape[0], candidates, chunk=self.chunk, dtype=weight.dtype, device=weight.device
            )
        with backends.use(self.backend):
            return _at_least_float32(self.model.prefill(text.to(weight.device), self.cache))

    def step(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens[:, None])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        assert self.cache is not None, "prefill comes first"
        with backends.use(self.backend):
            for part in torch.split(tokens, self.chunk, dim=1):
                logits = self.model.step(part, self.cache)
        return _at_least_float32(logits)

    @torch.inference_mode()
    def fork(self, candidates: int) -> None:
        assert self.cache is not None, "prefill comes first"
        self.cache.fork(candidates)

    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("int8", "int4")


def load_engine(
    folder: Path, *, device: str = "auto", dtype: str = "auto", backend: str = "auto", chunk: int = 1
) -> Engine:
    """The fastest engine that serves the model of a folder on a device, in a type, by a backend; "auto" chooses.

    Raises ValueError for unknown names, BackendUnavailable for a backend that can't run here, WeightError for bad files.
    """
    if dtype not in ("auto", *DTYPES, *QUANTIZED):
        raise ValueError(f"got dtype {dtype!r}, expected one of auto, {', '.join((*DTYPES, *QUANTIZED))}")
    if backend != "auto":
        backends.check_name(backend)
    where = check_device(device)
    if where.type == "cpu" and backend in ("auto", "cpu"):
        from dalle_fast import cpu_engine

        reason = cpu_engine.why_not(ModelConfig.from_json(weights.read_text(folder / "config.json")), dtype)
        if reason is None:
            engine: Engine = cpu_engine.CpuEngine.load(folder, dtype=dtype, chunk=chunk)
            return engine
        if backend == "cpu":
            raise backends.BackendUnavailable(f"backend 'cpu' cannot run this model in {dtype}: {reason}")
        if dtype in QUANTIZED:
            raise backends.BackendUnavailable(f"dtype {dtype!r} needs the cpu backend: {reason}")
        log.info("the model runs on the torch backend: %s", reason)
    if dtype in QUANTIZED:
        raise backends.BackendUnavailable(
            f"dtype {dtype!r} needs the cpu backend, got device {where} and backend {backend!r}"
        )
    kind = DTYPES[dtype] if dtype != "auto" else torch.float32 if where.type == "cpu" else torch.bfloat16
    if backend != "auto" and (reason := backends.why_not(backend, Call("decode_attention", where.type, kind, 64))):
        raise backends.BackendUnavailable(f"backend {backend!r} cannot run here: {reason}")
    return TorchEngine(DalleModel.load(folder, dtype=kind, device=where), chunk, backend)


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
