"""Hydragen (arXiv 2402.05099) in plain PyTorch: all candidates are rows of one product with the text they share, each
attends to its own neighbours, and the two parts are merged by their log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SharedPrefix:
    """A decoding step of candidates of one prompt over a dense tail [B, H, cells, D]."""

    def __init__(self, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor, read: Tensor) -> None:
        self.text_k, self.text_v = prefix_k[0].transpose(1, 2).contiguous(), prefix_v[0]  # [H, D, T], [H, T, D]
        self.k, self.v, self.read, self.own = tail_k, tail_v, read, int(read[-1])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k[:, :, self.own], self.v[:, :, self.own] = k[:, :, 0], v[:, :, 0]
        rows = q[:, :, 0] / math.sqrt(q.shape[-1])  # [B, H, D]
        shared = torch.bmm(rows.transpose(0, 1), self.text_k).float()  # [H, B, T]
        near_k, near_v = self.k[:, :, self.read], self.v[:, :, self.read]  # [B, H, n, D]
        near = (near_k @ rows[..., None]).squeeze(-1).float()  # [B, H, n]
        shared_lse, near_lse = shared.logsumexp(-1), near.logsumexp(-1)
        lse = torch.logaddexp(shared_lse, near_lse.transpose(0, 1))  # [H, B]
        out = torch.bmm((shared - lse[..., None]).exp().to(q.dtype), self.text_v).transpose(0, 1)  # [B, H, D]
        weights = (near - lse.transpose(0, 1)[..., None]).exp().to(q.dtype)
        return (out + (weights[:, :, None] @ near_v).squeeze(2))[:, :, None]
