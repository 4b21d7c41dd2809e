"""Causal attention of prompt chunks against pages, past and chunk alike: keys must be written before (rows.py).

Owns softmax(q k / sqrt(d)) v for sequences of many rows. Never sees decode rows, never writes KV.

A tile is ROWS rows: PACK query heads of one kv head times ROWS / PACK positions, so that keys serve a whole group and
little of the causal edge is wasted. Keys and values come by tensor map: with pointer loads the same tile loses 24-32 %
on an H100.

A short chunk behind a long past is few tiles: 90 rows of an 8B model are 24 programs for 132 multiprocessors. There a
tile's past is cut into `parts`, a program each, and `join` adds them in part order."""

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
    """A tile that the causal edge or the context's end crosses; a row of a part may have seen nothing yet."""
    score = tl.dot(q, tl.trans(keys.to(q.dtype))) * scale
    if FP8:
        score *= key_scale(words)[None, :]
    score = tl.where(seen, score, NEVER)
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.where(seen, tl.exp2(score - new_top[:, None]), 0.0)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, 1)
    if FP8:
        weight *= value_scale(words)[None, :] * WEIGHT_GAIN
    return new_top, total, tl.dot(weight.to(q.dtype), values.to(q.dtype), acc * shrink[:, None])


@triton.jit(do_not_specialize=["layer", "parts", "TABLE_STRIDE"])  # one kernel for all layers and any memory
def prefill(
    qkv, kv, quads, scales, table, row_starts, contexts, chunk_items, counts, out, part_o, part_lse, layer, parts,
    TABLE_STRIDE, BLOCK_ROWS, SCALE_STRIDE, scale,
    H: tl.constexpr, HK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr, FP8: tl.constexpr, HAS_PARTS: tl.constexpr,
):  # fmt: skip
    """Queries are normed and turned in place already. `kv` is a tensor map of the pool with tiles [BLOCK, D],
    `quads` one with tiles [BLOCK / 4, 4 * D] for values of fp8, `scales` the first layer's in the first block. Without
    parts the answer is in `out`; with them it lies in `part_o`, divided by its sum, and `part_lse`, for `join`."""
    heads = H // PACK
    number = tl.program_id(0)
    part = 0
    if HAS_PARTS:
        part = number % parts
        number = number // parts
    tile = tl.load(counts + 2) - 1 - number // heads  # a chunk's last tiles see most: they go first
    if tile >= 0:
        first_head = number % heads * PACK
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
        low, high = 0, whole
        if HAS_PARTS:
            size = (whole // BLOCK + parts - 1) // parts * BLOCK
            low = part * size
            high = tl.minimum(low + size, whole)
        for token in range(low, high, BLOCK):
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
        if HAS_PARTS:
            end = tl.where(part == parts - 1, end, whole)  # the last part has the causal edge
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
        if HAS_PARTS:
            slot = ((tile * heads + first_head // PACK) * parts + part) * ROWS + r
            total = tl.where(total > 0.0, total, 1.0)  # a row may have seen nothing in its last part
            tl.store(part_lse + slot, top + tl.log2(total))
            tl.store(part_o + slot[:, None] * HEAD_DIM + d, acc / total[:, None], mask=d < HEAD_DIM)
        else:
            o_at = (start + row).to(tl.int64)[:, None] * (H * HEAD_DIM) + (first_head + r % PACK)[:, None] * HEAD_DIM
            tl.store(out + o_at + d, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def join(
    row_starts, chunk_items, counts, out, part_o, part_lse, parts,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """SLICE rows of one tile: out = the tile's parts weighed by their sums, in part order."""
    heads, slices = H // PACK, ROWS // SLICE
    tile = tl.program_id(0) // (heads * slices)
    if tile < tl.load(counts + 2):
        group = tl.program_id(0) // slices % heads
        r = tl.program_id(0) % slices * SLICE + tl.arange(0, SLICE)
        d = tl.arange(0, D)[None, :]
        sequence = tl.load(chunk_items + tile * 2)
        start = tl.load(row_starts + sequence)
        row = tl.load(chunk_items + tile * 2 + 1) + r // PACK
        inside = (row < tl.load(row_starts + sequence + 1) - start)[:, None] & (d < HEAD_DIM)
        top = tl.full([SLICE], NEVER, tl.float32)
        total = tl.zeros([SLICE], tl.float32)
        acc = tl.zeros([SLICE, D], tl.float32)
        for part in range(parts):
            slot = ((tile * heads + group) * parts + part) * ROWS + r
            lse = tl.load(part_lse + slot)
            o = tl.load(part_o + slot[:, None] * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
            new_top = tl.maximum(top, lse)
            weight, shrink = tl.exp2(lse - new_top), tl.exp2(top - new_top)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + o * weight[:, None]
            top = new_top
        o_at = (start + row).to(tl.int64)[:, None] * (H * HEAD_DIM) + (group * PACK + r % PACK)[:, None] * HEAD_DIM
        tl.store(out + o_at + d, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
