"""Row kernels around the products: embedding with rope's turn, RMS norm of picked rows, silu * mul, rope + write; and
what carries a step's inputs in and its answer out.

Owns what is done to each row alone. Never mixes rows, never reads old KV.

A decode step of few rows uses the first two once each; the rest serve steps so large that cuBLAS computes the products,
and steps with prompt chunks, whose keys must be in the pages before anyone reads them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.kv_fp8 import QUAD, joined, rounded, scale_of
from engine.kernels.linear import silu_mul

CARRIED_WORDS = 4096  # of one program


@triton.jit(do_not_specialize=["COUNT"])
def carry_words(source, into, COUNT, N: tl.constexpr):
    """into[:COUNT] = source[:COUNT], one of them in registered host memory."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(into + at, tl.load(source + at, mask=at < COUNT), mask=at < COUNT)


@triton.jit
def embed(
    ids, sources, sampled, positions, table, frequencies, x, turn, WIDTH, HALF,
    W: tl.constexpr, D: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    """x[row] = table[id]; turn[row] = cos and sin of position * frequency, once for all layers. GATHERED: rows with a
    source take the id that the step before sampled there, which the host does not know yet."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + row)
    if GATHERED:
        source = tl.load(sources + row)
        token = tl.where(source >= 0, tl.load(sampled + tl.maximum(source, 0)), token)
    token = tl.maximum(token, 0).to(tl.int64)
    column = tl.arange(0, W)
    tl.store(
        x + row * WIDTH + column, tl.load(table + token * WIDTH + column, mask=column < WIDTH), mask=column < WIDTH
    )
    d = tl.arange(0, D)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + d, mask=d < HALF, other=0.0)
    tl.store(turn + row * 2 * HALF + d, tl.cos(angle), mask=d < HALF)
    tl.store(turn + row * 2 * HALF + HALF + d, tl.sin(angle), mask=d < HALF)


@triton.jit
def norm_rows(
    x, rows, weight, y, WIDTH, W: tl.constexpr, EPS: tl.constexpr, PICKED: tl.constexpr, WEIGHTED: tl.constexpr
):
    """y[i] = x[rows[i]] / rms * weight."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64) if PICKED else i
    column = tl.arange(0, W)
    inside = column < WIDTH
    value = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / WIDTH + EPS)
    if WEIGHTED:
        value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i * WIDTH + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate_rows(gate_up, y, WIDTH, W: tl.constexpr):
    """y[row] = silu(gate) * up of [rows, 2 * WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * W + tl.arange(0, W)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, silu_mul(gate, up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def turned(value, partner, weight, cos, sin, d, HEAD_DIM: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr):
    """[heads, D] normed and turned, float32. `partner` is the value at d ^ 1: neighbours turn together."""
    value = value.to(tl.float32)
    partner = partner.to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / HEAD_DIM + EPS)
        value *= scale * tl.load(weight + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        partner *= scale * tl.load(weight + (d ^ 1), mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    return value * cos + tl.where(d % 2 == 0, -partner, partner) * sin


@triton.jit
def value_place(token, d, HEAD_DIM: tl.constexpr, FP8: tl.constexpr):
    """Where in a block's values of one head a token's numbers lie. fp8: the four numbers of four tokens side by side,
    since the matrix unit wants neighbours in a register and shared memory gives no fewer than 32 bits at once."""
    if FP8:
        place = token // QUAD * (QUAD * HEAD_DIM) + d * QUAD + token % QUAD
    else:
        place = token * HEAD_DIM + d
    return place


@triton.jit
def stored(at, value_at, scale_at, keys, values, fits, has_slot, FP8: tl.constexpr):
    """Keys and values [tokens or heads, D] put in their places. What will be read of them, and, of FP8 alone, the words
    of their scales [tokens or heads], to be multiplied in."""
    words = 0
    if FP8:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
        of_keys, of_values = scale_of(keys), scale_of(values)
        keys, values = rounded(keys / of_keys[:, None]), rounded(values / of_values[:, None])
        words = joined(of_keys, of_values)
        tl.store(scale_at, words[:, None], mask=has_slot)
    tl.store(at, keys.to(at.dtype.element_ty), mask=fits)
    tl.store(value_at, values.to(at.dtype.element_ty), mask=fits)
    return keys, values, words


@triton.jit(do_not_specialize_on_alignment=["slots"])  # chunks begin at any row
def rope_write(
    qkv, turn, q_norm, k_norm, kv, scales, slots, BLOCK_STRIDE, SCALE_STRIDE,
    H: tl.constexpr, HK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One row: queries turned in place, keys turned and values into the slot's place in the pages. HEADS is a power of
    two of at least H + HK. `kv` is one layer's first block; a slot of -1 writes nowhere."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    h = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D)[None, :]
    pair = tl.arange(0, D) // 2
    cos = tl.load(turn + row * HEAD_DIM + pair, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
    sin = tl.load(turn + row * HEAD_DIM + HEAD_DIM // 2 + pair, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
    base = qkv + row * (H + 2 * HK) * HEAD_DIM
    is_query = (h < H) & (d < HEAD_DIM)
    is_key = (h < HK) & (d < HEAD_DIM)
    query = tl.load(base + h * HEAD_DIM + d, mask=is_query, other=0.0)
    query_partner = tl.load(base + h * HEAD_DIM + (d ^ 1), mask=is_query, other=0.0)
    key = tl.load(base + (H + h) * HEAD_DIM + d, mask=is_key, other=0.0)
    key_partner = tl.load(base + (H + h) * HEAD_DIM + (d ^ 1), mask=is_key, other=0.0)
    values = tl.load(base + (H + HK + h) * HEAD_DIM + d, mask=is_key, other=0.0)
    queries = turned(query, query_partner, q_norm, cos, sin, d, HEAD_DIM, EPS, NORMED)
    keys = turned(key, key_partner, k_norm, cos, sin, d, HEAD_DIM, EPS, NORMED).to(qkv.dtype.element_ty)
    tl.debug_barrier()  # every neighbour is read before one is overwritten
    tl.store(base + h * HEAD_DIM + d, queries.to(qkv.dtype.element_ty), mask=is_query)
    at = kv + (slot // BLOCK) * BLOCK_STRIDE + h * (BLOCK * HEAD_DIM) + (slot % BLOCK) * HEAD_DIM + d
    value_at = kv + (slot // BLOCK) * BLOCK_STRIDE + (HK + h) * (BLOCK * HEAD_DIM)
    value_at += value_place(slot % BLOCK, d, HEAD_DIM, FP8)
    scale_at = scales + (slot // BLOCK) * SCALE_STRIDE + h * BLOCK + slot % BLOCK
    has_slot = (h < HK) & (slot >= 0)
    stored(at, value_at, scale_at, keys, values, is_key & (slot >= 0), has_slot, FP8)


def rms_norm(x: Tensor, out: Tensor, eps: float, weight: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """out[i] = x[rows[i]] / rms [* weight]; all rows in order when none are picked."""
    width = triton.next_power_of_2(x.shape[1])
    norm_rows[(len(out),)](
        x, x if rows is None else rows, x if weight is None else weight, out, x.shape[1], W=width, EPS=eps,
        PICKED=rows is not None, WEIGHTED=weight is not None, num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return out


def gated(gate_up: Tensor, out: Tensor) -> Tensor:
    """silu(first half of each row) * second half."""
    rows, width = out.shape
    gate_rows[(rows, triton.cdiv(width, 2048))](gate_up, out, width, W=2048, num_warps=4)
    return out


def carry(source: Tensor, into: Tensor) -> None:
    """Copy int32 to or from registered host memory without a copy engine: that of an H100 serves one stream's queue to
    its end, so that the inputs of a step waited 91 ms behind the restore of a 32k prefix."""
    carry_words[(triton.cdiv(source.numel(), CARRIED_WORDS),)](
        source, into, source.numel(), N=CARRIED_WORDS, num_warps=8
    )  # fmt: skip


def embed_into(
    ids: Tensor, positions: Tensor, table: Tensor, frequencies: Tensor, x: Tensor, turns: Tensor,
    sources: Tensor | None = None, sampled: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills x [rows, width] with hidden states, turns [rows, head_dim] float32 with all cosines, then all sines.
    Rows with a source (not -1) take `sampled[source]` for their id."""
    is_gathered = sources is not None and sampled is not None
    embed[(len(ids),)](
        ids, sources if is_gathered else ids, sampled if is_gathered else ids, positions, table, frequencies, x, turns,
        table.shape[1], len(frequencies), W=triton.next_power_of_2(table.shape[1]),
        D=triton.next_power_of_2(len(frequencies)), GATHERED=is_gathered, num_warps=4,
    )  # fmt: skip
