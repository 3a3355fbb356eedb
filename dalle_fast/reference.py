"""Dense, obvious implementations of every op, in any dtype: the oracle that all backends are compared with.

Nothing here is fast, and nothing here is clever. Run it in float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dalle_fast.masks import Mask
from dalle_fast.packing import Branch, PackedWeight


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: str) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √D + mask) v over the first S positions of the mask's sequence.

    q, k, v [B, H, S, D]. Returns out [B, H, S, D] and the log-sum-exp of each row's scores [B, H, S].
    """
    length = q.shape[2]
    allowed = torch.from_numpy(Mask.parse(mask).dense()[:length, :length]).to(q.device)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def sparse_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sparse_attention's `out`, by autograd through the dense formula."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        dq, dk, dv = torch.autograd.grad(sparse_attention(q, k, v, mask)[0], (q, k, v), grad)
    return dq, dk, dv


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
    """Appends the keys and values of n cells to the tail and attends with their queries.

    q, k, v [B, H, n, D]; prefix_k, prefix_v [P, H, T, D]; tail_k, tail_v [B, H, slots, D], changed in place; position: the
    first of the n cells, a tensor of one integer. Candidate b belongs to prompt b // (B / P). Returns [B, H, n, D].
    """
    batch, _, n, dim = q.shape
    tables = Mask.parse(mask).decode_tables(tail_k.shape[2])
    group = batch // prefix_k.shape[0]
    text_k, text_v = (x.repeat_interleave(group, dim=0) for x in (prefix_k, prefix_v))  # [B, H, T, D]
    out = torch.empty_like(q)
    for i in range(n):
        cell = int(position) + i
        slot = int(tables.slot_of_cell[cell])
        tail_k[:, :, slot], tail_v[:, :, slot] = k[:, :, i], v[:, :, i]
        read = torch.from_numpy(tables.slots[cell, : tables.counts[cell]]).long()
        keys = torch.cat([text_k, tail_k[:, :, read]], dim=2)  # [B, H, T + neighbours, D]
        values = torch.cat([text_v, tail_v[:, :, read]], dim=2)
        scores = torch.einsum("bhd,bhkd->bhk", q[:, :, i], keys) / math.sqrt(dim)
        out[:, :, i] = torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), values)
    return out


def skinny_linear(
    x: Tensor,
    weight: PackedWeight,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    epilogue: str,
    parts: int,
    branch: Branch | None = None,
) -> Tensor:
    """epilogue(layer_norm(x) Wᵀ + bias) + residual, W as packed; x [B, K] -> [parts, B, O / parts]. See linear.py."""
    if branch is not None:
        x = branch.sum.copy_(x + layer_norm(branch.rows, branch.weight, branch.bias, norm_eps))
    if norm_weight is not None:
        x = layer_norm(x, norm_weight, norm_bias, norm_eps)
    y = x @ weight.dequantize(x.dtype).T
    if weight.bias is not None:
        y = y + weight.rows(weight.bias).to(x.dtype)
    if epilogue == "geglu":
        y = y[:, : weight.outputs] * gelu(y[:, weight.outputs :])
    elif epilogue == "gelu_tanh":
        y = y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
    elif epilogue == "gelu":
        y = gelu(y)
    y = y if residual is None else residual + y
    return y.view(len(y), parts, -1).transpose(0, 1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + eps).sqrt()
    return x * weight.to(x.dtype) + (0 if bias is None else bias.to(x.dtype))


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


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
    """decode_attention whose tails hold e4m3 codes, a value being code x scale of its head [H]. The cells being appended are
    read as they come; what is kept of them are the codes."""
    cells = position.view(1).cpu() + torch.arange(q.shape[2])
    slots = torch.from_numpy(Mask.parse(mask).decode_tables(tail_k.shape[2]).slot_of_cell)[cells].long().to(q.device)
    wide_k, wide_v = (
        tail.to(q.dtype) * scale.to(q.dtype)[:, None, None] for tail, scale in ((tail_k, scale_k), (tail_v, scale_v))
    )
    out = decode_attention(q, k, v, prefix_k, prefix_v, wide_k, wide_v, position, mask)
    for tail, new, scale in ((tail_k, k, scale_k), (tail_v, v, scale_v)):
        tail.view(torch.uint8)[:, :, slots] = e4m3(new, scale).view(torch.uint8)
    return out


