"""The step's work lists, made on the device from lengths: what attend.py and prefill.py walk through.

Owns which KV range is whose item. Never reads KV or block tables, never runs more than once a step.

The size of a part is the host's choice (`part_tokens`), for it decides which graph runs: one with a merge or one
without. A fixed size makes a row's arithmetic independent of its neighbours (the strict batch-invariant mode)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.attend import ITEM

FEW, SHARED, CHUNKS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # places in `counts`


@triton.jit
def put(items, at, mask, row, rows, sequence, low, high, part, slot, private_parts, is_last):
    item = items + at * ITEM
    tl.store(item, row, mask=mask)
    tl.store(item + 1, rows, mask=mask)
    tl.store(item + 2, sequence, mask=mask)
    tl.store(item + 3, low, mask=mask)
    tl.store(item + 4, high, mask=mask)
    tl.store(item + 5, part, mask=mask)
    tl.store(item + 6, slot, mask=mask)
    tl.store(item + 7, private_parts, mask=mask)
    tl.store(item + 8, is_last, mask=mask)


@triton.jit(do_not_specialize=["N"])  # sequences
def plan_step(
    row_starts, contexts, shared, leads, items, shared_items, chunk_items, counts, slot_starts, part_size, N,
    S: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, MEMBERS: tl.constexpr,
    SHARED_PART: tl.constexpr, CHUNK_ROWS: tl.constexpr, HAS_SHARED: tl.constexpr, HAS_CHUNKS: tl.constexpr,
):  # fmt: skip
    """S: sequences, padded to a power of two. Sequences of up to R rows go to attend, longer ones to prefill."""
    s = tl.arange(0, S)
    there = s < N
    row = tl.load(row_starts + s, mask=there, other=0)
    rows = tl.load(row_starts + s + 1, mask=there, other=0) - row
    few = there & (rows > 0) & (rows <= R)
    old = tl.where(few, tl.load(contexts + s, mask=there, other=0) - rows, 0)
    common = tl.zeros([S], tl.int32)
    if HAS_SHARED:
        common = tl.where(few, tl.load(shared + s, mask=there, other=0), 0)
    own = old - common
    size = tl.load(part_size)
    parts = (own + size - 1) // size
    even = (own + tl.maximum(parts, 1) - 1) // tl.maximum(parts, 1)
    even = tl.maximum((even + BLOCK - 1) // BLOCK * BLOCK, BLOCK)  # as even as whole blocks allow
    parts = tl.where(few, tl.maximum((own + even - 1) // even, 1), 0)
    shared_parts = (common + SHARED_PART - 1) // SHARED_PART
    ends = tl.cumsum(parts + shared_parts, 0)
    first = tl.cumsum(parts, 0) - parts
    if tl.program_id(0) == 0:
        tl.store(slot_starts, 0)
        tl.store(slot_starts + 1 + s, ends, mask=there)
        tl.store(counts + FEW, tl.sum(parts, 0))
    for k in range(tl.program_id(0), tl.max(parts, 0), tl.num_programs(0)):
        low = common + k * even
        put(items, first + k, k < parts, row, rows, s, low, tl.minimum(low + even, old), shared_parts + k,
            ends - parts - shared_parts, parts + shared_parts, (k == parts - 1).to(tl.int32))  # fmt: skip
    if HAS_SHARED:
        lead = tl.where(few & (common > 0), tl.load(leads + s, mask=there, other=-1), -1)
        members = tl.histogram(tl.maximum(lead, 0), S, mask=lead >= 0)
        tiles = (members + MEMBERS - 1) // MEMBERS
        shares = tiles * shared_parts
        first = tl.cumsum(shares, 0) - shares
        if tl.program_id(0) == 0:
            tl.store(counts + SHARED, tl.sum(shares, 0))
        for k in range(tl.program_id(0), tl.max(shares, 0), tl.num_programs(0)):
            at = k // tl.maximum(shared_parts, 1) * MEMBERS
            part = k % tl.maximum(shared_parts, 1)
            low = part * SHARED_PART
            put(shared_items, first + k, k < shares, row + at, tl.minimum(members - at, MEMBERS), s + at, low,
                tl.minimum(low + SHARED_PART, common), part, s, s, s * 0)  # fmt: skip
    if HAS_CHUNKS:
        tiles = tl.where(there & (rows > R), (rows + CHUNK_ROWS - 1) // CHUNK_ROWS, 0)
        first = tl.cumsum(tiles, 0) - tiles
        if tl.program_id(0) == 0:
            tl.store(counts + CHUNKS, tl.sum(tiles, 0))
        for k in range(tl.program_id(0), tl.max(tiles, 0), tl.num_programs(0)):
            tl.store(chunk_items + (first + k) * 2, s, mask=k < tiles)
            tl.store(chunk_items + (first + k) * 2 + 1, tl.zeros_like(s) + k * CHUNK_ROWS, mask=k < tiles)


WHOLE = 1 << 30  # a part size no context reaches
SIZES = (WHOLE, 1024, 256, 64)  # on a tie the largest
# An H100's attention kernel, fitted to 60 timings (batch 1..256, context 576..32768): microseconds.
SLOTS = 264  # programs that run at once
TOKEN_US, READ_US = 0.013, 0.00017  # a token of an item alone; a token when the memory is the limit
ITEM_US, MERGE_US = 2.0, 2.5


def part_tokens(own: np.typing.NDArray[np.integer], kv_heads: int, parts_max: int = 1 << 12) -> int:
    """The part size of the least predicted time for sequences with `own` old tokens each, of those that make no more
    than `parts_max` parts; WHOLE asks for no merge."""
    sizes = [size for size in SIZES if size == WHOLE or int((-(-own // size)).sum()) <= parts_max]
    return min(sizes, key=lambda size: _predicted_us(own, kv_heads, size))


def _predicted_us(own: np.typing.NDArray[np.integer], kv_heads: int, size: int) -> float:
    items = int(np.maximum(-(-own // size), 1).sum()) * kv_heads
    rounds = -(-items // SLOTS)
    longest = min(size, int(own.max(initial=0)))
    is_split = bool((own > size).any())
    read_us = float(own.sum()) * kv_heads * READ_US
    return max(rounds * longest * TOKEN_US, read_us) + rounds * ITEM_US + is_split * MERGE_US


CHUNK_PARTS = (8, 4, 2)
CHUNK_PART_TOKENS = 512  # a part's 8 tiles of KV take about three times as long as adding it


def chunk_parts(programs: int, context: int) -> int:
    """Into how many parts the past of each chunk tile is cut: as many as run at once, none of them short."""
    most = min(SLOTS // max(1, programs), context // CHUNK_PART_TOKENS)
    return next((parts for parts in CHUNK_PARTS if parts <= most), 1)


@dataclass(frozen=True, slots=True)
class WorkLists:
    """Device buffers of one step's lists, written by `make` and read by the attention kernels of every layer."""

    items: Tensor  # [items, 16] int32
    shared_items: Tensor  # [items, 16] int32
    chunk_items: Tensor  # [tiles, 2] int32: sequence, first row of the tile in it
    counts: Tensor  # [3] int32
    slot_starts: Tensor  # [sequences + 1] int32: where a sequence's parts lie
    part_o: Tensor  # [slots, rows a sequence, heads, head_dim] float32, each divided by its own sum
    part_lse: Tensor  # [slots, rows a sequence, heads] float32, base 2
    chunk_o: Tensor  # [programs at once, rows of a chunk tile, head_dim] float32: parts of chunk tiles
    chunk_lse: Tensor  # [programs at once, rows of a chunk tile] float32, base 2

    @classmethod
    def empty(
        cls, sequences: int, rows: int, parts: int, heads: int, head_dim: int, few_rows: int,
        chunk_rows: int, tile_rows: int, device: torch.device,
    ) -> WorkLists:  # fmt: skip
        """Room for `parts` parts in all and chunks of `rows` rows in all; a chunk tile is `tile_rows` rows, heads
        included, of `chunk_rows` positions."""

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        slots = sequences + parts
        return cls(
            integers(slots, ITEM.value), integers(slots, ITEM.value), integers(sequences + rows // chunk_rows, 2),
            integers(3), integers(sequences + 1), torch.empty(slots, few_rows, heads, head_dim, device=device),
            torch.empty(slots, few_rows, heads, device=device),
            torch.zeros(SLOTS, tile_rows, head_dim, device=device), torch.zeros(SLOTS, tile_rows, device=device),
        )  # fmt: skip
