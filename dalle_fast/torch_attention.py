"""Attention in plain PyTorch, for any device and type: the torch backend's.

It is composed of dense pieces (text, or the prefix, and the tiles or slots that the mask leaves), each computed by one fused
call and joined by their log-sum-exp. On a CPU the pieces are PyTorch's own flash attention.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast.masks import Mask
from dalle_fast.reference import e4m3

TILE = 32  # a row or a column of the usual grid: larger tiles do more masked work, smaller ones more calls


# One dense piece of attention, its log-sum-exp, and its gradient given the joint output and log-sum-exp.


def _fused(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _piece(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> tuple[Tensor, Tensor]:
    if _fused(q):
        # The fused call has no backward of its own here: ops.py pairs it with sparse_attention_backward.
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return flash(q, k, v, 0.0, causal, attn_mask=bias)  # type: ignore[no-any-return]
    scores = _scores(q, k, bias, causal)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _piece_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if _fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias
        )
    p = (_scores(q, k, bias, causal) - lse[..., None]).exp()
    dv = p.to(grad.dtype).transpose(-2, -1) @ grad
    dp = (grad @ v.transpose(-2, -1)).to(p.dtype)
    ds = (p * (dp - (grad * out).to(p.dtype).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])).to(q.dtype)
    return ds @ k, ds.transpose(-2, -1) @ q, dv


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).to(torch.float64 if q.dtype == torch.float64 else torch.float32) / math.sqrt(
        q.shape[-1]
    )
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores if bias is None else scores + bias


def _joined(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """The attention over the union of two sets of keys."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    return torch.lerp(out_a, out_b, (lse_b - lse_a).sigmoid_().unsqueeze(-1).to(out_a.dtype))


def _join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return _joined(a, b), torch.logaddexp(a[1], b[1])


# Whole sequences.


class _Tiles(NamedTuple):
    """The image-to-image part as a batch of small dense attentions: query tile i reads the cells keys[i]."""

    queries: Tensor  # [tiles, TILE] cells
    keys: Tensor  # [tiles, m * TILE] cells
    bias: Tensor  # [tiles, TILE, m * TILE]: 0 or -inf
    place: Tensor  # [cells]: where each cell stands among the flattened queries


@lru_cache(maxsize=32)
def _tiles(mask: Mask, cells: int, device: torch.device, dtype: torch.dtype) -> _Tiles | Tensor:
    """The tiles of the first `cells` cells, or, where tiles would save little, the dense bias [cells, cells]."""
    plan = mask.block_plan(TILE, TILE)
    count = len(plan.offsets) - 1
    if len(plan.blocks) > count * (count + 1) // 4 or cells <= 2 * TILE:
        allowed = torch.from_numpy(mask.image()[:cells, :cells])
        return torch.zeros(cells, cells).masked_fill(~allowed, -math.inf).to(device, dtype)
    order = torch.from_numpy(plan.order).long()
    order = torch.cat([order, order[-1:].expand(count * TILE - len(order))])  # the last tile, filled up
    if cells < len(plan.order) and bool((order[1:] >= order[:-1]).all()):
        count = -(-cells // TILE)
    queries = order[: count * TILE].view(count, TILE)
    offsets = torch.from_numpy(plan.offsets[: count + 1]).long()
    most = int(offsets.diff().max())
    blocks = torch.stack(
        [
            F.pad(torch.from_numpy(plan.blocks[a:b]).long(), (0, most - (b - a)), value=-1)
            for a, b in pairwise(offsets.tolist())
        ]
    )  # [tiles, most], -1: none
    keys = order.view(-1, TILE)[blocks.clamp(min=0)].view(count, -1)
    allowed = torch.from_numpy(mask.allowed(queries[:, :, None].numpy(), keys[:, None, :].numpy()))
    allowed &= (blocks >= 0).repeat_interleave(TILE, 1)[:, None, :]
    # Positions that only fill a tile up stand for the last cell again: no key may count twice.
    index = blocks.clamp(min=0)[:, :, None] * TILE + torch.arange(TILE)
    allowed &= (index < len(plan.order)).view(count, 1, -1)
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
    place = torch.empty(mask.layout.cells, dtype=torch.long)
    place[queries.view(-1).flip(0)] = torch.arange(queries.numel()).flip(0)
    queries, keys = queries.clamp(max=cells - 1), keys.clamp(max=cells - 1)  # cells beyond the end: read, never used
    return _Tiles(queries.to(device), keys.to(device), bias.to(device, dtype), place[:cells].to(device))


def _take(x: Tensor, cells: Tensor) -> Tensor:
    """[B, H, C, D] -> [B * tiles, H, len, D], the cells of each tile."""
    batch, heads, _, dim = x.shape
    return x[:, :, cells.view(-1)].view(batch, heads, *cells.shape, dim).transpose(1, 2).flatten(0, 1)


def _put(x: Tensor, cells: Tensor, total: int) -> Tensor:
    """The adjoint of _take: [B * tiles, H, len, D] -> [B, H, total, D], summed over the tiles."""
    tiles, length = cells.shape
    _, heads, _, dim = x.shape
    x = x.view(-1, tiles, heads, length, dim).transpose(1, 2).flatten(2, 3)
    return x.new_zeros(x.shape[0], heads, total, dim).index_add_(2, cells.view(-1), x)


def _repeat(bias: Tensor, batch: int) -> Tensor:
    return bias[:, None].repeat(batch, 1, 1, 1)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: str) -> tuple[Tensor, Tensor]:
    parsed = Mask.parse(mask)
    text, batch, cells = parsed.layout.text_len, q.shape[0], q.shape[2] - parsed.layout.text_len
    tq, tk, tv = (x[:, :, :text] for x in (q, k, v))
    text_out, text_lse = _piece(tq, tk, tv, causal=True)
    if cells == 0:
        return text_out, text_lse
    iq, ik, iv = (x[:, :, text:] for x in (q, k, v))
    tiles = _tiles(parsed, cells, q.device, q.dtype)
    if isinstance(tiles, Tensor):
        local = _piece(iq, ik, iv, bias=tiles)
    else:
        piece = _piece(
            _take(iq, tiles.queries), _take(ik, tiles.keys), _take(iv, tiles.keys), bias=_repeat(tiles.bias, batch)
        )
        count, width = tiles.queries.shape
        out = piece[0].view(batch, count, -1, width, q.shape[3]).transpose(1, 2).flatten(2, 3)[:, :, tiles.place]
        lse = piece[1].view(batch, count, -1, width).transpose(1, 2).flatten(2, 3)[:, :, tiles.place]
        local = (out, lse)
    image_out, image_lse = _join(_piece(iq, tk, tv), local)
    return torch.cat([text_out, image_out], dim=2), torch.cat([text_lse, image_lse], dim=2)


