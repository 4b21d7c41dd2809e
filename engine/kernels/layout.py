"""How KV lies in device memory: whole blocks, each one contiguous piece that the tiers copy as bytes.

Owns the bytes of a block. Never reads or writes them.

Plain: [layers, 2, kv_heads, tokens, head_dim] in the weights' type. fp8: the same in e4m3, except that the values of
a head are [tokens / 4, head_dim, 4]; behind them a word of two float16 scales for each token and head, [layers,
kv_heads, tokens], and then nothing up to a whole number of four rows, so that tensor maps cover the pool. An 8B model's
block of 64 tokens is 4 MiB and 64 KiB, against 8 MiB.

Why four tokens side by side: a matrix unit wants numbers of neighbouring tokens in one register, and shared memory
gives 32 bits at once or single bytes. With [tokens, head_dim] a decode's tile takes 717 instructions a warp on Hopper,
64 of them loads of a byte, and spills; with quads 549. Whole columns, [head_dim, tokens], take 503, but each token
written would then touch 128 sectors of memory a head in place of 16."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAP_BYTES = 16  # what a tensor map asks of strides, and the kernels' loads of a block's start
WORD_BYTES = 4
QUAD_TOKENS = 4  # of fp8: values lie four tokens side by side, [tokens / 4, head_dim, 4] of a head
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class LayerKv:
    """One layer's KV in all blocks."""

    numbers: Tensor  # [blocks, 2, kv_heads, tokens, head_dim]; fp8's values in quads
    scales: Tensor | None = None  # [blocks, kv_heads, tokens] int32: two float16, the key's in the low half; fp8 alone


@dataclass(frozen=True, slots=True)
class Layout:
    """A block's shape and type."""

    layers: int
    kv_heads: int
    block_tokens: int
    head_dim: int
    is_fp8: bool

    @property
    def numbers(self) -> int:
        """In a block: keys and values of all layers."""
        return self.layers * 2 * self.kv_heads * self.block_tokens * self.head_dim

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Of one block; `dtype` is the weights' type, which plain KV has too."""
        if not self.is_fp8:
            return self.numbers * dtype.itemsize
        used = self.numbers + self.layers * self.kv_heads * self.block_tokens * WORD_BYTES
        whole = math.lcm(QUAD_TOKENS * self.head_dim, MAP_BYTES)
        return -(-used // whole) * whole

    def pool(self, blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeroed memory: [blocks, layers, 2, kv_heads, tokens, head_dim], or of fp8 [blocks, bytes]."""
        if self.is_fp8:
            return torch.zeros(blocks, self.block_bytes(dtype), dtype=torch.uint8, device=device)
        shape = (blocks, self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, pool: Tensor, number: int) -> LayerKv:
        """A view of one layer."""
        if not self.is_fp8:
            return LayerKv(pool[:, number])
        blocks, block_bytes = pool.shape
        head, words = self.block_tokens * self.head_dim, self.kv_heads * self.block_tokens
        numbers, scales = pool.view(FP8), pool.view(torch.int32)
        return LayerKv(
            numbers.as_strided(
                (blocks, 2, self.kv_heads, self.block_tokens, self.head_dim),
                (block_bytes, self.kv_heads * head, head, self.head_dim, 1),
                numbers.storage_offset() + number * 2 * self.kv_heads * head,
            ),
            scales.as_strided(
                (blocks, self.kv_heads, self.block_tokens), (block_bytes // WORD_BYTES, self.block_tokens, 1),
                scales.storage_offset() + self.numbers // WORD_BYTES + number * words,
            ),
        )  # fmt: skip

    def rows(self, pool: Tensor) -> Tensor:
        """The pool as rows of head_dim numbers, whatever lies in them."""
        return (pool.view(FP8) if self.is_fp8 else pool).view(-1, self.head_dim)

    def block_rows(self, pool: Tensor) -> int:
        """Rows from one block to the next."""
        return pool[0].numel() // self.head_dim
