"""The ops in plain PyTorch, for any device and type: attention (torch_attention.py), linear layers, sampling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast.backends import Call
from dalle_fast.logits import ending_with
from dalle_fast.packing import Branch, PackedWeight
from dalle_fast.torch_attention import decode_attention as decode_attention
from dalle_fast.torch_attention import decode_attention_fp8 as decode_attention_fp8
from dalle_fast.torch_attention import sparse_attention as sparse_attention
from dalle_fast.torch_attention import sparse_attention_backward as sparse_attention_backward


def why_not(call: Call) -> str | None:
    return None


# Linear layers.


def join(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float, branch: Branch | None
) -> Tensor:
    """What skinny_linear multiplies: x, first joined by a branch, then normalised, each if there is one."""
    if branch is not None:
        vectors = (branch.weight.to(x.dtype), branch.bias.to(x.dtype))
        x = branch.sum.copy_(x + F.layer_norm(branch.rows, x.shape[1:], *vectors, norm_eps))
    if norm_weight is None:
        return x
    norm_bias = None if norm_bias is None else norm_bias.to(x.dtype)
    return F.layer_norm(x, x.shape[1:], norm_weight.to(x.dtype), norm_bias, norm_eps)


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
    """By the whole weight, in x's type: as slow as unpacking is, and exact about what is packed."""
    if norm_weight is not None or branch is not None:
        x = join(x, norm_weight, norm_bias, norm_eps, branch)
    bias = None if weight.bias is None else weight.rows(weight.bias).to(x.dtype)
    y = F.linear(x, weight.dequantize(torch.promote_types(x.dtype, torch.float32)).to(x.dtype), bias)
    return _finish(y, residual, epilogue, parts)


def many_rows(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, epilogue: str, parts: int
) -> Tensor:
    """What follows join, of any number of rows and a dense weight, by the product that PyTorch has; bias: in x's type."""
    scale = weight.scale
    y = F.linear(x, weight.data, bias if scale is None else None)
    if scale is not None:
        y = y * scale.to(y.dtype) if bias is None else torch.addcmul(bias, y, scale.to(y.dtype))
    return _finish(y, residual, epilogue, parts)


def _finish(y: Tensor, residual: Tensor | None, epilogue: str, parts: int) -> Tensor:
    """[rows, O] -> [parts, rows, O / parts], after the activation and the residual."""
    if epilogue == "geglu":
        value, gate = y.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    elif epilogue != "none":
        y = F.gelu(y, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    y = y if residual is None else residual + y
    return y.view(len(y), parts, -1).transpose(0, 1)


# Sampling.

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _high_low(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The two halves of a 32 x 32 bit product, in int64 without overflow."""
    low, high = x * (factor & 0xFFFF), x * (factor >> 16)  # 48 bits each
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(seed: int, candidates: Tensor, position: Tensor, count: int) -> Tensor:
    """[B, count] float32 standard Gumbel noise of each candidate's stream; see reference.philox."""
    blocks = torch.arange(-(-count // 4), device=candidates.device)[None]
    zero = torch.zeros_like(blocks * candidates[:, None])
    c0, c1 = blocks + zero, position.view(1, 1).long() + zero
    c2, c3 = (candidates & _LOW)[:, None] + zero, ((candidates >> 32) & _LOW)[:, None] + zero
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _high_low(c0, _M0), _high_low(c2, _M1)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    words = torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :count]
    u = ((words >> 9).float() + 0.5) * 2.0**-23
    return -(-u.log()).log()


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, candidates: Tensor, position: Tensor
) -> Tensor:
    vocab = logits.shape[1]
    noise = gumbel(seed, candidates, position, vocab)
    scaled = logits.float() / temperature
    if not top_k and top_p >= 1:
        return (scaled + noise).argmax(-1)
    # A stable descending sort puts equal logits in token order, which is what "exactly k" and "smallest set" mean here.
    ordered, tokens = torch.sort(scaled, dim=-1, descending=True, stable=True)
    if top_k:
        ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    probability = ordered.double().softmax(-1)
    keep = probability.cumsum(-1) - probability < top_p
    keep[:, 0] = True
    score = (ordered + noise.gather(1, tokens)).masked_fill(~keep, -math.inf)
    best = score.max(-1, keepdim=True).values
    return tokens.masked_fill(score < best, vocab).min(-1).values  # ties: the lowest token


draw = ending_with(sample)