def sparse_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = Mask.parse(mask)
    text, batch, cells = parsed.layout.text_len, q.shape[0], q.shape[2] - parsed.layout.text_len
    tq, tk, tv, tg, to, tl = (x[:, :, :text].contiguous() for x in (q, k, v, grad, out, lse))
    gradients = _piece_backward(tg, tq, tk, tv, to, tl, causal=True)
    if cells == 0:
        return gradients
    iq, ik, iv, ig, io, il = (x[:, :, text:].contiguous() for x in (q, k, v, grad, out, lse))
    from_text = _piece_backward(ig, iq, tk, tv, io, il)
    tiles = _tiles(parsed, cells, q.device, q.dtype)
    if isinstance(tiles, Tensor):
        local = _piece_backward(ig, iq, ik, iv, io, il, bias=tiles)
    else:
        # Of a cell that stands in several places only one may pass its gradient on.
        once = torch.zeros(tiles.queries.numel(), dtype=q.dtype, device=q.device)
        once[tiles.place] = 1
        tile_grad = _take(ig, tiles.queries) * once.view(1, -1, 1, TILE, 1).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        pieces = _piece_backward(
            tile_grad,
            _take(iq, tiles.queries),
            _take(ik, tiles.keys),
            _take(iv, tiles.keys),
            _take(io, tiles.queries),
            _take(il[..., None], tiles.queries)[..., 0].contiguous(),
            bias=_repeat(tiles.bias, batch),
        )
        dq, dk, dv = pieces
        local = (_put(dq, tiles.queries, cells), _put(dk, tiles.keys, cells), _put(dv, tiles.keys, cells))
    return (
        torch.cat([gradients[0], from_text[0] + local[0]], dim=2),
        torch.cat([gradients[1] + from_text[1], local[1]], dim=2),
        torch.cat([gradients[2] + from_text[2], local[2]], dim=2),
    )


# One step.


class _Reads(NamedTuple):
    """Device copies of a mask's decode tables; on a CPU also each cell's own slot and those it reads, a slice if so."""

    slot_of_cell: Tensor  # [cells]
    slots: Tensor  # [cells, max_neighbours]
    bias: Tensor  # [cells, max_neighbours]: 0, or -inf beyond the count
    of_cell: list[tuple[int, slice | Tensor]]


