"""The host pool: KV blocks in shared memory that outlive the worker that wrote them.

Owns the layout of that memory, who may write where, and when a slot may be believed. Never copies KV to or from a
device (engine/kv/tiers.py does), and never trusts a hint: the worst that a wrong or torn slot can cause is a miss."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.kv.keys import KEY_BYTES, Ids
from engine.step import Bytes

EXTENT_SLOTS = 64  # leased as one: a lock a slot would be 416k/64 = 6,500 locks for 8B KV in 64 GB
PAGE_BYTES = 4096
WAYS = 4  # cells a directory set has; there are two cells a slot, so an overfull set is rare, and costs one miss
_MAGIC = 0x4845_4144_5741_5933
_HEADER = np.dtype([("magic", "<u8"), ("slot_bytes", "<u8"), ("slots", "<u8"), ("block_tokens", "<u8")])
# In the header page: epochs of workers whose KV is void, written by the keeper in turn; 0 is none.
DISTRUSTED_OFFSET = 64
DISTRUSTED_MAX = 32


class PoolError(Exception):
    """The memory given is no pool of this shape; the message says which figure differs."""


class Content(NamedTuple):
    """What a slot holds, beside its payload."""

    key: bytes
    parent: bytes
    tokens: Ids


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What both ends must agree on: block size in tokens and bytes, and how many fit."""

    block_tokens: int
    slot_bytes: int  # KV of one block over all layers
    slots: int

    @property
    def slot_header(self) -> np.dtype[np.void]:
        """Generation (odd: being written), the writer's epoch, key, parent key and token ids of the block in a slot."""
        return np.dtype(
            [
                ("generation", "<u8"),
                ("epoch", "<u8"),
                ("key", "V16"),
                ("parent", "V16"),
                ("tokens", "<i4", (self.block_tokens,)),
            ]
        )

    @property
    def directory_sets(self) -> int:
        """Sets of WAYS cells that say in which slot a key may be."""
        return max(1, self.slots * 2 // WAYS)

    @property
    def headers_offset(self) -> int:
        return _pages(PAGE_BYTES + self.directory_sets * WAYS * 4)

    @property
    def payload_offset(self) -> int:
        return _pages(self.headers_offset + self.slots * self.slot_header.itemsize)

    @property
    def slot_stride(self) -> int:
        return _pages(self.slot_bytes)

    @property
    def total_bytes(self) -> int:
        return self.payload_offset + self.slots * self.slot_stride

    @staticmethod
    def fitting(pool_bytes: int, block_tokens: int, slot_bytes: int) -> PoolShape:
        """The largest pool of whole extents within `pool_bytes`; zero slots when not even one extent fits."""
        one = PoolShape(block_tokens, slot_bytes, 1)
        per_slot = one.slot_stride + one.slot_header.itemsize + 2 * 4
        extents = max(0, pool_bytes - PAGE_BYTES) // (per_slot * EXTENT_SLOTS)
        shapes = [PoolShape(block_tokens, slot_bytes, count * EXTENT_SLOTS) for count in (extents, extents - 1)]
        fits = [shape for shape in shapes if shape.slots >= 0 and shape.total_bytes <= pool_bytes]
        return fits[0] if fits else PoolShape(block_tokens, slot_bytes, 0)


def _pages(count: int) -> int:
    return -(-count // PAGE_BYTES) * PAGE_BYTES


def attach(descriptor: int, block_tokens: int, slot_bytes: int) -> PoolMemory:
    """The pool in memory that the keeper made (router/host/keeper.py), as large as that is.

    Who comes first gives it its shape; whoever comes with another one is refused by a PoolError."""
    shape = PoolShape.fitting(os.fstat(descriptor).st_size, block_tokens, slot_bytes)
    if not shape.slots:
        raise PoolError(f"the pool is smaller than {EXTENT_SLOTS} slots of {slot_bytes} bytes")
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, 0)
    try:
        if os.pread(descriptor, _HEADER.itemsize, 0) == bytes(_HEADER.itemsize):
            header = np.zeros(1, _HEADER)
            header[0] = (_MAGIC, shape.slot_bytes, shape.slots, shape.block_tokens)
            os.pwrite(descriptor, header.tobytes(), 0)
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, 0)
    return PoolMemory(descriptor, shape)


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
        self.headers = np.frombuffer(self._map, shape.slot_header, shape.slots, shape.headers_offset)
        cells = np.frombuffer(self._map, np.uint32, shape.directory_sets * WAYS, PAGE_BYTES)
        self._directory = cells.reshape(shape.directory_sets, WAYS)  # slot + 1, 0: none
        self._distrusted = np.frombuffer(self._map, np.uint64, DISTRUSTED_MAX, DISTRUSTED_OFFSET)
        self._flat = np.frombuffer(self._map, np.uint8, shape.slots * shape.slot_stride, shape.payload_offset)
        self.payloads = self._flat.reshape(shape.slots, shape.slot_stride)[:, : shape.slot_bytes]

    def holds(self, slot: int, key: bytes, tokens: Ids) -> bool:
        """Whether a slot holds exactly this block, complete, from a worker that is believed."""
        if not 0 <= slot < self.shape.slots or not self.is_named(slot, key):
            return False
        return bool(np.array_equal(self.headers["tokens"][slot], tokens)) and not self.is_void(slot)

    def is_void(self, slot: int) -> bool:
        """Whether who wrote a slot is distrusted."""
        return self.distrusts(int(self.headers["epoch"][slot]))

    def distrusts(self, epoch: int) -> bool:
        """Whether what this worker wrote is void: it sent what no correct worker sends."""
        return epoch != 0 and epoch in self._distrusted.tolist()

    def is_named(self, slot: int, key: bytes) -> bool:
        """Whether a slot is complete and says that it holds this key; its tokens are not looked at."""
        header = self.headers[slot]
        generation = int(header["generation"])
        return generation > 0 and generation % 2 == 0 and header["key"].tobytes() == key

    def content(self, slot: int) -> Content:
        """A slot's key, parent and tokens, copied."""
        header = self.headers[slot]
        return Content(header["key"].tobytes(), header["parent"].tobytes(), header["tokens"].copy())

    def lookup(self, key: bytes) -> int | None:
        """A slot, whoever's it is, that says it holds this key."""
        cells: list[int] = self._directory[self._set(key)].tolist()
        for cell in cells:
            if 0 < cell <= self.shape.slots and self.is_named(cell - 1, key):
                return cell - 1
        return None

    def announce(self, slot: int, key: bytes) -> None:
        """Let `lookup` find a slot. Writers race here without a lock: what is lost is found no more, never wrong."""
        chosen = self._set(key)
        cells = self._directory[chosen].tolist()
        stale = [way for way, cell in enumerate(cells) if not cell or cell == slot + 1 or not self._lives(cell, chosen)]
        self._directory[chosen, stale[0] if stale else slot % WAYS] = slot + 1

    def _lives(self, cell: int, chosen: int) -> bool:
        """Whether what a directory cell points to still belongs into its set."""
        return cell <= self.shape.slots and self._set(self.headers["key"][cell - 1].tobytes()) == chosen

    def _set(self, key: bytes) -> int:
        return int.from_bytes(key[:8], "little") % self.shape.directory_sets

    def standing(self, slot: int, key: bytes, tokens: Ids) -> int:
        """The generation under which a slot holds this block; 0: it does not. A copy may be believed if it was the same
        before and after."""
        generation = int(self.headers["generation"][slot]) if 0 <= slot < self.shape.slots else 0
        return generation if generation and self.holds(slot, key, tokens) else 0

    def span(self, slots: range) -> Bytes:
        """The payloads of adjacent slots as one piece of memory, whole pages."""
        return self._flat[slots.start * self.shape.slot_stride : slots.stop * self.shape.slot_stride]

    def back(self, slots: range) -> None:
        """Have real memory behind adjacent slots, what they hold untouched. Raises OSError when there is too little,
        where a first write would end the process. For any thread: others go on meanwhile."""
        stride = self.shape.slot_stride
        os.posix_fallocate(self.descriptor, self.shape.payload_offset + slots.start * stride, len(slots) * stride)

    def close(self) -> None:
        """Unmap. Arrays taken from it must be gone."""
        del self.headers, self.payloads, self._flat, self._directory, self._distrusted
        self._map.close()


