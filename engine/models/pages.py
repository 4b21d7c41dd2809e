"""Paged KV memory: the pool of blocks, and how one step writes and reads it.

Owns the layout [blocks, layers, 2, kv_heads, tokens, head_dim]. Never decides who gets a block: numbers are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _attention

from engine.models.config import ModelConfig
from engine.step import HOST_BYTES_PER_S, Bytes, Copied, Fence, Int32, Int64, StepBatch, at_once

CHUNK_SPAN_ROWS = 128  # a chunk attends in pieces this long: each skips the keys behind it, and no mask gets larger
SPARE_BLOCKS = 2  # one that reads as zero for padding, one that takes the writes of rows that write nowhere


@dataclass(frozen=True, slots=True)
class Span:
    """Rows that attend together: one row each of several sequences, or several rows of one."""

    start: int
    end: int
    is_decode: bool
    blocks: Tensor  # [2 * sequences * kv_heads * blocks] int64: head-blocks of keys, then of values, in layer 0
    scratch: Tensor  # [2 * sequences * kv_heads * blocks, tokens * head_dim]: what one layer reads, warm for the next
    mask: Tensor  # decode [sequences * kv_heads, 1, 1, tokens], chunk [rows, tokens]; 0 or -inf


@dataclass(frozen=True, slots=True)
class Pages:
    """The pool as one step sees it: index tensors made once, for all layers."""

    memory: Tensor  # [blocks, layers, 2, kv_heads, tokens, head_dim]
    order: Int64  # [rows] the batch's row behind each computed row: decodes first, then chunks
    write_rows: Tensor  # [rows * 2 * kv_heads] int64: token-rows in layer 0
    spans: tuple[Span, ...]  # one after the other, all rows

    def write(self, layer: int, keys_values: Tensor) -> None:
        """Store [rows, 2 * kv_heads, head_dim], keys first."""
        _, _, _, kv_heads, tokens, head_dim = self.memory.shape
        token_rows = self.memory.view(-1, head_dim)[layer * 2 * kv_heads * tokens :]
        token_rows.index_copy_(0, self.write_rows, keys_values.flatten(0, 1))

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """[rows, heads, head_dim] -> the same, attended. The rows' own keys must be written before."""
        attended = [self._attend_span(layer, span, queries[span.start : span.end]) for span in self.spans]
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def _attend_span(self, layer: int, span: Span, queries: Tensor) -> Tensor:
        rows, heads, head_dim = queries.shape
        kv_heads, tokens = self.memory.shape[3:5]
        group, sequences = heads // kv_heads, rows if span.is_decode else 1
        head_blocks = self.memory.view(-1, tokens * head_dim)[layer * 2 * kv_heads :]
        torch.index_select(head_blocks, 0, span.blocks, out=span.scratch)
        keys, values = span.scratch.view(2, sequences * kv_heads, 1, -1, head_dim).unbind()
        if span.is_decode:  # the query heads of a group are rows against their one key head: nothing is repeated
            asked = queries.reshape(sequences * kv_heads, 1, group, head_dim)
            return _attention(asked, keys, values, attn_mask=span.mask).reshape(rows, heads, head_dim)
        asked = queries.view(rows, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        shape = (kv_heads, group, keys.shape[2], head_dim)
        answered = _attention(asked, keys.expand(shape), values.expand(shape), attn_mask=span.mask)
        return answered.permute(2, 0, 1, 3).reshape(rows, heads, head_dim)


class KVPool:
    """The KV memory of one device. Blocks `0 .. blocks-1` are the caller's; the two spare ones lie behind them."""

    def __init__(self, config: ModelConfig, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device):
        self.blocks, self.block_tokens = blocks, block_tokens
        self._kv_heads, self._layers = config.kv_heads, config.layers
        self._shape = (blocks + SPARE_BLOCKS, config.layers, 2, config.kv_heads, block_tokens, config.head_dim)
        self.memory = torch.zeros(self._shape, dtype=dtype, device=device)
        self.block_bytes = self.memory[0].nbytes  # KV of one block over all layers: contiguous
        self.first_bytes_per_s = HOST_BYTES_PER_S

    def close(self) -> None:
        """Give the memory back. No block may be touched until `open`."""
        self.memory = self.memory.new_empty(0)

    def open(self) -> None:
        """Have it again, with nothing in it."""
        self.memory = self.memory.new_zeros(self._shape)

    def fence(self) -> None:
        """As engine.step.KVMemory wants it: a step has ended when its call returns."""

    def save(self, blocks: Sequence[int], into: Sequence[Bytes]) -> Copied:
        """Copy blocks out."""
        return at_once(self._save, blocks, into)

    def load(self, blocks: Sequence[int], payloads: Sequence[Bytes], _after: Fence) -> Copied:
        """Copy blocks in."""
        return at_once(self._load, blocks, payloads)

    def _save(self, block: int, into: Bytes) -> None:
        with torch.inference_mode():
            torch.from_numpy(into).copy_(self.memory[block].view(-1).view(torch.uint8))

    def _load(self, block: int, payload: Bytes) -> None:
        with torch.inference_mode():
            self.memory[block].view(-1).view(torch.uint8).copy_(torch.from_numpy(payload))

    def plan(self, batch: StepBatch) -> Pages:
        """A step's view. Blocks begun in it are cleared here."""
        self._clear_begun(batch.write_slots)
        order: list[Int64] = []
        spans: list[Span] = []
        start = 0
        for rows, sequences in _decode_groups(batch, self.block_tokens):
            spans.append(self._decode_span(batch, start, sequences))
            order.append(rows)
            start += len(rows)
        for sequence in np.flatnonzero(np.diff(batch.row_starts) > 1).tolist():
            for rows in _pieces(batch.row_starts[sequence], batch.row_starts[sequence + 1]):
                spans.append(self._chunk_span(batch, start, sequence, rows))
                order.append(rows)
                start += len(rows)
        computed = np.concatenate(order)
        return Pages(self.memory, computed, self._write_rows(batch.write_slots[computed]), tuple(spans))

    def _clear_begun(self, slots: Int64) -> None:
        """A block's first write finds it zero: what a former owner left behind a short row would else be read,
        masked, and a NaN survives a mask (0 x NaN)."""
        begun = slots[(slots >= 0) & (slots % self.block_tokens == 0)] // self.block_tokens
        if len(begun):
            self.memory.index_fill_(0, self._tensor(begun), 0)

    def _decode_span(self, batch: StepBatch, start: int, sequences: Int64) -> Span:
        contexts = batch.contexts[sequences]
        tables = self._tables(batch, sequences, int(contexts.max()))
        visible = np.arange(tables.shape[1] * self.block_tokens) < contexts[:, None]
        mask = self._mask(visible).repeat_interleave(self._kv_heads, 0)[:, None, None]
        return Span(start, start + len(sequences), True, *self._gathered(tables), mask)

    def _chunk_span(self, batch: StepBatch, start: int, sequence: int, rows: Int64) -> Span:
        positions = batch.positions[rows]
        tables = self._tables(batch, np.array([sequence]), int(positions[-1]) + 1)
        visible = np.arange(tables.shape[1] * self.block_tokens) <= positions[:, None]
        return Span(start, start + len(rows), False, *self._gathered(tables), self._mask(visible))

    def _tables(self, batch: StepBatch, sequences: Int64, tokens: int) -> Int64:
        """The block tables of these sequences, as wide as the longest; what is not theirs reads the zero block."""
        width = -(-tokens // self.block_tokens)
        own = -(-batch.contexts[sequences] // self.block_tokens)
        tables = batch.block_tables[sequences, :width].astype(np.int64)
        return np.where(np.arange(width) < own[:, None], tables, self.blocks)

    def _gathered(self, tables: Int64) -> tuple[Tensor, Tensor]:
        """[sequences, blocks] -> which head-blocks to read, ordered [2, sequences, kv_heads, blocks], and into what."""
        base = tables[:, None, :] * (self._layers * 2 * self._kv_heads) + np.arange(self._kv_heads)[:, None]
        blocks = self._tensor(np.stack([base, base + self._kv_heads]).ravel())
        return blocks, self.memory.new_empty((len(blocks), self.block_tokens * self.memory.shape[-1]))

    def _write_rows(self, slots: Int64) -> Tensor:
        """[rows] -> flat token-rows, ordered [rows, 2 * kv_heads]; -1 goes to the last spare block."""
        slots = np.where(slots >= 0, slots, (self.blocks + 1) * self.block_tokens)
        block, offset = np.divmod(slots, self.block_tokens)
        heads = block[:, None] * (self._layers * 2 * self._kv_heads) + np.arange(2 * self._kv_heads)
        return self._tensor((heads * self.block_tokens + offset[:, None]).ravel())

    def _mask(self, visible: npt.NDArray[np.bool_]) -> Tensor:
        zero_or_inf = torch.from_numpy(np.where(visible, np.float32(0), np.float32(-np.inf)))
        return zero_or_inf.to(self.memory.device, self.memory.dtype)

    def _tensor(self, numbers: Int64) -> Tensor:
        return torch.from_numpy(numbers).to(self.memory.device)


def _decode_groups(batch: StepBatch, block_tokens: int) -> list[tuple[Int64, Int64]]:
    """(rows, sequences) of one-row sequences that read together. None is padded to more than twice its blocks."""
    single = np.flatnonzero(np.diff(batch.row_starts) == 1)
    if not len(single):
        return []
    blocks = -(-batch.contexts[single] // block_tokens)
    octave = np.frexp(blocks.astype(np.float64))[1]
    by_octave = [single[octave == value] for value in np.unique(octave)]
    return [(batch.row_starts[group].astype(np.int64), group) for group in by_octave]


def _pieces(first: Int32, end: Int32) -> list[Int64]:
    starts = range(int(first), int(end), CHUNK_SPAN_ROWS)
    return [np.arange(start, min(start + CHUNK_SPAN_ROWS, int(end))) for start in starts]
