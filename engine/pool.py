"""The host pool: KV blocks in shared memory that outlive the worker that wrote them.

Owns the layout of that memory, who may write where, and when a slot may be believed. Never copies KV to or from a
device (engine/tiers.py does), and never trusts a hint: the worst that a wrong or torn slot can cause is a miss."""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.keys import KEY_BYTES, Ids

EXTENT_SLOTS = 64  # leased as one: a lock a slot would be 416k/64 = 6,500 locks for 8B KV in 64 GB
PAGE_BYTES = 4096
_MAGIC = 0x4845_4144_5741_5931
_HEADER = np.dtype([("magic", "<u8"), ("slot_bytes", "<u8"), ("slots", "<u8"), ("block_tokens", "<u8")])

Bytes = npt.NDArray[np.uint8]


class PoolError(Exception):
    """The memory given is no pool of this shape; the message says which figure differs."""


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What both ends must agree on: block size in tokens and bytes, and how many fit."""

    block_tokens: int
    slot_bytes: int  # KV of one block over all layers
    slots: int

    @property
    def slot_header(self) -> np.dtype[np.void]:
        """Generation (odd: being written), key, parent key and token ids of the block in a slot."""
        return np.dtype(
            [
                ("generation", "<u8"),
                ("key", "V16"),
                ("parent", "V16"),
                ("tokens", "<i4", (self.block_tokens,)),
            ]
        )

    @property
    def payload_offset(self) -> int:
        headers = PAGE_BYTES + self.slots * self.slot_header.itemsize
        return -(-headers // PAGE_BYTES) * PAGE_BYTES

    @property
    def slot_stride(self) -> int:
        return -(-self.slot_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def total_bytes(self) -> int:
        return self.payload_offset + self.slots * self.slot_stride

    @staticmethod
    def fitting(pool_bytes: int, block_tokens: int, slot_bytes: int) -> PoolShape:
        """The largest pool of whole extents within `pool_bytes`; zero slots when not even one extent fits."""
        one = PoolShape(block_tokens, slot_bytes, 1)
        per_slot = one.slot_stride + one.slot_header.itemsize
        slots = max(0, pool_bytes - 2 * PAGE_BYTES) // per_slot // EXTENT_SLOTS * EXTENT_SLOTS
        return PoolShape(block_tokens, slot_bytes, slots)


def create(shape: PoolShape) -> int:
    """A file descriptor of new pool memory; it is freed when the last process that holds it ends.

    A memfd on Linux (nothing to unlink, so nothing can leak); elsewhere an unlinked temporary file."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("headway-pool", os.MFD_CLOEXEC)
    else:
        descriptor, path = tempfile.mkstemp(prefix="headway-pool-")
        os.unlink(path)
    os.ftruncate(descriptor, shape.total_bytes)
    header = np.zeros(1, _HEADER)
    header[0] = (_MAGIC, shape.slot_bytes, shape.slots, shape.block_tokens)
    os.pwrite(descriptor, header.tobytes(), 0)
    return descriptor


class PoolMemory:
    """The mapped pool: slot headers and payloads as arrays. Readers and writers share it."""

    def __init__(self, descriptor: int, shape: PoolShape) -> None:
        found = np.frombuffer(os.pread(descriptor, _HEADER.itemsize, 0), _HEADER)[0]
        wanted = (_MAGIC, shape.slot_bytes, shape.slots, shape.block_tokens)
        if tuple(int(value) for value in found) != wanted:
            raise PoolError(f"the pool was made as {tuple(found)}, this worker needs {wanted}")
        self.descriptor = descriptor
        self.shape = shape
        self._map = mmap.mmap(descriptor, shape.total_bytes)
        self.headers = np.frombuffer(self._map, shape.slot_header, shape.slots, PAGE_BYTES)
        flat = np.frombuffer(self._map, np.uint8, shape.slots * shape.slot_stride, shape.payload_offset)
        self.payloads = flat.reshape(shape.slots, shape.slot_stride)[:, : shape.slot_bytes]

    def holds(self, slot: int, key: bytes, tokens: Ids) -> bool:
        """Whether a slot holds exactly this block, complete."""
        if not 0 <= slot < self.shape.slots:
            return False
        header = self.headers[slot]
        generation = int(header["generation"])
        is_complete = generation > 0 and generation % 2 == 0
        return is_complete and header["key"].tobytes() == key and bool(np.array_equal(header["tokens"], tokens))

    def read(self, slot: int, key: bytes, tokens: Ids, copy: Callable[[Bytes], None]) -> bool:
        """Let `copy` take the payload; False, and nothing to be believed, unless the block stood there throughout."""
        if not self.holds(slot, key, tokens):
            return False
        generation = int(self.headers[slot]["generation"])
        copy(self.payloads[slot])
        return int(self.headers[slot]["generation"]) == generation and self.holds(slot, key, tokens)

    def close(self) -> None:
        """Unmap. Arrays taken from it must be gone."""
        del self.headers, self.payloads
        self._map.close()


