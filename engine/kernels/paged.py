"""How the attention kernels are launched: one model's shape, one step's tensors, the buffers between them.

Owns tile sizes and grids. Never allocates in a step, never waits for the device: every call can be captured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from engine.kernels import attend, plan, prefill, rows
from engine.kernels.kv_fp8 import QUAD
from engine.kernels.layout import LayerKv, Layout

CHUNK_ROWS = 128  # rows of a prefill tile, query heads included: 4 warps and 3 stages, best of 15 on an H100
FP8_CHUNK_WARPS = 8  # of a prefill tile: four would spill 884 bytes, some in the loop over tiles
JOIN_ROWS = 16  # rows of a tile that one program joins the parts of
SHARED_ROWS = 64  # rows of a shared-prefix tile
SHARED_PART_TOKENS = 256
MERGE_ELEMENTS = 4096  # float32 numbers of parts held in registers at a time
PLAN_SIZES = (16, 256, 512, 1024)  # sequences the plan kernel is compiled for; up to 256 it has a thread for each
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernels are compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    block_tokens: int
    norm_eps: float
    has_qk_norm: bool
    few_rows: int = 1  # most rows of a sequence that attend's kernel takes: 1, or 1 + drafts
    pack_max: int = CHUNK_ROWS  # query heads of one prefill tile, at most
    is_kv_fp8: bool = False  # else KV has the weights' type

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def padded_group(self) -> int:
        return int(triton.next_power_of_2(self.group))

    @property
    def padded_dim(self) -> int:
        return int(triton.next_power_of_2(self.head_dim))

    @property
    def padded_few_rows(self) -> int:
        return int(triton.next_power_of_2(self.few_rows))

    @property
    def pack(self) -> int:
        """Query heads of a group in one prefill tile: a power of two that divides the group."""
        return min(math.gcd(self.group, CHUNK_ROWS), self.pack_max)

    @property
    def layout(self) -> Layout:
        return Layout(self.layers, self.kv_heads, self.block_tokens, self.head_dim, self.is_kv_fp8)

    @property
    def scale(self) -> float:
        """For softmax in base 2."""
        return LOG2_E / math.sqrt(self.head_dim)


@dataclass(frozen=True, slots=True)
class Step:
    """One step's rows on the device. Sequences of few rows come first; members of a shared prefix lie side by side."""

    row_starts: Tensor  # [sequences + 1] int32
    contexts: Tensor  # [sequences] int32, the last row's own token counted
    table: Tensor  # [sequences, blocks] int32
    slots: Tensor  # [rows] int32: block * block_tokens + place in it, -1 writes nowhere
    turns: Tensor  # [rows, head_dim] float32
    shared: Tensor  # [sequences] int32: tokens, in whole blocks, of the prefix read once for the group; 0 alone
    leads: Tensor  # [sequences] int32: the group's first sequence
    part_size: Tensor  # [1] int32: tokens of KV in one part (plan.part_tokens)


@dataclass(frozen=True, slots=True)
class Launch:
    """How few-row attention is spread: measured, by device."""

    programs: int
    warps: int = 4
    stages: int = 3
    is_ahead: bool = False
    pdl: int = 0
    registers: int | None = None  # most a thread may use; fewer let more programs share a multiprocessor


def work_lists(shape: Shape, sequences: int, row_count: int, parts: int, device: torch.device) -> plan.WorkLists:
    """Buffers for steps of up to `sequences` sequences, `row_count` rows and `parts` parts of context."""
    return plan.WorkLists.empty(
        sequences, row_count, parts, shape.heads, shape.head_dim, shape.padded_few_rows,
        CHUNK_ROWS // shape.pack, CHUNK_ROWS, device,
    )  # fmt: skip


def run_plan(
    shape: Shape, step: Step, lists: plan.WorkLists, has_shared: bool = False, has_chunks: bool = False
) -> None:
    """Once a step, before the first attention."""
    sequences = len(step.contexts)
    plan.plan_step[(8,)](
        step.row_starts, step.contexts, step.shared, step.leads, lists.items, lists.shared_items, lists.chunk_items,
        lists.counts, lists.slot_starts, step.part_size, sequences,
        S=min(size for size in PLAN_SIZES if size >= sequences), R=shape.few_rows, BLOCK=shape.block_tokens,
        MEMBERS=SHARED_ROWS // shape.padded_group, SHARED_PART=SHARED_PART_TOKENS,
        CHUNK_ROWS=CHUNK_ROWS // shape.pack, HAS_SHARED=has_shared, HAS_CHUNKS=has_chunks, num_warps=8,
    )  # fmt: skip


def run_attend(
    shape: Shape, step: Step, lists: plan.WorkLists, launch: Launch, qkv: Tensor, kv: LayerKv, out: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, is_shared: bool = False,
) -> None:  # fmt: skip
    """Few-row sequences of one layer.

    With `is_shared` the items of shared prefixes. If any sequence has parts, run_merge ends the layer's attention."""
    few, scales = shape.padded_few_rows * shape.padded_group, _scales(kv)
    tile = SHARED_ROWS if is_shared else max(16, few)
    attend.attend[(launch.programs,)](
        qkv, step.turns, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, kv.numbers, scales,
        step.table, lists.shared_items if is_shared else lists.items, lists.counts[1:] if is_shared else lists.counts,
        step.slots, lists.slot_starts, lists.part_o, lists.part_lse, out,
        step.table.stride(0), kv.numbers.stride(0), scales.stride(0), shape.scale,
        H=shape.heads, HK=shape.kv_heads, G=shape.group, GP=shape.padded_group, HEAD_DIM=shape.head_dim,
        D=shape.padded_dim, BLOCK=shape.block_tokens, ROWS=tile, R=shape.padded_few_rows,
        EPS=shape.norm_eps, NORMED=shape.has_qk_norm, SHARED=is_shared, AHEAD=launch.is_ahead,
        FP8=shape.is_kv_fp8, PDL=launch.pdl, num_warps=launch.warps, num_stages=launch.stages,
        maxnreg=None if is_shared else launch.registers,  # the wide tile of a prefix would spill: 15.4 ms against 14.5
        launch_pdl=launch.pdl > 0,
    )  # fmt: skip


