"""What most code does: one dense, preallocated cache a candidate, text included, and masked attention over all of it.

Plain PyTorch, nothing wasteful beyond the method: keys are written in place, and with `sliced` only the positions up to
the current one are read. Same model, same weights, same logits.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import rows
from dalle_fast.masks import Mask
from dalle_fast.model import DalleModel


class DensePass:
    """A passes.Pass over a dense cache [B, heads, total, head_dim] a layer. Models without token shift."""

    def __init__(
        self, cache: list[tuple[Tensor, Tensor]], masks: list[Tensor], first: int, count: int, sliced: bool
    ) -> None:
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
    backend = "torch"

    def __init__(self, model: DalleModel, sliced: bool = False) -> None:
        self.model, self.config, self.sliced = model, model.config, sliced
        device = model.head.weight.device
        unique: dict[Mask, Tensor] = {mask: torch.from_numpy(mask.dense()).to(device) for mask in set(model.masks)}
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


class DenseStepper:
    """Decodes two given streams, dealt out to `batch` candidates, from a cache that was filled beforehand."""

    positions = 32

    def __init__(self, model: DalleModel, text: Tensor, tokens: Tensor, batch: int, sliced: bool) -> None:
        self.engine, self.tokens = DenseEngine(model, sliced), rows(tokens, batch)
        self.engine.prefill(text, len(tokens))
        self.engine.feed(tokens[:, :-1])
        self.engine.cache = [(rows(k, batch), rows(v, batch)) for k, v in self.engine.cache]

    def seek(self, cell: int) -> None:
        self.cell = cell
        self.engine.position = self.engine.config.layout.text_len + self.engine.config.first_cell + cell

    def step(self) -> Tensor:
        return self.engine.step(self.tokens[:, self.cell])

    def nbytes(self) -> int:
        return self.engine.nbytes()


class CompiledStepper(DenseStepper):
    """The same step with static shapes, compiled by torch.compile layer by layer; on a GPU one CUDA graph of all of it."""

    def __init__(self, model: DalleModel, text: Tensor, tokens: Tensor, batch: int) -> None:
        super().__init__(model, text, tokens, batch, sliced=False)
        self.position = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        self.token = self.tokens[:, :1].clone()
        self.layer = torch.compile(_layer, fullgraph=True, dynamic=False)
        self.blocks = [copy(block) for block in model.blocks]  # the parameters are the model's own
        for block in self.blocks:
            block.index = 0  # equal in all layers: compiled once
        self.graph: Any = None

    @torch.inference_mode()
    def step(self) -> Tensor:
        self.position.fill_(self.engine.position)
        self.token.copy_(self.tokens[:, self.cell, None])
        if self.token.is_cuda:
            if self.graph is None:
                self._run()  # compiles
                torch.cuda.synchronize()
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.logits = self._run()
            self.graph.replay()
            return self.logits
        return self._run()

    def _run(self) -> Tensor:
        model, config = self.engine.model, self.engine.config
        x = model.embed_image(self.token, self.position - config.layout.text_len - config.first_cell)
        for block, mask, (keys, values) in zip(self.blocks, self.engine.masks, self.engine.cache, strict=True):
            x = self.layer(block, x, keys, values, mask, self.position)
        return model.image_logits(x[:, -1]).float()


class _StaticPass:
    rotary = None

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor, position: Tensor) -> None:
        self.keys, self.values, self.mask, self.position = keys, values, mask, position

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.index_copy_(2, self.position, k)
        self.values.index_copy_(2, self.position, v)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.mask[self.position])


def _layer(block: Any, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    run = _StaticPass(keys, values, mask, position)
    x = x + block.attention(x, run)
    out: Tensor = x + block.mlp(x, run)
    return out
