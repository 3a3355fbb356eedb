"""How one set of transformer blocks runs in three ways: over a whole sequence, over the text of a prompt while filling the
prefix, and over the next cells against the cache. A block only sees `attend`, `shift` and `rotary`."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast import ops
from dalle_fast.cache import Cache
from dalle_fast.layout import SequenceLayout
from dalle_fast.masks import Mask


class Rotary(NamedTuple):
    """What turns pairs of a head's channels (0, 1), (2, 3), … at n positions. Channels beyond the angles stay: 1 and 0."""

    cosines: Tensor  # [n, D]
    sines: Tensor  # [n, D], those of a pair's first channel negated

    @classmethod
    def of(cls, angles: Tensor, dim: int, dtype: torch.dtype) -> Rotary:
        """angles [n, R], each repeated for the two channels of its pair, R <= dim."""
        rest = (0, dim - angles.shape[-1])
        sines = torch.stack([-angles[..., ::2].sin(), angles[..., 1::2].sin()], dim=-1).flatten(-2)
        return cls(F.pad(angles.cos(), rest, value=1.0).to(dtype), F.pad(sines, rest).to(dtype))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x [..., n, D]."""
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * rotary.cosines, swapped, rotary.sines)


class Pass(Protocol):
    rotary: Rotary | None  # of the positions at hand

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, n, D] -> [B, H, n, D]."""
        ...

    def shift(self, branch: int, x: Tensor) -> Tensor:
        """Token shift of the input [B, n, d] of branch 2 * layer (attention) or 2 * layer + 1 (MLP)."""
        ...


class FullPass:
    """All positions at once: training, scoring."""

    def __init__(self, masks: list[Mask], rotary: Rotary | None) -> None:
        self.masks, self.rotary = masks, rotary

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.sparse_attention(q, k, v, self.masks[layer])

    def shift(self, branch: int, x: Tensor) -> Tensor:
        return shift_sequence(x, self.masks[0].layout)


class PrefixPass(FullPass):
    """The text of every prompt: causal attention, whose keys and values become the prefix."""

    def __init__(self, cache: Cache, rotary: Rotary | None) -> None:
        super().__init__(cache.masks, rotary)
        self.cache = cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.fill_prefix(layer, k, v)
        return super().attend(layer, q, k, v)


class StepPass:
    """The next n cells of every candidate, appended to the cache. The caller moves cache.position on afterwards."""

    def __init__(self, cache: Cache, n: int, rotary: Rotary | None) -> None:
        self.cache, self.n, self.rotary = cache, n, rotary
        self._places: tuple[Tensor, ...] | None = None

    @cached_property
    def cells(self) -> Tensor:
        """[n]; asked for by models with rotary angles or shifted tokens only."""
        return self.cache.position + torch.arange(self.n, device=self.cache.position.device)

    @cached_property
    def cell(self) -> int:
        """The first of them, where the cache is on a CPU."""
        return int(self.cache.position)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.cache
        return ops.decode_attention_unchecked(
            q, k, v, c.prefix_k[layer], c.prefix_v[layer], c.tail_k[layer], c.tail_v[layer], c.position, c.masks[layer],
            c.scales[layer],
        )  # fmt: skip

    def shift(self, branch: int, x: Tensor) -> Tensor:
        ring = self.cache.shift[branch]
        quarter = x.shape[-1] // 4
        if self.n == 1 and x.device.type == "cpu":
            return self._shift_one(ring, x[:, 0], quarter)[:, None]
        own, above, left, has_above, has_left = self._shift_places(ring.shape[1])
        ring.index_copy_(1, own, x[..., : 2 * quarter])
        # where, not a product: what was never written may be NaN.
        upper = torch.where(has_above, ring[:, above, :quarter], 0)
        lefter = torch.where(has_left, ring[:, left, quarter:], 0)
        return torch.cat([upper, lefter, x[..., 2 * quarter :]], dim=-1)

    def _shift_one(self, ring: Tensor, x: Tensor, quarter: int) -> Tensor:
        """One cell, whose number can be looked at: slices instead of indices, x [B, d]."""
        cell, width, slots = self.cell, self.cache.config.width, ring.shape[1]
        ring[:, cell % slots] = x[:, : 2 * quarter]
        nothing = x.new_zeros(len(x), quarter)
        above = ring[:, (cell - width) % slots, :quarter] if cell >= width else nothing
        left = ring[:, (cell - 1) % slots, quarter:] if cell % width else nothing
        return torch.cat([above, left, x[:, 2 * quarter :]], dim=-1)

    def _shift_places(self, size: int) -> tuple[Tensor, ...]:
        """Slots of the cells, of those above and to the left, in rings of a size; and who has such neighbours, [n, 1]. The
        same for all layers."""
        if self._places is None:
            cells, width = self.cells, self.cache.config.width
            slots = (cells % size, (cells - width) % size, (cells - 1) % size)
            self._places = (*slots, (cells >= width)[:, None], (cells % width > 0)[:, None])
        return self._places


def shift_sequence(x: Tensor, layout: SequenceLayout) -> Tensor:
    """DALLE-pytorch's token shift of a sequence [B, S, d]: a text position takes the first half of its channels from the
    position before; an image cell the first quarter from the cell above and the second from the left, zeros at the edges."""
    text, image = x[:, : layout.text_len], x[:, layout.text_len :]
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    text = torch.cat([F.pad(text[:, :-1, :half], (0, 0, 1, 0)), text[..., half:]], dim=-1)
    if image.shape[1] == 0:
        return text
    cells = torch.arange(image.shape[1], device=x.device)
    above = F.pad(image[..., :quarter], (0, 0, layout.width, 0))[:, : len(cells)]
    left = F.pad(image[:, :-1, quarter:half], (0, 0, 1, 0)) * (cells % layout.width > 0)[:, None]
    return torch.cat([text, torch.cat([above, left, image[..., half:]], dim=-1)], dim=1)
