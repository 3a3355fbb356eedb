"""What most code does: one dense, preallocated cache a candidate, text included, and masked attention over all of it.

Plain PyTorch, nothing wasteful beyond the method: keys are written in place, and with `sliced` only the positions up to
the current one are read. Same model, same weights, same logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast.masks import Mask
from dalle_fast.model import DalleModel


class DensePass:
    """A passes.Pass over a dense cache [B, heads, total, head_dim] a layer. Models without token shift."""

    def __init__(self, cache: list[tuple[Tensor, Tensor]], masks: list[Tensor], first: int, count: int, sliced: bool) -> None:
        self.cache, self.masks, self.rotary = cache, masks, None
        self.first, self.end, self.read = first, first + count, first + count if sliced else cache[0][0].shape[2]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache[layer]
        keys[:, :, self.first : self.end], values[:, :, self.first : self.end] = k, v
        mask = self.masks[layer][self.first : self.end, : self.read]
        return F.scaled_dot_product_attention(q, keys[:, :, : self.read], values[:, :, : self.read], attn_mask=mask)

    def shift(self, branch: int, x: Tensor) -> Tensor:
        raise NotImplementedError("the dense baseline has no token shift")


class DenseEngine:
    """An engine.Engine of the same model over a dense cache."""

    batch_invariant = False

    def __init__(self, model: DalleModel, sliced: bool = False) -> None:
        self.model, self.config, self.sliced = model, model.config, sliced
        unique: dict[Mask, Tensor] = {mask: torch.from_numpy(mask.dense()) for mask in set(model.masks)}
        self.masks = [unique[mask] for mask in model.masks]
        self.cache: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        config, weight = self.config, self.model.head.weight
        assert config.start == "learned", "the baseline is written for models with a start embedding"
        batch = text.shape[0] * candidates
        shape = (batch, config.heads, config.layout.total, config.head_dim)
        self.cache = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.masks]
        section = self.model.text_section(text).repeat_interleave(candidates, dim=0)
        x = torch.cat([self.model.embed_section(section), self.model.embed_start(section)], dim=1)
        self.position = 0
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        step = DensePass(self.cache, self.masks, self.position, x.shape[1], self.sliced)
        self.position += x.shape[1]
        return self.model.image_logits(self.model.run_blocks(x, step)[:, -1]).float()

    def step(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens[:, None])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        first = self.position - self.config.layout.text_len - self.config.first_cell
        return self._run(self.model.embed_image(tokens, first))

    def fork(self, candidates: int) -> None:
        self.cache = [(k.repeat_interleave(candidates, 0), v.repeat_interleave(candidates, 0)) for k, v in self.cache]

    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.cache)
