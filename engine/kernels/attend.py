"""Paged attention of few query rows over a work list: decode, verify and shared prefixes in one kernel.

Owns softmax(q k / sqrt(d)) v over old KV in pages and the rows' own new KV, its writing, and the merging of parts.
Never sees prompt chunks (prefill.py) and never decides who shares (the host orders rows of a group side by side).

An item of the list is (rows, KV range, part number) for each kv head. Query heads of a group are rows of one tile, so
a KV byte is read once. A sequence of one part is stored at once; else parts lie in float32 with their log-sum and
`merge` adds them in part order. Merging by the last part to arrive was measured and lost: the release at GPU scope
costs 3 us at batch 1, and at 64 x 576 in parts of 64 tokens it tripled the kernel (183 us against 67 with a kernel of
its own). Most steps of many sequences need no parts and no merge at all.

Hot: one launch a layer. Floor: KV bytes over the memory rate; what depends on the kernel before is read after the wait,
so with AHEAD the first tile of old KV is already on its way."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.kv_fp8 import QUAD, WEIGHT_GAIN, in_tokens, key_scale, value_scale
from engine.kernels.rows import stored, turned, value_place

# int32 numbers of an item: row, rows, sequence, low, high, part, slot of part 0, parts, is_last
ITEM = tl.constexpr(16)
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def fold(q, keys, values, words, seen, scale, top, total, acc, FP8: tl.constexpr):
    """One tile of the running softmax in base 2. `seen` masks [rows, tokens]. FP8: `words` are the tokens' scales,
    one multiply each, for a token's score and for its weight."""
    score = tl.dot(q, tl.trans(keys.to(q.dtype))) * scale
    if FP8:
        score *= key_scale(words)[None, :]
    score = tl.where(seen, score, NEVER)
    new_top = tl.maximum(top, tl.max(score, 1))
    shrink = tl.exp2(top - new_top)
    weight = tl.where(seen, tl.exp2(score - new_top[:, None]), 0.0)
    total = total * shrink + tl.sum(weight, 1)
    if FP8:
        weight *= value_scale(words)[None, :] * WEIGHT_GAIN
    acc = tl.dot(weight.to(q.dtype), values.to(q.dtype), acc * shrink[:, None])
    return new_top, total, acc


