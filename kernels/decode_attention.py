"""One decoding step: append n new keys and values to each candidate's tail, attend to prefix and tail, one softmax.

A program takes one head and BLOCK_Q rows of one prompt, a row being one query of one candidate. The prefix is read once for
all of them and multiplied by matrix instructions with the rows as M (Juravsky et al. 2024, arXiv 2402.05099: shared-prefix
attention); then each row streams its own tail. Keys of the cells being appended are taken from the input, never from the
tail, so that no program waits for another's write; a ring of reach + n slots guarantees that no write hits a slot still read.
"""

from __future__ import annotations

import triton
import triton.language as tl

# e4m3 by integer arithmetic, because a conversion instruction exists only from compute capability 8.9.


@triton.jit
def _to_e4m3(x):
    """float32 -> code as uint8, to nearest even; what lies beyond the largest finite value, 448, is cut off there."""
    bits = tl.minimum(tl.abs(x), 448.0).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # exponent bias 127 -> 7, mantissa 23 -> 3 bits
    # Below 2^-6 codes are multiples of 2^-9: adding 2^23 leaves the rounded multiple in the last bits.
    small = (tl.abs(x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(tl.abs(x) < 0.015625, small, normal)
    return (code | tl.where(x < 0, 128, 0)).to(tl.uint8)


@triton.jit
def _from_e4m3(code):
    """uint8 -> float32, exact: the same fields in a float16 are the value over 2^8, subnormals included."""
    wide = code.to(tl.int16)
    half = ((wide & 127) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 128) != 0, -half, half)


@triton.jit
def decode_attention(
    q, k, v, prefix_k, prefix_v, tail_k, tail_v, out, position, slot_of_cell, neighbours, counts,
    partial, arrived, tail_k_scale, tail_v_scale,
    group, heads, n, prefix, cells, width, per_split, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, pk_p, pk_h, pk_t, pv_p, pv_h, pv_t, tk_b, tk_h, tk_s, tv_b, tv_h, tv_s,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NEAR: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, FP8: tl.constexpr, MASK_PREFIX: tl.constexpr,
):  # fmt: skip
    """out = softmax(q [prefix_k | tail_k]ᵀ scale) [prefix_v | tail_v]; scale holds log2 e. Grid (heads, tiles · P, SPLITS).

    group: candidates of a prompt; neighbours [cells, width] int32 cells, counts [cells]. With SPLITS > 1 each split takes
    per_split blocks of the prefix, split 0 the tail as well, and the last to arrive joins them (partial, arrived: scratch).
    FP8: the tail is e4m3 (pointers to uint8), a value being code x scale[head].
    """
    h, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    tiles = tl.cdiv(group * n, BLOCK_Q)
    prompt, tile = (tl.program_id(1) // tiles).to(tl.int64), tl.program_id(1) % tiles
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    valid = row < group * n
    b, i = (prompt * group + row // n).to(tl.int64), row % n  # candidate and query of each row
    d = tl.arange(0, D)
    first = tl.load(position).to(tl.int32)
    queries = tl.load(q + (b * q_b + h * q_h + i * q_n)[:, None] + d[None, :], mask=valid[:, None], other=0.0)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)

    prefix_k += prompt * pk_p + h * pk_h
    prefix_v += prompt * pv_p + h * pv_h
    for j in range(part * per_split, tl.minimum((part + 1) * per_split, tl.cdiv(prefix, BLOCK_K))):
        keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
        if MASK_PREFIX:
            exists = keys < prefix
            kj = tl.load(prefix_k + keys[:, None] * pk_t + d[None, :], mask=exists[:, None], other=0.0)
            vj = tl.load(prefix_v + keys[:, None] * pv_t + d[None, :], mask=exists[:, None], other=0.0)
        else:
            kj = tl.load(prefix_k + keys[:, None] * pk_t + d[None, :])
            vj = tl.load(prefix_v + keys[:, None] * pv_t + d[None, :])
        s = tl.dot(queries, tl.trans(kj), input_precision="ieee") * scale
        if MASK_PREFIX:
            s = tl.where((keys < prefix)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(vj.dtype), vj, acc * shrink[:, None], input_precision="ieee")
        top = new

    if part == 0:
        own = tl.minimum(first + i, cells - 1)
        new_k = tl.load(k + (b * k_b + h * k_h + i * k_n)[:, None] + d[None, :], mask=valid[:, None], other=0.0)
        new_v = tl.load(v + (b * v_b + h * v_h + i * v_n)[:, None] + d[None, :], mask=valid[:, None], other=0.0)
        slot = tl.load(slot_of_cell + own)
        if FP8:
            scale_k, scale_v = tl.load(tail_k_scale + h), tl.load(tail_v_scale + h)
            new_k = _to_e4m3(new_k.to(tl.float32) / scale_k)
            new_v = _to_e4m3(new_v.to(tl.float32) / scale_v)
        at_k, at_v = tail_k + b * tk_b + h * tk_h, tail_v + b * tv_b + h * tv_h  # [BLOCK_Q]
        append = at_k[:, None] + (slot * tk_s)[:, None] + d[None, :]
        tl.store(append, new_k.to(tail_k.dtype.element_ty), mask=valid[:, None])
        append = at_v[:, None] + (slot * tv_s)[:, None] + d[None, :]
        tl.store(append, new_v.to(tail_v.dtype.element_ty), mask=valid[:, None])

        exact = queries.to(tl.float32)
        count = tl.where(valid, tl.load(counts + own), 0)
        for j in range(tl.cdiv(tl.max(count, 0), NEAR)):
            at = j * NEAR + tl.arange(0, NEAR)
            read = valid[:, None] & (at[None, :] < count[:, None])  # [BLOCK_Q, NEAR]
            cell = tl.load(neighbours + own[:, None] * width + at[None, :], mask=read, other=0)
            fresh = read & (cell >= first)
            kept = read & (cell < first)
            slots = tl.load(slot_of_cell + cell, mask=read, other=0)
            step = (cell - first).to(tl.int64)
            old_k, old_v = at_k[:, None] + slots * tk_s, at_v[:, None] + slots * tv_s  # [BLOCK_Q, NEAR]
            now_k, now_v = (k + b * k_b + h * k_h)[:, None] + step * k_n, (v + b * v_b + h * v_h)[:, None] + step * v_n
            if FP8:
                near_k = _from_e4m3(tl.load(old_k[:, :, None] + d[None, None, :], mask=kept[:, :, None], other=0))
                near_v = _from_e4m3(tl.load(old_v[:, :, None] + d[None, None, :], mask=kept[:, :, None], other=0))
                at_now = now_k[:, :, None] + d[None, None, :]
                near_k = near_k * scale_k + tl.load(at_now, mask=fresh[:, :, None], other=0.0).to(tl.float32)
                at_now = now_v[:, :, None] + d[None, None, :]
                near_v = near_v * scale_v + tl.load(at_now, mask=fresh[:, :, None], other=0.0).to(tl.float32)
            else:
                at_k_now = tl.where(fresh, now_k, old_k)[:, :, None] + d[None, None, :]
                at_v_now = tl.where(fresh, now_v, old_v)[:, :, None] + d[None, None, :]
                near_k = tl.load(at_k_now, mask=read[:, :, None], other=0.0).to(tl.float32)
                near_v = tl.load(at_v_now, mask=read[:, :, None], other=0.0).to(tl.float32)
            s = tl.sum(exact[:, None, :] * near_k, 2) * scale
            s = tl.where(read, s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(top - new)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.sum(p[:, :, None] * near_v, 1)
            top = new

    if SPLITS > 1:
        here = (tl.program_id(1) * heads + h) * SPLITS
        mine = partial + (here + part) * (BLOCK_Q * (D + 2))
        r = tl.arange(0, BLOCK_Q)
        tl.store(mine + r[:, None] * D + d[None, :], acc)
        tl.store(mine + BLOCK_Q * D + r, top)
        tl.store(mine + BLOCK_Q * (D + 1) + r, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + here // SPLITS, 1) < SPLITS - 1:
            return
        acc = tl.zeros((BLOCK_Q, D), tl.float32)
        top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        for s_ in range(SPLITS):  # .cg: past the first-level cache, which other processors do not write to
            other = partial + (here + s_) * (BLOCK_Q * (D + 2))
            top_s = tl.load(other + BLOCK_Q * D + r, cache_modifier=".cg")
            new = tl.maximum(top, top_s)
            mine_share, other_share = tl.exp2(top - new), tl.exp2(top_s - new)
            total = total * mine_share + tl.load(other + BLOCK_Q * (D + 1) + r, cache_modifier=".cg") * other_share
            acc_s = tl.load(other + r[:, None] * D + d[None, :], cache_modifier=".cg")
            acc = acc * mine_share[:, None] + acc_s * other_share[:, None]
            top = new
    acc = acc / total[:, None]
    at = out + ((b * heads + h) * n + i)[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=valid[:, None])
