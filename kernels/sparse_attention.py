"""softmax(q kᵀ / √D + mask) v over text and image, forward and backward, tile by tile.

The sequence is cut in two sections. Text tiles are causal. Image tiles come from lists: for block b the entries
offsets[b] … split[b] - 1 are free of a mask, split[b] … offsets[b + 1] - 1 carry one, as bits; index i of the image section
stands for cell order[i], and rows are gathered through it. What is in no list is never touched. (Online softmax after
Dao et al. 2022, arXiv 2205.14135, in base 2.)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(order, block, cells, last, SIZE: tl.constexpr):
    """Cells of an image block, and which of them exist in this sequence: [SIZE], [SIZE]."""
    index = block * SIZE + tl.arange(0, SIZE)
    cell = tl.load(order + index, mask=index < cells, other=last)
    return cell, cell < last


@triton.jit
def _load(base, rows, valid, stride, D: tl.constexpr):
    """[rows, D]; rows that do not exist are zero."""
    return tl.load(base + rows[:, None] * stride + tl.arange(0, D)[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def _allowed(bits, mask_id, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_Q, BLOCK_K] bool: bit c % 32 of word [r, c // 32]."""
    WORDS: tl.constexpr = (BLOCK_K + 31) // 32
    r, c = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    word = tl.load(bits + mask_id.to(tl.int64) * (BLOCK_Q * WORDS) + r * WORDS + c // 32)
    return ((word >> (c % 32)) & 1) != 0


@triton.jit
def _attend(q, k, v, allowed, acc, top, total, scale, MASKED: tl.constexpr):
    """One tile of the online softmax. Every row has met a key in its first tile, so that `top` is finite from then on."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        s = tl.where(allowed, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(top - new)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new, total


@triton.jit
def forward(
    q, k, v, out, lse, order, offsets, split, blocks, mask_ids, bits,
    heads, text, cells, length, scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out = softmax(q kᵀ scale + mask) v, lse = log Σ exp. Grid (image blocks + text blocks, B·H); scale holds log2 e."""
    block, image_blocks = tl.program_id(0), tl.cdiv(cells, BLOCK_Q)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    is_image = block < image_blocks
    last = length - text
    at = tl.arange(0, BLOCK_Q)
    if is_image:
        cell, valid = _rows(order, block, cells, last, BLOCK_Q)
        rows, full = text + cell, text // BLOCK_K
    else:
        rows = (block - image_blocks) * BLOCK_Q + at
        valid = rows < text
        full = ((block - image_blocks) * BLOCK_Q) // BLOCK_K
    if tl.max(valid.to(tl.int32), 0) == 0:
        return
    queries = _load(q, rows, valid, q_s, D)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    near = tl.arange(0, BLOCK_K)
    for j in range(full):
        keys = j * BLOCK_K + near
        exists = keys < text
        kj, vj = _load(k, keys, exists, k_s, D), _load(v, keys, exists, v_s, D)
        acc, top, total = _attend(queries, kj, vj, exists, acc, top, total, scale, False)
    end = tl.where(is_image, text, tl.minimum(text, (block - image_blocks + 1) * BLOCK_Q))
    for j in range(full, tl.cdiv(end, BLOCK_K)):
        keys = j * BLOCK_K + near
        exists = keys < text
        kj, vj = _load(k, keys, exists, k_s, D), _load(v, keys, exists, v_s, D)
        allowed = exists[None, :] & (keys[None, :] <= rows[:, None])
        acc, top, total = _attend(queries, kj, vj, allowed, acc, top, total, scale, True)
    if is_image:
        start, middle, stop = tl.load(offsets + block), tl.load(split + block), tl.load(offsets + block + 1)
        for e in range(start, middle):
            cell, exists = _rows(order, tl.load(blocks + e), cells, last, BLOCK_K)
            kj, vj = _load(k, text + cell, exists, k_s, D), _load(v, text + cell, exists, v_s, D)
            acc, top, total = _attend(queries, kj, vj, exists, acc, top, total, scale, False)
        for e in range(middle, stop):
            cell, exists = _rows(order, tl.load(blocks + e), cells, last, BLOCK_K)
            kj, vj = _load(k, text + cell, exists, k_s, D), _load(v, text + cell, exists, v_s, D)
            allowed = _allowed(bits, tl.load(mask_ids + e), BLOCK_Q, BLOCK_K)
            acc, top, total = _attend(queries, kj, vj, allowed, acc, top, total, scale, True)
    whole = tl.program_id(1).to(tl.int64) * length
    acc = acc / total[:, None]
    d = tl.arange(0, D)
    tl.store(out + (whole + rows[:, None]) * D + d[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None])
    tl.store(lse + whole + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)


@triton.jit
def delta(grad, out, result, count, BLOCK: tl.constexpr, D: tl.constexpr):
    """result = Σ_d grad · out, a row each; grad and out contiguous [count, D]. Grid (⌈count / BLOCK⌉,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < count
    product = _load(grad, rows, valid, D, D).to(tl.float32) * _load(out, rows, valid, D, D).to(tl.float32)
    tl.store(result + rows, tl.sum(product, 1), mask=valid)


@triton.jit
def _probabilities(q, k, lse, allowed, scale, MASKED: tl.constexpr):
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None] * 1.4426950408889634)
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    return p


@triton.jit
def _query_tile(q, k, v, grad, lse, delta_rows, allowed, dq, scale, MASKED: tl.constexpr):
    p = _probabilities(q, k, lse, allowed, scale, MASKED)
    ds = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta_rows[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def backward_query(
    q, k, v, grad, lse, delta_rows, dq, order, offsets, split, blocks, mask_ids, bits,
    heads, text, cells, length, scale, scale_plain,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dq = Σ_k p (grad·v - delta) k / √D. The tiles, and the grid, of `forward`."""
    block, image_blocks = tl.program_id(0), tl.cdiv(cells, BLOCK_Q)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    whole = tl.program_id(1).to(tl.int64) * length
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    is_image = block < image_blocks
    last = length - text
    if is_image:
        cell, valid = _rows(order, block, cells, last, BLOCK_Q)
        rows, full = text + cell, text // BLOCK_K
    else:
        rows = (block - image_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        valid = rows < text
        full = ((block - image_blocks) * BLOCK_Q) // BLOCK_K
    if tl.max(valid.to(tl.int32), 0) == 0:
        return
    qi, gi = _load(q, rows, valid, q_s, D), _load(grad + whole * D, rows, valid, D, D)
    li = tl.load(lse + whole + rows, mask=valid, other=0.0)
    di = tl.load(delta_rows + whole + rows, mask=valid, other=0.0)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    near = tl.arange(0, BLOCK_K)
    for j in range(full):
        keys = j * BLOCK_K + near
        exists = keys < text
        kj, vj = _load(k, keys, exists, k_s, D), _load(v, keys, exists, v_s, D)
        acc = _query_tile(qi, kj, vj, gi, li, di, exists, acc, scale, False)
    end = tl.where(is_image, text, tl.minimum(text, (block - image_blocks + 1) * BLOCK_Q))
    for j in range(full, tl.cdiv(end, BLOCK_K)):
        keys = j * BLOCK_K + near
        exists = keys < text
        kj, vj = _load(k, keys, exists, k_s, D), _load(v, keys, exists, v_s, D)
        allowed = exists[None, :] & (keys[None, :] <= rows[:, None])
        acc = _query_tile(qi, kj, vj, gi, li, di, allowed, acc, scale, True)
    if is_image:
        start, middle, stop = tl.load(offsets + block), tl.load(split + block), tl.load(offsets + block + 1)
        for e in range(start, middle):
            cell, exists = _rows(order, tl.load(blocks + e), cells, last, BLOCK_K)
            kj, vj = _load(k, text + cell, exists, k_s, D), _load(v, text + cell, exists, v_s, D)
            acc = _query_tile(qi, kj, vj, gi, li, di, exists, acc, scale, False)
        for e in range(middle, stop):
            cell, exists = _rows(order, tl.load(blocks + e), cells, last, BLOCK_K)
            kj, vj = _load(k, text + cell, exists, k_s, D), _load(v, text + cell, exists, v_s, D)
            allowed = _allowed(bits, tl.load(mask_ids + e), BLOCK_Q, BLOCK_K)
            acc = _query_tile(qi, kj, vj, gi, li, di, allowed, acc, scale, True)
    at = dq + (whole + rows[:, None]) * D + tl.arange(0, D)[None, :]
    tl.store(at, (acc * scale_plain).to(dq.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _key_tile(
    q, grad, lse, delta_rows, rows, valid, q_s, k, v, allowed, dk, dv, scale, MASKED: tl.constexpr, D: tl.constexpr
):
    """Adds what one block of queries passes back to a block of keys. Queries that do not exist are zero and add zero."""
    qi, gi = _load(q, rows, valid, q_s, D), _load(grad, rows, valid, D, D)
    li = tl.load(lse + rows, mask=valid, other=0.0)
    di = tl.load(delta_rows + rows, mask=valid, other=0.0)
    p = _probabilities(qi, k, li, allowed, scale, MASKED)
    dv = tl.dot(tl.trans(p.to(gi.dtype)), gi, dv, input_precision="ieee")
    ds = p * (tl.dot(gi, tl.trans(v), input_precision="ieee") - di[:, None])
    dk = tl.dot(tl.trans(ds.to(qi.dtype)), qi, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_text(
    q, k, v, grad, lse, delta_rows, dk, dv, heads, text, length, scale, scale_plain, per_split,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_split, d_bh,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dk, dv of text keys, which every later position reads: split over the queries, so that no program takes much longer
    than one of `backward_image`. Grid (text blocks, splits, B·H); each split writes its own sum."""
    block, part = tl.program_id(0), tl.program_id(1)
    b, h = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    whole = tl.program_id(2).to(tl.int64) * length
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = keys < text
    kj, vj = _load(k, keys, exists, k_s, D), _load(v, keys, exists, v_s, D)
    dk_sum, dv_sum = tl.zeros((BLOCK_K, D), tl.float32), tl.zeros((BLOCK_K, D), tl.float32)
    first = tl.maximum((block * BLOCK_K) // BLOCK_Q, part * per_split)
    stop = tl.minimum(tl.cdiv(length, BLOCK_Q), (part + 1) * per_split)
    # From this block on every query is later than every key here.
    clear = tl.minimum(stop, tl.maximum(first, tl.cdiv((block + 1) * BLOCK_K, BLOCK_Q)))
    for i in range(first, clear):
        rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        allowed = keys[None, :] <= rows[:, None]
        dk_sum, dv_sum = _key_tile(
            q, grad + whole * D, lse + whole, delta_rows + whole, rows, rows < length, q_s, kj, vj, allowed,
            dk_sum, dv_sum, scale, True, D,
        )  # fmt: skip
    for i in range(clear, stop):
        rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        valid = rows < length
        dk_sum, dv_sum = _key_tile(
            q, grad + whole * D, lse + whole, delta_rows + whole, rows, valid, q_s, kj, vj, valid[:, None],
            dk_sum, dv_sum, scale, False, D,
        )  # fmt: skip
    at = part.to(tl.int64) * d_split + tl.program_id(2).to(tl.int64) * d_bh
    at += keys[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk + at, (dk_sum * scale_plain).to(dk.dtype.element_ty), mask=exists[:, None])
    tl.store(dv + at, dv_sum.to(dv.dtype.element_ty), mask=exists[:, None])


@triton.jit
def backward_image(
    q, k, v, grad, lse, delta_rows, dk, dv, order, offsets, split, blocks, mask_ids, bits,
    heads, text, cells, length, scale, scale_plain,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dk, dv of image keys, from the lists by key block. Grid (image blocks, B·H)."""
    block = tl.program_id(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    whole = tl.program_id(1).to(tl.int64) * length
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    last = length - text
    cell, exists = _rows(order, block, cells, last, BLOCK_K)
    if tl.max(exists.to(tl.int32), 0) == 0:
        return
    keys = text + cell
    kj, vj = _load(k, keys, exists, k_s, D), _load(v, keys, exists, v_s, D)
    dk_sum, dv_sum = tl.zeros((BLOCK_K, D), tl.float32), tl.zeros((BLOCK_K, D), tl.float32)
    start, middle, stop = tl.load(offsets + block), tl.load(split + block), tl.load(offsets + block + 1)
    for e in range(start, middle):
        query, valid = _rows(order, tl.load(blocks + e), cells, last, BLOCK_Q)
        dk_sum, dv_sum = _key_tile(
            q, grad + whole * D, lse + whole, delta_rows + whole, text + query, valid, q_s, kj, vj, valid[:, None],
            dk_sum, dv_sum, scale, False, D,
        )  # fmt: skip
    for e in range(middle, stop):
        query, valid = _rows(order, tl.load(blocks + e), cells, last, BLOCK_Q)
        allowed = _allowed(bits, tl.load(mask_ids + e), BLOCK_Q, BLOCK_K)
        dk_sum, dv_sum = _key_tile(
            q, grad + whole * D, lse + whole, delta_rows + whole, text + query, valid, q_s, kj, vj, allowed,
            dk_sum, dv_sum, scale, True, D,
        )  # fmt: skip
    at = (whole + keys[:, None]) * D + tl.arange(0, D)[None, :]
    tl.store(dk + at, (dk_sum * scale_plain).to(dk.dtype.element_ty), mask=exists[:, None])
    tl.store(dv + at, dv_sum.to(dv.dtype.element_ty), mask=exists[:, None])