class PoolWriter:
    """One worker's share of the pool: the extents it leased, their blocks in LRU order.

    A lease is a record lock of the kernel on one byte an extent, so it ends with its process whatever happens; the
    next worker that takes it finds the blocks still there. Nobody but the holder writes or evicts."""

    def __init__(self, memory: PoolMemory, extents_max: int) -> None:
        self.memory = memory
        self.extents: list[int] = []
        self.slot_of: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._free: list[int] = []
        self._writing: dict[int, bytes] = {}
        self._pinned: dict[int, int] = {}  # slot -> copies under way to a device
        self._lease(extents_max)

    def _lease(self, extents_max: int) -> None:
        for extent in range(self.memory.shape.slots // EXTENT_SLOTS):
            if len(self.extents) < extents_max and self._lock(extent):
                self.extents.append(extent)
                self._adopt(extent)

    def _lock(self, extent: int) -> bool:
        try:
            fcntl.lockf(self.memory.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, PAGE_BYTES + extent)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _adopt(self, extent: int) -> None:
        """Blocks that a dead writer left are ours now; what it was writing when it died is nothing."""
        headers = self.memory.headers
        for slot in range(extent * EXTENT_SLOTS, (extent + 1) * EXTENT_SLOTS):
            generation = int(headers[slot]["generation"])
            key = headers[slot]["key"].tobytes()
            if generation % 2 == 0 and generation > 0 and key not in self.slot_of:
                self.slot_of[key] = slot
            else:
                headers["generation"][slot] = generation + generation % 2
                self._invalidate(slot)
                self._free.append(slot)

    def _invalidate(self, slot: int) -> None:
        self.memory.headers["key"][slot] = np.void(bytes(KEY_BYTES))

    @property
    def slots(self) -> int:
        """Slots that this worker may write."""
        return len(self.extents) * EXTENT_SLOTS

    def blocks(self) -> Iterator[tuple[bytes, bytes, Ids, int]]:
        """(key, parent key, tokens, slot) of all complete blocks, oldest first."""
        headers = self.memory.headers
        for key, slot in self.slot_of.items():
            yield key, headers["parent"][slot].tobytes(), headers["tokens"][slot].copy(), slot

    def find(self, key: bytes) -> int | None:
        """The slot of a block, made the most recently used."""
        slot = self.slot_of.get(key)
        if slot is not None:
            self.slot_of.move_to_end(key)
        return slot

    def pin(self, slot: int) -> None:
        """Keep a slot while a copy from it runs."""
        self._pinned[slot] = self._pinned.get(slot, 0) + 1

    def unpin(self, slot: int) -> None:
        """End what `pin` began."""
        left = self._pinned[slot] - 1
        if left:
            self._pinned[slot] = left
        else:
            del self._pinned[slot]

    def begin(self, key: bytes, parent: bytes, tokens: Ids) -> tuple[int, bytes | None] | None:
        """(slot to write the block's payload into, key evicted for it); None when it is there already or none is free.

        Readers see the slot as unfinished until `finish`."""
        if key in self.slot_of or key in self._writing.values():
            return None
        taken = self._take()
        if taken is None:
            return None
        slot, evicted = taken
        headers = self.memory.headers
        headers["generation"][slot] += 1
        headers["key"][slot] = np.void(key)
        headers["parent"][slot] = np.void(parent)
        headers["tokens"][slot] = tokens
        self._writing[slot] = key
        return slot, evicted

    def _take(self) -> tuple[int, bytes | None] | None:
        if self._free:
            return self._free.pop(), None
        for key, slot in self.slot_of.items():
            if slot not in self._pinned:
                del self.slot_of[key]
                return slot, key
        return None

    def finish(self, slot: int) -> None:
        """The payload is complete: from here on others may read it."""
        key = self._writing.pop(slot)
        self.memory.headers["generation"][slot] += 1
        self.slot_of[key] = slot

    def abandon(self, slot: int) -> None:
        """The copy failed: the slot is free and holds nothing."""
        del self._writing[slot]
        self._invalidate(slot)
        self.memory.headers["generation"][slot] += 1
        self._free.append(slot)

    def check(self) -> None:
        """Conservation: every leased slot is free, being written, or holds one block. Raises AssertionError."""
        held = [*self._free, *self._writing, *self.slot_of.values()]
        assert len(held) == len(set(held)) == self.slots, "a pool slot is lost or held twice"