@lru_cache(maxsize=64)
def _reads(mask: str, slots: int, device: torch.device) -> _Reads:
    tables = Mask.parse(mask).decode_tables(slots)
    table, counts = torch.from_numpy(tables.slots).long(), torch.from_numpy(tables.counts)
    unread = torch.arange(table.shape[1]) >= counts[:, None]
    of_cell: list[tuple[int, slice | Tensor]] = []
    if device.type == "cpu":
        for own, row, count in zip(tables.slot_of_cell.tolist(), table, counts.tolist(), strict=True):
            ordered = row[:count].sort().values
            first, last = int(ordered[0]), int(ordered[-1])
            of_cell.append((own, slice(first, last + 1) if last - first + 1 == count else ordered))
    bias = torch.zeros(table.shape).masked_fill(unread, -math.inf)
    return _Reads(torch.from_numpy(tables.slot_of_cell).long().to(device), table.to(device), bias.to(device), of_cell)


def _at(tail: Tensor, slots: slice | Tensor) -> Tensor:
    """[B, H, slots, D] -> [B, H, n, D]. By index_select, which copies rows: indexing takes two to five times as long on a CPU
    (bench/results/2026-11-30-torch-linear-layers.json)."""
    return tail[:, :, slots] if isinstance(slots, slice) else tail.index_select(2, slots)


def _over_text(q: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates of one prompt are rows of one product with its prefix: [P, H, N * n, D]."""
    batch, heads, n, dim = q.shape
    prompts = prefix_k.shape[0]
    if batch == prompts:
        return _piece(q, prefix_k, prefix_v)
    if prompts == n == 1:  # the usual step, by the fewest views
        out, lse = _piece(q.transpose(0, 2), prefix_k, prefix_v)
        return out.transpose(0, 2), lse.permute(2, 1, 0)
    rows = q.view(prompts, -1, heads, n, dim).transpose(1, 2).reshape(prompts, heads, -1, dim)
    out, lse = _piece(rows, prefix_k, prefix_v)
    out = out.view(prompts, heads, -1, n, dim).transpose(1, 2).reshape(batch, heads, n, dim)
    return out, lse.view(prompts, heads, -1, n).transpose(1, 2).reshape(batch, heads, n)


def _over_near(q: Tensor, near_k: Tensor, near_v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """n cells, each over its own neighbours: near_k and near_v [B, H, n * max_neighbours, D], bias [n, max_neighbours]."""
    batch, heads, n, dim = q.shape
    near_k, near_v = (x.view(batch, heads * n, -1, dim) for x in (near_k, near_v))
    bias = bias.to(q.dtype).repeat(heads, 1)[None, :, None].expand(batch, -1, -1, -1)
    out, lse = _piece(q.reshape(batch, heads * n, 1, dim), near_k, near_v, bias=bias)
    return out.view(batch, heads, n, dim), lse.view(batch, heads, n)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    position: Tensor,
    mask: str,
) -> Tensor:
    n = q.shape[2]
    reads = _reads(mask, tail_k.shape[2], q.device)
    text = _over_text(q, prefix_k, prefix_v)
    if n == 1 and reads.of_cell:
        own, read = reads.of_cell[int(position)]
        tail_k.narrow(2, own, 1).copy_(k)
        tail_v.narrow(2, own, 1).copy_(v)
        return _joined(text, _piece(q, _at(tail_k, read), _at(tail_v, read)))
    cells = position.view(1) + torch.arange(n, device=q.device)
    tail_k.index_copy_(2, reads.slot_of_cell[cells], k)
    tail_v.index_copy_(2, reads.slot_of_cell[cells], v)
    near = reads.slots[cells].view(-1)  # [n * max_neighbours]
    return _joined(text, _over_near(q, _at(tail_k, near), _at(tail_v, near), reads.bias[cells]))


def decode_attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    position: Tensor,
    mask: str,
) -> Tensor:
    """By the neighbours' codes, gathered and widened: a tail [B, H, n * neighbours, D] of which every cell is read."""
    reads = _reads(mask, tail_k.shape[2], q.device)
    cells = position.view(1) + torch.arange(q.shape[2], device=q.device)
    own, near = reads.slot_of_cell[cells], reads.slots[cells].view(-1)  # [n], [n * m]
    same = near[:, None] == own  # [n * m, n]: which of the new cells a slot is about to hold
    fresh, which = same.any(1)[:, None], same.int().argmax(1)
    wide = []
    for tail, new, scale in ((tail_k, k, scale_k), (tail_v, v, scale_v)):
        codes = tail.view(torch.uint8)
        kept = _at(codes, near).view(torch.float8_e4m3fn).to(q.dtype) * scale.to(q.dtype)[:, None, None]
        wide.append(torch.where(fresh, _at(new, which), kept))
        codes.index_copy_(2, own, e4m3(new, scale).view(torch.uint8))
    return _joined(_over_text(q, prefix_k, prefix_v), _over_near(q, wide[0], wide[1], reads.bias[cells]))
