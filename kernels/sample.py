"""token = argmax(logits / temperature + Gumbel noise) over the top-k tokens, of those over the top-p set.

The noise is -log(-log u) with u from Philox4x32-10 (Salmon et al. 2011) keyed by seed, candidate and position: token t has
word t % 4 of counter (t // 4, position, candidate). The cuts are exact: the threshold is found bit by bit among the ordered
integer images of the logits, and equal logits go by token id. Probabilities are counted in 2^-31 of the largest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl


@triton.jit
def _uniform(words):
    """Strictly inside (0, 1): ((word >> 9) + 1/2) / 2^23."""
    return ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit(do_not_specialize=["top_k", "seed_low", "seed_high"])
def sample(
    logits, candidates, position, tokens, vocab, row_stride, temperature, top_k, top_p_high, top_p_low, seed_low, seed_high,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """One row a program: grid (B,). BLOCK >= vocab, a power of two. top_p is the sum of its two float32 parts."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    inside = token < vocab
    x = tl.load(logits + row * row_stride + token, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, tl.div_rn(x, tl.zeros_like(x) + temperature), float("-inf"))
    keep = inside
    if TOP_K or TOP_P:
        raw = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 and 0 are equal
        # Order-preserving image in the unsigned numbers: negative floats are flipped whole, others get the top bit.
        key = (raw ^ ((raw >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    if TOP_K:
        level = tl.full((), 0, tl.uint32)
        bit = tl.full((), 2147483648, tl.uint32)
        for _ in range(32):  # the largest level that at least top_k tokens reach
            trial = level | bit
            enough = tl.sum((inside & (key >= trial)).to(tl.int32), 0) >= top_k
            level = tl.where(enough, trial, level)
            bit = bit >> 1
        above = inside & (key > level)
        equal = inside & (key == level)
        room = top_k - tl.sum(above.to(tl.int32), 0)
        keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    if TOP_P:
        top_p = tl.full((), 0.0, tl.float64) + top_p_high + top_p_low
        peak = tl.max(x, 0)
        # Whole numbers: their sums depend on no order, and where floats would be widened ahead of the loop they spill.
        mass = tl.where(keep, tl.exp(x - peak) * 2147483648.0 + 0.5, 0.0).to(tl.uint32)
        wanted = top_p * tl.sum(mass.to(tl.int64), 0).to(tl.float64)
        level = tl.full((), 0, tl.uint32)
        bit = tl.full((), 2147483648, tl.uint32)
        for _ in range(32):  # the largest level above which the mass is reached
            trial = level | bit
            enough = tl.sum(tl.where(key >= trial, mass, 0).to(tl.int64), 0).to(tl.float64) >= wanted
            level = tl.where(enough, trial, level)
            bit = bit >> 1
        above = keep & (key > level)
        equal = keep & (key == level)
        before = tl.sum(tl.where(above, mass, 0).to(tl.int64), 0).to(tl.float64)
        each = tl.max(tl.where(equal, mass, 0).to(tl.int64), 0).to(tl.float64)
        room = tl.full((), 0, tl.int32)
        step = tl.full((), BLOCK, tl.int32)
        while step > 0:  # how many of the equal tokens start below the mass that is wanted
            room = tl.where(before + (room + step - 1).to(tl.float64) * each < wanted, room + step, room)
            step = step >> 1
        keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
        keep = keep | (token == tl.min(tl.where(x == peak, token, BLOCK), 0))
    counter = tl.arange(0, BLOCK // 4).to(tl.uint32)
    candidate = tl.load(candidates + row)
    nothing = counter * 0
    c1 = nothing + tl.load(position).to(tl.uint32)
    c2 = nothing + (candidate & 0xFFFFFFFF).to(tl.uint32)
    c3 = nothing + (candidate >> 32).to(tl.uint32)
    k0 = seed_low.to(tl.uint32, bitcast=True)
    k1 = seed_high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox_impl(counter, c1, c2, c3, k0, k1, 10)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    score = tl.where(keep, x - tl.log(-tl.log(_uniform(words))), float("-inf"))
    best = tl.max(score, 0)
    chosen = tl.min(tl.where(score == best, token, BLOCK), 0)
    tl.store(tokens + row, chosen.to(tl.int64))
