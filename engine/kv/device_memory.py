"""A GPU's KV blocks as bytes for the tiers below: whole blocks, over a link beside the steps.

Owns where a block's bytes lie: in one contiguous piece over all layers (8 MiB of an 8B model), as in a slot of the
pool, so nothing is gathered. Never decides which block moves; only the fence is set by the step's thread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from engine.kv.link import CudaLink, HostLink, Link, Piece, Way
from engine.step import Bytes, Copied, Fence


class DeviceMemory:
    """engine.step.KVMemory and Pinner over [blocks, ...] of device memory."""

    def __init__(self, pool: Tensor, steps: torch.cuda.Stream | None, link: Link | None = None):
        """`steps` is where steps compute; None: not on a GPU, and nothing is in flight."""
        self._bytes = pool.view(torch.uint8).view(len(pool), -1)
        self._link = link or (HostLink() if steps is None else CudaLink(pool.device, steps))
        self.first_bytes_per_s = self._link.pageable_bytes_per_s
        self.pinned_bytes_per_s = self._link.pinned_bytes_per_s

    @property
    def block_bytes(self) -> int:
        """KV of one block over all layers."""
        return self._bytes.shape[1]

    def fence(self) -> Fence:
        """Behind all steps launched so far. A step in flight may still write where an ended sequence's next token would
        have been: in a block that is free by now. Another thread's fence could fall into a graph's capture."""
        return self._link.fence()

    def save(self, blocks: Sequence[int], into: Sequence[Bytes]) -> Copied:
        """Begin to copy readable blocks out: what wrote them was read back, so there is nothing to be behind of."""
        pieces = [Piece(_address(payload), at) for at, payload in self._pairs(blocks, into)]
        return _held(self._link.copy(Way.DOWN, pieces, self.block_bytes, None), into)

    def load(self, blocks: Sequence[int], payloads: Sequence[Bytes], after: Fence) -> Copied:
        """Begin to copy blocks in, behind the fence."""
        pieces = [Piece(at, _address(payload)) for at, payload in self._pairs(blocks, payloads)]
        return _held(self._link.copy(Way.UP, pieces, self.block_bytes, after), payloads)

    def pin(self, memory: Bytes) -> None:
        """Lock memory for the device."""
        self._link.pin(_address(memory), memory.nbytes)

    def unpin(self, memory: Bytes) -> None:
        """Undo `pin`."""
        self._link.unpin(_address(memory))

    def _pairs(self, blocks: Sequence[int], payloads: Sequence[Bytes]) -> list[tuple[int, Bytes]]:
        """Where each block lies, and its payload; whatever would be copied beside them is refused."""
        start, size, count = self._bytes.data_ptr(), self.block_bytes, len(self._bytes)
        for block, payload in zip(blocks, payloads, strict=True):
            if not 0 <= block < count or payload.nbytes != size or not payload.flags.c_contiguous:
                raise ValueError(f"block {block} of {count}, {size} bytes each, does not fit {payload.nbytes} bytes")
        return [(start + block * size, payload) for block, payload in zip(blocks, payloads, strict=True)]


def _held(copied: Copied, payloads: Sequence[Bytes]) -> Copied:
    """Waiting keeps the host's memory alive."""
    return partial(_wait, copied, payloads)


def _wait(copied: Copied, _: Sequence[Bytes]) -> float:
    return copied()


def _address(memory: Bytes) -> int:
    return memory.ctypes.data