def run_merge(shape: Shape, step: Step, lists: plan.WorkLists, launch: Launch, out: Tensor) -> None:
    """Put the parts of every sequence that has some into its place in `out`."""
    few = shape.padded_few_rows * shape.padded_group
    attend.merge[(len(step.contexts), shape.kv_heads)](
        lists.part_o, lists.part_lse, lists.slot_starts, step.row_starts, out, H=shape.heads, G=shape.group,
        GP=shape.padded_group, HEAD_DIM=shape.head_dim, D=shape.padded_dim, R=shape.padded_few_rows,
        CHUNK=max(1, MERGE_ELEMENTS // (few * shape.padded_dim)), PDL=launch.pdl, num_warps=4,
        launch_pdl=launch.pdl > 0,
    )  # fmt: skip


def run_rope_write(
    shape: Shape, step: Step, first_row: int, qkv: Tensor, kv: LayerKv, q_norm: Tensor | None, k_norm: Tensor | None
) -> None:
    """Rows of chunks, from `first_row` on: queries turned in place, keys and values into the pages."""
    scales = _scales(kv)
    heads = int(triton.next_power_of_2(max(shape.heads, shape.kv_heads)))
    rows.rope_write[(len(qkv) - first_row,)](
        qkv[first_row:], step.turns[first_row:], qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm,
        kv.numbers, scales, step.slots[first_row:], kv.numbers.stride(0), scales.stride(0),
        H=shape.heads, HK=shape.kv_heads, HEAD_DIM=shape.head_dim,
        D=shape.padded_dim, BLOCK=shape.block_tokens, HEADS=heads, EPS=shape.norm_eps, NORMED=shape.has_qk_norm,
        FP8=shape.is_kv_fp8, num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PoolMap:
    """KV memory as prefill reads it: keys and values by tensor map, scales by pointer."""

    numbers: Any  # a tensor map of rows of head_dim numbers
    quads: Any  # of rows of four times as many: the values of fp8
    block_rows: int
    scales: Tensor  # the first layer's


def pool_map(shape: Shape, pool: Tensor) -> PoolMap:
    """Made once a step, of the pool that the shape's layout has made."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    layout, tile = shape.layout, [shape.block_tokens, shape.padded_dim]
    numbers = quads = TensorDescriptor.from_tensor(layout.rows(pool), tile)
    if shape.is_kv_fp8:
        tile = [shape.block_tokens // QUAD.value, QUAD.value * shape.padded_dim]
        quads = TensorDescriptor.from_tensor(layout.rows(pool).view(-1, QUAD.value * shape.head_dim), tile)
    return PoolMap(numbers, quads, layout.block_rows(pool), _scales(layout.layer(pool, 0)))


def _scales(kv: LayerKv) -> Tensor:
    """What a kernel without FP8 is given for scales, which it does not read, are the numbers."""
    return kv.numbers if kv.scales is None else kv.scales


def run_prefill(
    shape: Shape, step: Step, lists: plan.WorkLists, tiles_max: int, qkv: Tensor, pool: PoolMap, layer: int,
    out: Tensor, parts: int = 1,
) -> None:  # fmt: skip
    """Chunks of one layer; `tiles_max` bounds the tiles the plan may have made. `parts` of each tile's past, at most
    plan.chunk_parts of `chunk_programs`, are programs of their own."""
    programs = chunk_programs(shape, tiles_max)
    assert parts == 1 or programs * parts <= len(lists.chunk_o), "more parts than run at once"
    prefill.prefill[(programs * parts,)](
        qkv, pool.numbers, pool.quads, pool.scales, step.table, step.row_starts, step.contexts, lists.chunk_items,
        lists.counts, out, lists.chunk_o, lists.chunk_lse, layer, parts, step.table.stride(0), pool.block_rows,
        pool.scales.stride(0), shape.scale, H=shape.heads, HK=shape.kv_heads, HEAD_DIM=shape.head_dim,
        D=shape.padded_dim, BLOCK=shape.block_tokens, ROWS=CHUNK_ROWS, PACK=shape.pack, FP8=shape.is_kv_fp8,
        HAS_PARTS=parts > 1, num_warps=FP8_CHUNK_WARPS if shape.is_kv_fp8 else 4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        prefill.join[(programs * (CHUNK_ROWS // JOIN_ROWS),)](
            step.row_starts, lists.chunk_items, lists.counts, out, lists.chunk_o, lists.chunk_lse, parts,
            H=shape.heads, HEAD_DIM=shape.head_dim, D=shape.padded_dim, ROWS=CHUNK_ROWS, PACK=shape.pack,
            SLICE=JOIN_ROWS, num_warps=4,
        )  # fmt: skip


def chunk_programs(shape: Shape, tiles: int) -> int:
    """Programs of so many chunk tiles, uncut."""
    return tiles * shape.heads // shape.pack
