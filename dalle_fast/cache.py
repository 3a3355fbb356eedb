"""The key-value cache: one prefix a prompt, one short tail a candidate and layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast.config import ModelConfig

# Image keys may be larger than the text's: up to 8 times before they are cut off. It costs the small ones little, because
# e4m3 has 15 binary orders of normal numbers below its largest.
HEADROOM = 8


class Cache:
    """Keys and values of `prompts` x `candidates` sequences that are being decoded.

    prefix_k, prefix_v  a layer: [prompts, heads, text_len, head_dim], shared by the candidates of a prompt
    tail_k, tail_v      a layer: [prompts * candidates, heads, slots, head_dim], slots from Mask.tail_slots(chunk)
    scales              a layer: (of keys, of values), [heads] float32 each, where the tail is e4m3, else None
    shift               two a layer where the model shifts tokens: [prompts * candidates, width + chunk, dim // 2],
                        the channels that later cells borrow, in a ring
    position            [1] int64 on the device: the next cell. `chunk` cells at most are appended at a time.

    fp8_tails: the longest tails, those with a slot a cell, hold e4m3 codes, a value being code x scale of its head: half the
    bytes of bfloat16. The scales follow from the prefix.
    device="meta" allocates nothing: nbytes() then answers what a real one would hold.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompts: int,
        candidates: int,
        *,
        chunk: int = 1,
        dtype: torch.dtype = torch.float32,
        fp8_tails: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(prompts, candidates) < 1:
            raise ValueError(f"got {prompts} prompts x {candidates} candidates, expected at least 1 x 1")
        layout, batch = config.layout, prompts * candidates
        self.config, self.prompts, self.chunk = config, prompts, min(chunk, layout.cells)
        self.masks = config.masks()

        def allocate(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        prefix = (prompts, config.heads, layout.text_len, config.head_dim)
        tails = [(batch, config.heads, mask.tail_slots(self.chunk), config.head_dim) for mask in self.masks]
        self.prefix_k, self.prefix_v = ([allocate(*prefix) for _ in tails] for _ in "kv")
        narrow = [fp8_tails and shape[2] == config.cells for shape in tails]
        kinds = [torch.float8_e4m3fn if small else dtype for small in narrow]
        self.tail_k, self.tail_v = (
            [allocate(*shape, dtype=kind) for shape, kind in zip(tails, kinds, strict=True)] for _ in "kv"
        )
        ones = [torch.ones(config.heads, device=device) if small else None for small in narrow]
        self.scales = [None if x is None else (x, x.clone()) for x in ones]
        self.shift: list[Tensor] = []
        if config.token_shift:
            ring = min(config.cells, config.width + self.chunk)
            self.shift = [allocate(batch, ring, config.dim // 2) for _ in range(2 * config.layers)]
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        return self.tail_k[0].shape[0]

    @property
    def next_cell(self) -> int | Tensor:
        """The position: a number where looking at it costs nothing, on a CPU and outside a compiler, else the tensor."""
        return int(self.position) if self.position.is_cpu and not torch.compiler.is_compiling() else self.position

    def check(self, x: Tensor, config: ModelConfig) -> None:
        """Raises ValueError unless x [B, n, d] are cells that a step of a model can append. Once a step, not once a layer."""
        if config is not self.config and config != self.config:
            raise ValueError(f"got a cache made for {self.config}, expected one for {config}")
        if x.shape[0] != self.batch or not 1 <= x.shape[1] <= self.chunk:
            raise ValueError(
                f"got {x.shape[1]} cells of {x.shape[0]} candidates, expected 1 to {self.chunk} of {self.batch}"
            )
        kept = self.prefix_k[0]
        if x.dtype != kept.dtype or x.device != kept.device:
            raise ValueError(
                f"got a step in {x.dtype} on {x.device}, expected {kept.dtype} on {kept.device}, as its cache"
            )

    def fill_prefix(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keeps the text's keys and values [prompts, heads, text_len, head_dim], and sets the scales of an e4m3 tail: the
        prefix's largest magnitude of a head becomes 448 / HEADROOM."""
        self.prefix_k[layer].copy_(k)
        self.prefix_v[layer].copy_(v)
        if (scales := self.scales[layer]) is not None:
            for scale, x in zip(scales, (k, v), strict=True):
                scale.copy_(x.abs().amax((0, 2, 3)).clamp(min=1e-20) * (HEADROOM / 448))

    def fork(self, candidates: int) -> None:
        """Every candidate becomes `candidates` equal ones: what is known of a picture is computed once a prompt."""
        for tensors in (self.tail_k, self.tail_v, self.shift):
            tensors[:] = [
                x.view(torch.uint8).repeat_interleave(candidates, dim=0).view(x.dtype)
                if x.dtype == torch.float8_e4m3fn
                else x.repeat_interleave(candidates, dim=0)
                for x in tensors
            ]

    def tail_nbytes(self) -> int:
        """Bytes of one candidate's own part."""
        return sum(x.nbytes for x in (*self.tail_k, *self.tail_v, *self.shift)) // self.batch

    def nbytes(self) -> int:
        """Bytes of everything held."""
        return self.tail_nbytes() * self.batch + sum(x.nbytes for x in (*self.prefix_k, *self.prefix_v))
