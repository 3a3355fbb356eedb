"""How many candidates fit into a device's memory, and how a larger request is split. Arithmetic: nothing is allocated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch

from dalle_fast.cache import Cache
from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel

log = logging.getLogger(__name__)
T = TypeVar("T")

# Left free: the CUDA context and cuBLAS's workspaces (about 0.6 GB together), and what the allocator can't hand out whole.
RESERVE = 2**30


class MemoryPlan(NamedTuple):
    """Bytes, and how many candidates of one prompt fit beside the weights."""

    weights: int
    prefix: int  # a prompt
    tail: int  # a candidate
    work: int  # a candidate: activations and logits of one step
    fixed: int  # the text pass of a prompt, and the reserve
    candidates: int

    def total(self, candidates: int) -> int:
        """Bytes that so many candidates of one prompt take."""
        return self.weights + self.prefix + self.fixed + candidates * (self.tail + self.work)


def plan_memory(
    config: ModelConfig,
    free: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    weights_loaded: bool = False,
    fp8_tails: bool = False,
    chunk: int = 1,
    guided: bool = False,
) -> MemoryPlan:
    """What decoding candidates of one prompt needs of `free` bytes.

    free: bytes free on the device, the weights not counted as used unless weights_loaded (torch.cuda.mem_get_info()[0]).
    guided: every candidate is decoded twice, with and without its caption. candidates is 0 if not even one fits.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in DalleModel(config).parameters()) * dtype.itemsize
    copies = 2 if guided else 1
    cache = Cache(config, 1, 1, chunk=chunk, dtype=cache_dtype or dtype, fp8_tails=fp8_tails, device="meta")
    prefix, tail = copies * (cache.nbytes() - cache.tail_nbytes()), copies * cache.tail_nbytes()
    up = config.hidden * (2 if config.activation == "geglu" else 1)
    inner = config.heads * config.head_dim
    # Alive at once in a block: the residual and its norm, q, k and v with what attention returns, and the MLP's two widths.
    row = (4 * config.dim + 4 * inner + up + config.hidden) * dtype.itemsize
    # Sampling holds the logits as they come, in float32, and the noise, and orders them for top-k and top-p.
    work = copies * (chunk * row + config.image_vocab * (dtype.itemsize + 4)) + 3 * 8 * config.image_vocab
    fixed = copies * config.layout.text_len * row + RESERVE
    left = free - prefix - fixed - (0 if weights_loaded else weights)
    return MemoryPlan(weights, prefix, tail, work, fixed, max(0, left // (tail + work)))


def even_waves(n: int, most: int) -> list[int]:
    """n candidates in the fewest waves of at most `most`, whose sizes differ by at most one. Raises ValueError below 1."""
    if n < 1 or most < 1:
        raise ValueError(f"got {n} candidates in waves of at most {most}, expected at least 1 of each")
    count = -(-n // most)
    return [n // count + (i < n % count) for i in range(count)]


def halving(n: int, most: int, run: Callable[[int, int, int], T]) -> Iterator[T]:
    """Yields run(first, size, most) for even waves of at most `most` that cover candidates 0 … n - 1. Out of device memory
    halves `most`, with a warning, and goes on where it was; a wave of one that does not fit raises torch.OutOfMemoryError."""
    sizes, first = even_waves(n, most), 0
    while first < n:
        failed: str | None = None
        try:
            done = run(first, sizes[0], most)
        except torch.OutOfMemoryError as error:
            if most == 1:
                raise
            failed = str(error).splitlines()[0]
        if failed is not None:  # outside the handler: the error's traceback holds on to the tensors of the failed wave
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.warning("a wave of %d candidates ran out of memory, going on with %d: %s", most, most // 2, failed)
            most //= 2
            sizes = even_waves(n - first, most)
            continue
        yield done
        first += sizes.pop(0)