class PoolWriter:
    """One worker's share of the pool: the extents it leased, their blocks in LRU order.

    A lease is a record lock of the kernel on one byte an extent, so it ends with its process whatever happens; the
    next worker that takes it finds the blocks still there. Nobody but the holder writes or evicts."""

    def __init__(
        self,
        memory: PoolMemory,
        extents_max: int,
        lock: Callable[[PoolMemory, int], bool] | None = None,
        epoch: int = 0,  # of the worker that writes; 0 can never be distrusted
    ) -> None:
        self.memory = memory
        self._epoch = epoch
        self._lock = lock or _lock
        self.extents: list[int] = []
        self.slot_of: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._free: list[int] = []
        self._writing: dict[int, bytes] = {}
        self._coming: set[bytes] = set()  # keys being written
        self._pinned: dict[int, int] = {}  # slot -> copies under way to a device
        self._lease(extents_max)

    def _lease(self, extents_max: int) -> None:
        for extent in range(self.memory.shape.slots // EXTENT_SLOTS):
            if len(self.extents) < extents_max and self._lock(self.memory, extent):
                self.extents.append(extent)
                self._adopt(extent)

    def _adopt(self, extent: int) -> None:
        """Blocks that a dead writer left are ours now if it is believed; what it was writing is nothing."""
        headers, slots = self.memory.headers, range(extent * EXTENT_SLOTS, (extent + 1) * EXTENT_SLOTS)
        if not headers["generation"][slots.start : slots.stop].any():  # never used: a large pool starts in no time
            self._free.extend(slots)
            return
        for slot in slots:
            generation = int(headers[slot]["generation"])
            key = headers[slot]["key"].tobytes()
            is_good = key != bytes(KEY_BYTES) and not self.memory.is_void(slot)
            if generation % 2 == 0 and generation > 0 and is_good and key not in self.slot_of:
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

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were used, the last one last. A chain is given from its tail, so that its head outlives it."""
        for key in keys:
            if key in self.slot_of:
                self.slot_of.move_to_end(key)

    def age(self, keys: Sequence[bytes]) -> None:
        """These go next, the first one first."""
        for key in reversed(keys):
            if key in self.slot_of:
                self.slot_of.move_to_end(key, last=False)

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

    def begin(self, content: Content) -> tuple[int, Content | None] | None:
        """(slot to write the block's payload into, what was evicted for it); None when it is there already or no slot
        can be had. Until the payload is overwritten the slot still holds that of the evicted block.

        Readers see the slot as unfinished until `finish`."""
        if content.key in self.slot_of or content.key in self._coming:
            return None
        taken = self._take()
        if taken is None:
            return None
        slot, evicted = taken
        headers = self.memory.headers
        headers["generation"][slot] += 1
        headers["epoch"][slot] = self._epoch
        headers["key"][slot] = np.void(content.key)
        headers["parent"][slot] = np.void(content.parent)
        headers["tokens"][slot] = content.tokens
        self._writing[slot] = content.key
        self._coming.add(content.key)
        return slot, evicted

    def _take(self) -> tuple[int, Content | None] | None:
        if self._free:
            return self._free.pop(), None
        for key, slot in self.slot_of.items():
            if slot not in self._pinned:
                del self.slot_of[key]
                return slot, self.memory.content(slot)
        return None

    def finish(self, slot: int) -> None:
        """The payload is complete: from here on others may read it."""
        key = self._writing.pop(slot)
        self._coming.discard(key)
        self.memory.headers["generation"][slot] += 1
        self.slot_of[key] = slot
        self.memory.announce(slot, key)

    def abandon(self, slot: int) -> None:
        """The copy failed: the slot is free and holds nothing."""
        self._coming.discard(self._writing.pop(slot))
        self._invalidate(slot)
        self.memory.headers["generation"][slot] += 1
        self._free.append(slot)

    def drop(self, key: bytes) -> bool:
        """Forget a block: it is not to be believed any more, or nobody will ask for it. False: it is not ours."""
        slot = self.slot_of.pop(key, None)
        if slot is None:
            return False
        self.memory.headers["generation"][slot] += 2  # who is just reading it sees that it changed
        self._invalidate(slot)
        self._free.append(slot)
        return True

    def check(self) -> None:
        """Conservation: every leased slot is free, being written, or holds one block. Raises AssertionError."""
        held = [*self._free, *self._writing, *self.slot_of.values()]
        assert len(held) == len(set(held)) == self.slots, "a pool slot is lost or held twice"


def _lock(memory: PoolMemory, extent: int) -> bool:
    try:
        fcntl.lockf(memory.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, PAGE_BYTES + extent)
    except (BlockingIOError, PermissionError):
        return False
    return True