@triton.jit
def load_tile(
    kv, scales, block, token, high, head, t, d, BLOCK_STRIDE, SCALE_STRIDE,
    HK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Keys, values and scales of one block. Rows at `high` and beyond read as zero: what lies there may be another's
    NaN. fp8 has none but in its scales, and values come four tokens at a time."""
    first = kv + block.to(tl.int64) * BLOCK_STRIDE + head * (BLOCK * HEAD_DIM)
    at = first + t[:, None] * HEAD_DIM + d
    inside = (token + t < high)[:, None] & (d < HEAD_DIM)
    keys = tl.load(at, mask=inside, other=0.0)
    if FP8:
        words = tl.load(scales + block.to(tl.int64) * SCALE_STRIDE + head * BLOCK + t, mask=token + t < high, other=0)
        quad, place = tl.arange(0, BLOCK // QUAD)[:, None], tl.arange(0, QUAD * D)[None, :]
        quads_at = first + HK * BLOCK * HEAD_DIM + quad * (QUAD * HEAD_DIM) + place
        quads = tl.load(quads_at, mask=(token + quad * QUAD < high) & (place < QUAD * HEAD_DIM), other=0.0)
        values = in_tokens(quads, BLOCK, D)
    else:
        words = t
        values = tl.load(at + HK * BLOCK * HEAD_DIM, mask=inside, other=0.0)
    return keys, values, words


@triton.jit
def own_tokens(
    qkv, turn, k_norm, kv, scales, slots, row, j, is_mine, head, d, BLOCK_STRIDE, SCALE_STRIDE,
    H: tl.constexpr, HK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    NORMED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Keys, turned, and values of the rows' own tokens [J, D], written to their slots as well, and their scales."""
    fits = is_mine & (d < HEAD_DIM)
    new = qkv + (row + j).to(tl.int64) * ((H + 2 * HK) * HEAD_DIM) + (H + head) * HEAD_DIM
    key = tl.load(new + d, mask=fits, other=0.0)
    partner = tl.load(new + (d ^ 1), mask=fits, other=0.0)
    values = tl.load(new + HK * HEAD_DIM + d, mask=fits, other=0.0)
    slot = tl.load(slots + row + j, mask=is_mine, other=-1).to(tl.int64)
    cos, sin = load_turn(turn, row + j, d, fits, HEAD_DIM)
    keys = turned(key, partner, k_norm, cos, sin, d, HEAD_DIM, EPS, NORMED).to(qkv.dtype.element_ty)
    at = kv + (slot // BLOCK) * BLOCK_STRIDE + head * (BLOCK * HEAD_DIM) + (slot % BLOCK) * HEAD_DIM + d
    value_at = kv + (slot // BLOCK) * BLOCK_STRIDE + (HK + head) * (BLOCK * HEAD_DIM)
    value_at += value_place(slot % BLOCK, d, HEAD_DIM, FP8)
    scale_at = scales + (slot // BLOCK) * SCALE_STRIDE + head * BLOCK + slot % BLOCK
    return stored(at, value_at, scale_at, keys, values, fits & (slot >= 0), is_mine & (slot >= 0), FP8)


@triton.jit
def load_turn(turn, row, d, fits, HEAD_DIM: tl.constexpr):
    """Cosines and sines of rows, each number twice."""
    cos = tl.load(turn + row * HEAD_DIM + d // 2, mask=fits, other=0.0)
    sin = tl.load(turn + row * HEAD_DIM + HEAD_DIM // 2 + d // 2, mask=fits, other=0.0)
    return cos, sin


@triton.jit
def merge(
    part_o, part_lse, slot_starts, row_starts, out,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One sequence and kv head: out = its parts weighed by their sums, in part order, CHUNK at a time."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    if PDL > 0:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slot_starts + sequence)
    parts = tl.load(slot_starts + sequence + 1) - slot
    row = tl.load(row_starts + sequence)
    rows = tl.load(row_starts + sequence + 1) - row
    if parts > 1:
        d = tl.arange(0, D)[None, :]
        r = tl.arange(0, R * GP)
        heads = head * G + r % GP
        inside = (r // GP < rows) & (r % GP < G)
        top = tl.full([R * GP], NEVER, tl.float32)
        total = tl.zeros([R * GP], tl.float32)
        acc = tl.zeros([R * GP, D], tl.float32)
        for first in range(0, parts, CHUNK):
            part = first + tl.arange(0, CHUNK)
            there = (part < parts)[:, None] & inside[None, :]
            at = ((slot + part).to(tl.int64)[:, None] * R + (r // GP)[None, :]) * H + heads[None, :]
            lse = tl.load(part_lse + at, mask=there, other=NEVER)
            fits = there[:, :, None] & (d < HEAD_DIM)[None, :, :]
            o = tl.load(part_o + at[:, :, None] * HEAD_DIM + d[None, :, :], mask=fits, other=0.0)
            new_top = tl.maximum(top, tl.max(lse, 0))
            weight = tl.exp2(lse - new_top[None, :])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weight, 0)
            acc = acc * shrink[:, None] + tl.sum(o * weight[:, :, None], 0)
            top = new_top
        at = out + ((row + r // GP) * H + heads)[:, None] * HEAD_DIM + d
        tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None] & (d < HEAD_DIM))


@triton.jit(do_not_specialize=["TABLE_STRIDE"])  # one kernel whatever memory there is
def attend(
    qkv, turn, q_norm, k_norm, kv, scales, table, items, item_count, slots, slot_starts, part_o, part_lse, out,
    TABLE_STRIDE, BLOCK_STRIDE, SCALE_STRIDE, scale,
    H: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr,
    SHARED: tl.constexpr, AHEAD: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS: rows of a tile, queries x GP heads (GP: G padded to a power of two). R: most rows of one sequence (1:
    decode, more: verify). SHARED: rows of an item belong to as many sequences. `kv` is one layer's first block, `qkv`
    neither normed nor turned: the rows' own keys and
    values come from it, not from the pages, so no part waits for another's write. FP8: they are rounded first, so that
    this step reads what later ones will."""
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
    r = tl.arange(0, ROWS)
    t = tl.arange(0, BLOCK)
    d = tl.arange(0, D)[None, :]
    for index in range(tl.program_id(0), tl.load(item_count) * HK, tl.num_programs(0)):
        head = index % HK
        item = items + (index // HK) * ITEM
        row = tl.load(item)
        rows = tl.load(item + 1)
        sequence = tl.load(item + 2)
        low = tl.load(item + 3)
        high = tl.load(item + 4)
        part = tl.load(item + 5)
        slot = tl.load(item + 6)
        parts = tl.load(item + 7)
        is_last = tl.load(item + 8)
        blocks = table + sequence * TABLE_STRIDE
        block = tl.load(blocks + low // BLOCK)
        if AHEAD:
            keys, values, words = load_tile(
                kv, scales, block, low, high, head, t, d, BLOCK_STRIDE, SCALE_STRIDE, HK, HEAD_DIM, D, BLOCK, FP8
            )  # fmt: skip
        if PDL > 0:
            tl.extra.cuda.gdc_wait()

        query = row + r // GP
        inside = (r // GP < rows) & (r % GP < G)
        fits = inside[:, None] & (d < HEAD_DIM)
        base = qkv + query.to(tl.int64)[:, None] * ((H + 2 * HK) * HEAD_DIM) + (head * G + r % GP)[:, None] * HEAD_DIM
        value = tl.load(base + d, mask=fits, other=0.0)  # all loads before their first use: one latency, not three
        partner = tl.load(base + (d ^ 1), mask=fits, other=0.0)
        if R == 1 and not SHARED:  # one row: its own token's turn is the queries'
            is_mine = (d < HEAD_DIM) & (is_last != 0)
            new = qkv + row.to(tl.int64) * ((H + 2 * HK) * HEAD_DIM) + (H + head) * HEAD_DIM
            key = tl.load(new + d, mask=is_mine, other=0.0)
            key_partner = tl.load(new + (d ^ 1), mask=is_mine, other=0.0)
            own_value = tl.load(new + HK * HEAD_DIM + d, mask=is_mine, other=0.0)
            own_slot = tl.load(slots + row).to(tl.int64)
            cos, sin = load_turn(turn, row, d, d < HEAD_DIM, HEAD_DIM)
        else:
            cos, sin = load_turn(turn, query[:, None], d, fits, HEAD_DIM)
        q = turned(value, partner, q_norm, cos, sin, d, HEAD_DIM, EPS, NORMED).to(qkv.dtype.element_ty)
        if FP8:
            q = q.to(tl.float16)
        top = tl.full([ROWS], NEVER, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        if not SHARED:  # the last part owns the rows' own tokens
            if R == 1:
                own = turned(key, key_partner, k_norm, cos, sin, d, HEAD_DIM, EPS, NORMED).to(qkv.dtype.element_ty)
                place = head * (BLOCK * HEAD_DIM) + (own_slot % BLOCK) * HEAD_DIM
                own_at = kv + (own_slot // BLOCK) * BLOCK_STRIDE + place + d
                value_at = kv + (own_slot // BLOCK) * BLOCK_STRIDE + (HK + head) * (BLOCK * HEAD_DIM)
                value_at += value_place(own_slot % BLOCK, d, HEAD_DIM, FP8)
                scale_at = scales + (own_slot // BLOCK) * SCALE_STRIDE + head * BLOCK + own_slot % BLOCK
                own, own_value, own_word = stored(
                    own_at, value_at, scale_at + tl.arange(0, 1)[:, None], own, own_value,
                    is_mine & (own_slot >= 0), (is_last != 0) & (own_slot >= 0), FP8,
                )  # fmt: skip
                own_score = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * scale
                own_value = own_value.to(tl.float32)
                if FP8:
                    own_score *= key_scale(own_word)
                    own_value *= value_scale(own_word)[:, None] * WEIGHT_GAIN
                top = tl.where(is_last != 0, own_score, top)
                total = tl.where(is_last != 0, 1.0, total)
                acc += own_value
            elif is_last != 0:
                j = tl.arange(0, 16)
                own_keys, own_values, own_words = own_tokens(
                    qkv, turn, k_norm, kv, scales, slots, row, j[:, None], (j < rows)[:, None], head, d,
                    BLOCK_STRIDE, SCALE_STRIDE, H, HK, HEAD_DIM, BLOCK, EPS, NORMED, FP8,
                )  # fmt: skip
                seen = (j[None, :] <= (r // GP)[:, None]) & (j < rows)[None, :]
                top, total, acc = fold(q, own_keys, own_values, own_words, seen, scale, top, total, acc, FP8)
        if AHEAD:
            top, total, acc = fold(q, keys, values, words, (low + t < high)[None, :], scale, top, total, acc, FP8)
            low += BLOCK
            block = tl.load(blocks + low // BLOCK, mask=low < high, other=0)
        for token in range(low, high, BLOCK):
            keys, values, words = load_tile(
                kv, scales, block, token, high, head, t, d, BLOCK_STRIDE, SCALE_STRIDE, HK, HEAD_DIM, D, BLOCK, FP8
            )  # fmt: skip
            # the next block's number is carried, so that its load is no stage of the pipeline of tiles
            block = tl.load(blocks + token // BLOCK + 1, mask=token + BLOCK < high, other=0)
            seen = (token + t < high)[None, :]
            top, total, acc = fold(q, keys, values, words, seen, scale, top, total, acc, FP8)

        if FP8:
            acc *= 1.0 / WEIGHT_GAIN
        o = acc / total[:, None]
        if SHARED or parts > 1:
            if SHARED:
                part_at = (tl.load(slot_starts + sequence + r // GP, mask=inside, other=0) + part).to(tl.int64) * R
            else:
                part_at = (slot + part).to(tl.int64) * R + r // GP
            part_at = part_at * H + head * G + r % GP
            tl.store(part_o + part_at[:, None] * HEAD_DIM + d, o, mask=fits)
            tl.store(part_lse + part_at, top + tl.log2(total), mask=inside)
        else:
            at = out + (query * H + head * G + r % GP)[:, None] * HEAD_DIM + d
            tl.store(at, o.to(out.dtype.element_ty), mask=fits)
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
