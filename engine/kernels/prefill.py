"""Causal attention of prompt chunks against pages, past and chunk alike: keys must be written before (rows.py).

Owns softmax(q k / sqrt(d)) v for sequences of many rows. Never sees decode rows, never writes KV.

A tile is ROWS rows: PACK query heads of one kv head times ROWS / PACK positions, so that keys serve a whole group and
little of the causal edge is wasted. Keys and values come by tensor map: with pointer loads the same tile loses 24-32 %
on an H100."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.kv_fp8 import QUAD, WEIGHT_GAIN, in_tokens, key_scale, value_scale

NEVER = tl.constexpr(-1.0e30)


@triton.jit
def block_row(
    table, scales, sequence, token, layer, head, high, TABLE_STRIDE, BLOCK_ROWS, SCALE_STRIDE,
    HK: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Row of a block's first key in the pool seen as [.., head_dim]; its first value lies HK * BLOCK rows on. And the
    scales of its tokens before `high`, zero behind."""
    block = tl.load(table + sequence * TABLE_STRIDE + token // BLOCK)
    words = tl.arange(0, BLOCK)
    if FP8:
        place = scales + block.to(tl.int64) * SCALE_STRIDE + (layer * HK + head) * BLOCK
        words = tl.load(place + words, mask=token + words < high, other=0)
    return block * BLOCK_ROWS + (layer * 2 * HK + head) * BLOCK, words


@triton.jit
def load_values(kv, quads, row, D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr):
    """The tile that begins at this row."""
    if FP8:
        values = in_tokens(quads.load([row // QUAD, 0]), BLOCK, D)
    else:
        values = kv.load([row, 0])
    return values


@triton.jit
def edge(q, keys, values, words, seen, scale, top, total, acc, FP8: tl.constexpr):
    """A tile that the causal edge or the context's end crosses. Every row has seen a token before, or sees one here."""
    score = tl.dot(q, tl.trans(keys.to(q.dtype))) * scale
    if FP8:
        score *= key_scale(words)[None, :]
    score = tl.where(seen, score, NEVER)
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, 1)
    if FP8:
        weight *= value_scale(words)[None, :] * WEIGHT_GAIN
    return new_top, total, tl.dot(weight.to(q.dtype), values.to(q.dtype), acc * shrink[:, None])


@triton.jit(do_not_specialize=["layer", "TABLE_STRIDE"])  # one kernel for all layers and any memory
def prefill(
    qkv, kv, quads, scales, table, row_starts, contexts, chunk_items, counts, out, layer,
    TABLE_STRIDE, BLOCK_ROWS, SCALE_STRIDE, scale,
    H: tl.constexpr, HK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Queries are normed and turned in place already. `kv` is a tensor map of the pool with tiles [BLOCK, D],
    `quads` one with tiles [BLOCK / 4, 4 * D] for values of fp8, `scales` the first layer's in the first block."""
    heads = H // PACK
    tile = tl.load(counts + 2) - 1 - tl.program_id(0) // heads  # a chunk's last tiles see most: they go first
    if tile >= 0:
        first_head = tl.program_id(0) % heads * PACK
        head = first_head // (H // HK)
        sequence = tl.load(chunk_items + tile * 2)
        start = tl.load(row_starts + sequence)
        rows = tl.load(row_starts + sequence + 1) - start
        context = tl.load(contexts + sequence)
        r = tl.arange(0, ROWS)
        d = tl.arange(0, D)[None, :]
        t = tl.arange(0, BLOCK)
        row = tl.load(chunk_items + tile * 2 + 1) + r // PACK
        position = context - rows + row
        inside = (row < rows)[:, None] & (d < HEAD_DIM)
        q_at = (start + row).to(tl.int64)[:, None] * ((H + 2 * HK) * HEAD_DIM) + (first_head + r % PACK)[
            :, None
        ] * HEAD_DIM
        q = tl.load(qkv + q_at + d, mask=inside, other=0.0)
        if FP8:
            q = q.to(tl.float16)
        top = tl.full([ROWS], NEVER, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        lowest = tl.min(position, 0)
        whole = (lowest + 1) // BLOCK * BLOCK  # blocks that every row sees to their end
        for token in range(0, whole, BLOCK):
            at, words = block_row(
                table, scales, sequence, token, layer, head, context, TABLE_STRIDE, BLOCK_ROWS, SCALE_STRIDE,
                HK, BLOCK, FP8,
            )  # fmt: skip
            score = tl.dot(q, tl.trans(kv.load([at, 0]).to(q.dtype)))
            if FP8:
                score *= (key_scale(words) * scale)[None, :]
                new_top = tl.maximum(top, tl.max(score, 1))
                weight = tl.exp2(score - new_top[:, None])
            else:
                new_top = tl.maximum(top, tl.max(score, 1) * scale)
                weight = tl.exp2(score * scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weight, 1)
            if FP8:
                weight *= value_scale(words)[None, :] * WEIGHT_GAIN
            values = load_values(kv, quads, at + HK * BLOCK, D, BLOCK, FP8).to(q.dtype)
            acc = tl.dot(weight.to(q.dtype), values, acc * shrink[:, None])
            top = new_top
        end = tl.minimum(lowest + ROWS // PACK, context)
        filled = context // BLOCK * BLOCK  # beyond lies what an earlier owner left, perhaps NaN
        for token in range(whole, tl.minimum(end, filled), BLOCK):
            at, words = block_row(
                table, scales, sequence, token, layer, head, context, TABLE_STRIDE, BLOCK_ROWS, SCALE_STRIDE,
                HK, BLOCK, FP8,
            )  # fmt: skip
            seen = (token + t)[None, :] <= position[:, None]
            keys, values = kv.load([at, 0]), load_values(kv, quads, at + HK * BLOCK, D, BLOCK, FP8)
            top, total, acc = edge(q, keys, values, words, seen, scale, top, total, acc, FP8)
        if end > filled:
            at, words = block_row(
                table, scales, sequence, filled, layer, head, context, TABLE_STRIDE, BLOCK_ROWS, SCALE_STRIDE,
                HK, BLOCK, FP8,
            )  # fmt: skip
            seen = (filled + t)[None, :] <= tl.minimum(position, context - 1)[:, None]
            values = load_values(kv, quads, at + HK * BLOCK, D, BLOCK, FP8)
            if not FP8:  # which is finite everywhere, and its scales are zero there
                values = tl.where((filled + t < context)[:, None], values, 0.0).to(q.dtype)
            top, total, acc = edge(q, kv.load([at, 0]), values, words, seen, scale, top, total, acc, FP8)
        if FP8:
            acc *= 1.0 / WEIGHT_GAIN
        o_at = (start + row).to(tl.int64)[:, None] * (H * HEAD_DIM) + (first_head + r % PACK)[:, None] * HEAD_DIM
        tl.store(out + o_at + d, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