def e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, H, n, D] -> the codes nearest to x / scale, scale [H]; magnitudes above 448 x scale are cut off there."""
    return (x.float() / scale[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)


def philox(seed: int, candidate: int, position: int, count: int) -> np.ndarray:
    """The first `count` 32-bit words of the stream of (seed, candidate, position), by Philox4x32-10 (Salmon et al. 2011).

    Key: the seed's low and high half. Counter: (token // 4, position, candidate's low half, candidate's high half), word
    token % 4, so that every token of the vocabulary has its own random word.
    """
    low = np.uint64(0xFFFFFFFF)
    blocks = -(-count // 4)
    c0 = np.arange(blocks, dtype=np.uint64)
    c1, c2, c3 = (np.full(blocks, x & 0xFFFFFFFF, dtype=np.uint64) for x in (position, candidate, candidate >> 32))
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words: np.ndarray = np.stack([c0, c1, c2, c3], axis=1).reshape(-1)[:count].astype(np.uint32)
    return words


def gumbel(seed: int, candidate: int, position: int, count: int) -> Tensor:
    """[count] float64 standard Gumbel noise: -log(-log(u)), u = ((word >> 9) + 1/2) / 2^23, strictly inside (0, 1)."""
    u = ((philox(seed, candidate, position, count) >> 9) + 0.5) * 2.0**-23
    return torch.from_numpy(-np.log(-np.log(u)))


def allowed_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Which tokens of one row [V] may be drawn, [V] bool: exactly the top_k largest (0: all), and of those the smallest
    set of the most probable whose probability reaches top_p. Equal logits: the lower token id comes first."""
    vocab = len(logits)
    order = torch.sort(logits, descending=True, stable=True).indices[: top_k or vocab]
    probability = (logits[order].double() / temperature).softmax(0)
    before = probability.cumsum(0) - probability  # the mass of the more probable ones
    keep = order[(before < top_p) | (torch.arange(len(order), device=order.device) == 0)]
    allowed = torch.zeros(vocab, dtype=torch.bool, device=logits.device)
    allowed[keep] = True
    return allowed


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, candidates: Tensor, position: Tensor
) -> Tensor:
    """Draws one token a row by Gumbel-max from softmax(logits / temperature) restricted to allowed_tokens.

    logits [B, V]; candidates [B] int64: each row's random stream; position: a tensor of one integer. Returns [B] int64.
    """
    tokens = []
    for row, candidate in zip(logits, candidates.tolist(), strict=True):
        noise = gumbel(seed, candidate, int(position), len(row)).to(row.device)
        score = (row.double() / temperature + noise).masked_fill(
            ~allowed_tokens(row, temperature, top_k, top_p), -math.inf
        )
        tokens.append(int(score.argmax()))
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def draw(
    logits: Tensor, temperature: float, top_k: int, top_p: float, guidance_scale: float, seed: int, candidates: Tensor,
    given: Tensor, position: Tensor, first_cell: int, x: Tensor, table: Tensor, rows: Tensor | None, columns: Tensor | None,
    first_place: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ops.draw says what: fills x, returns (tokens [N], log p of them [N] float64)."""
    own, others, index = logits[: len(candidates)].double(), logits[len(candidates) :].double(), position - first_cell
    mixed = own if guidance_scale == 1 else others + guidance_scale * (own - others)
    tokens = torch.where(given >= 0, given, sample(mixed, temperature, top_k, top_p, seed, candidates, index))
    log_p = own.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    values, place = table[tokens], int(index) + first_place
    if rows is not None and columns is not None:
        if place >= len(rows) * len(columns):
            return tokens, log_p
        values = values + rows[place // len(columns)] + columns[place % len(columns)]
    x.copy_(values.repeat(len(x) // len(values), 1))
    return tokens, log_p
