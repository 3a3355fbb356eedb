"""FlashInfer: cascade (text as one shared level, each candidate's neighbours as pages of their own) and plain paged
decode (every candidate lists the text pages itself). Same bytes as ours for the cascade, so only the kernels differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.peers import load

PAGE = 32


class FlashInfer:
    """A decoding step; `read` are the slots of the neighbours, the last one the cell's own."""

    def __init__(
        self, prefix_k: Tensor, prefix_v: Tensor, tail_k: Tensor, tail_v: Tensor, read: Tensor, cascade: bool
    ) -> None:  # fmt: skip
        if not prefix_k.is_cuda:
            pytest.skip("FlashInfer is for NVIDIA GPUs")
        module = load("flashinfer")
        (_, heads, text, dim), batch, count = prefix_k.shape, tail_k.shape[0], len(read)
        if text % PAGE:
            pytest.skip(f"the text ({text} tokens) is no multiple of a page ({PAGE})")
        shared, own = text // PAGE, -(-count // PAGE)
        self.pages = prefix_k.new_zeros(shared + batch * own, 2, PAGE, heads, dim)
        for i, (prefix, tail) in enumerate(((prefix_k, tail_k), (prefix_v, tail_v))):
            self.pages[:shared, i] = prefix[0].transpose(0, 1).view(shared, PAGE, heads, dim)
            near = tail[:, :, read].transpose(1, 2)  # [B, n, H, D]
            near = torch.nn.functional.pad(near, (0, 0, 0, 0, 0, own * PAGE - count))
            self.pages[shared:, i] = near.reshape(batch * own, PAGE, heads, dim)

        def ints(*values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=prefix_k.device)

        workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=prefix_k.device)
        last = (count - 1) % PAGE + 1
        mine = torch.arange(batch * own, dtype=torch.int32, device=prefix_k.device) + shared
        text_pages = torch.arange(shared, dtype=torch.int32, device=prefix_k.device)
        each = torch.arange(batch + 1, dtype=torch.int32, device=prefix_k.device)
        self.run: Any
        if cascade:
            wrapper = module.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
            wrapper.plan(
                [ints(0, batch), each], [ints(0, shared), each * own], [text_pages, mine],
                [ints(PAGE), each[1:] * 0 + last], heads, heads, dim, PAGE, q_data_type=prefix_k.dtype,
            )  # fmt: skip
        else:
            wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
            listed = torch.cat([text_pages.expand(batch, -1), mine.view(batch, own)], dim=1).reshape(-1)
            wrapper.plan(
                each * (shared + own), listed, each[1:] * 0 + last, heads, heads, dim, PAGE,
                q_data_type=prefix_k.dtype, kv_data_type=prefix_k.dtype,
            )  # fmt: skip
        self.run, self.last_page, self.last = wrapper.run, mine.view(batch, own)[:, -1].long(), last - 1

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.pages[self.last_page, 0, self.last] = k[:, :, 0]
        self.pages[self.last_page, 1, self.last] = v[:, :, 0]
        out: Tensor = self.run(q[:, :, 0], self.pages)
        return out[:, :, None]
