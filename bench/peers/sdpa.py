"""torch.nn.functional.scaled_dot_product_attention, each of its backends by name, with the mask as a dense tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attention(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Skips the case where the backend is not for this device."""
    if q.device.type == "cpu" and backend in ("efficient", "cudnn"):
        pytest.skip("this backend of SDPA is for GPUs")
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class OwnText:
    """A decoding step where every candidate holds its own copy of the text: gathers its neighbours and attends to both."""

    def __init__(
        self, backend: str, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor, read: Tensor
    ) -> None:
        batch, text = tail_k.shape[0], prefix_k.shape[2]
        self.k, self.v = (
            torch.cat([p.expand(batch, -1, -1, -1), t], dim=2) for p, t in ((prefix_k, tail_k), (prefix_v, tail_v))
        )
        self.read = torch.cat([torch.arange(text, device=read.device), text + read])
        self.backend, self.own = backend, text + int(read[-1])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k[:, :, self.own], self.v[:, :, self.own] = k[:, :, 0], v[:, :, 0]
        return attention(self.backend, q, self.k[:, :, self.read], self.v[:, :, self.read])


class Dense:
    """A decoding step over a dense cache with a mask: every earlier cell is read."""

    def __init__(
        self, backend: str, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor, read: Tensor
    ) -> None:
        if backend == "flash" and tail_k.is_cuda:
            pytest.skip("flash attention takes no mask")
        batch, text, self.own = tail_k.shape[0], prefix_k.shape[2], prefix_k.shape[2] + int(read[-1])
        self.k, self.v = (
            torch.cat([p.expand(batch, -1, -1, -1), t], dim=2) for p, t in ((prefix_k, tail_k), (prefix_v, tail_v))
        )
        allowed = torch.zeros(self.own + 1, dtype=torch.bool, device=read.device)
        allowed[:text] = True
        allowed[text + read] = True
        self.mask = torch.zeros(1, self.own + 1, dtype=tail_k.dtype, device=read.device).masked_fill_(
            ~allowed, -torch.inf
        )
        self.backend = backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k[:, :, self.own], self.v[:, :, self.own] = k[:, :, 0], v[:, :, 0]
        end = self.own + 1
        return attention(self.backend, q, self.k[:, :, :end], self.v[:, :, :end], self.mask)
