"""Causal attention of prompt chunks against pages, past and chunk alike: keys must be written before (rows.py).

Owns softmax(q k / sqrt(d)) v for sequences of many rows. Never sees decode rows, never writes KV.

A tile is ROWS rows: PACK query heads of one kv head times ROWS / PACK positions, so that keys serve a whole group and
little of the causal edge is wasted. Keys and values come by tensor map: with pointer loads the same tile loses 24-32 %
on an H100."""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e30)


@triton.jit
def block_row(table, sequence, token, layer, head, TABLE_STRIDE, LAYERS, HK: tl.constexpr, BLOCK: tl.constexpr):
    """Row of a block's first key in the pool seen as [.., head_dim]; its first value lies HK * BLOCK rows on."""
    block = tl.load(table + sequence * TABLE_STRIDE + token // BLOCK)
    return ((block * LAYERS + layer) * 2 * HK + head) * BLOCK


@triton.jit
def edge(q, keys, values, seen, scale, top, total, acc):
    """A tile that the causal edge or the context's end crosses. Every row has seen a token before, or sees one here."""
    score = tl.where(seen, tl.dot(q, tl.trans(keys)) * scale, NEVER)
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, 1)
    return new_top, total, tl.dot(weight.to(q.dtype), values, acc * shrink[:, None])


@triton.jit(do_not_specialize=["layer", "TABLE_STRIDE"])  # one kernel for all layers and any memory
def prefill(
    qkv, kv, table, row_starts, contexts, chunk_items, counts, out, layer, TABLE_STRIDE, LAYERS, scale,
    H: tl.constexpr, HK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Queries are normed and turned in place already. `kv` is a tensor map of the pool with tiles [BLOCK, D]."""
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
        top = tl.full([ROWS], NEVER, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        lowest = tl.min(position, 0)
        whole = (lowest + 1) // BLOCK * BLOCK  # blocks that every row sees to their end
        for token in range(0, whole, BLOCK):
            at = block_row(table, sequence, token, layer, head, TABLE_STRIDE, LAYERS, HK, BLOCK)
            score = tl.dot(q, tl.trans(kv.load([at, 0])))
            new_top = tl.maximum(top, tl.max(score, 1) * scale)
            weight = tl.exp2(score * scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weight, 1)
            acc = tl.dot(weight.to(q.dtype), kv.load([at + HK * BLOCK, 0]), acc * shrink[:, None])
            top = new_top
        end = tl.minimum(lowest + ROWS // PACK, context)
        filled = context // BLOCK * BLOCK  # beyond lies what an earlier owner left, perhaps NaN
        for token in range(whole, tl.minimum(end, filled), BLOCK):
            at = block_row(table, sequence, token, layer, head, TABLE_STRIDE, LAYERS, HK, BLOCK)
            seen = (token + t)[None, :] <= position[:, None]
            top, total, acc = edge(q, kv.load([at, 0]), kv.load([at + HK * BLOCK, 0]), seen, scale, top, total, acc)
        if end > filled:
            at = block_row(table, sequence, filled, layer, head, TABLE_STRIDE, LAYERS, HK, BLOCK)
            seen = (filled + t)[None, :] <= tl.minimum(position, context - 1)[:, None]
            values = tl.where((filled + t < context)[:, None], kv.load([at + HK * BLOCK, 0]), 0.0).to(q.dtype)
            top, total, acc = edge(q, kv.load([at, 0]), values, seen, scale, top, total, acc)
        o_at = (start + row).to(tl.int64)[:, None] * (H * HEAD_DIM) + (first_head + r % PACK)[:, None] * HEAD_DIM
        tl.store(out + o_at + d, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
