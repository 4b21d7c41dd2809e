"""What the copying threads do: blocks out into slots of the pool, blocks back in from slots and files.

Owns the order of the copies: what comes in goes before what goes out. Never touches the trie, and never believes a slot
that was not the same before and after its copy."""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.kv.disk import Disk
from engine.kv.pool import Content, PoolMemory
from engine.step import Bytes, Copied, Fence, KVMemory

LOAD_BATCH = 16  # blocks copied as one: 128 MiB of 8B KV, 2.4 ms of a link of 54.5 GB/s
LOADS_AHEAD = 1  # batches under way behind the one that is waited for: the link is never idle
STORE_PATIENCE_S = 0.25  # how long a store gives way to restores: both at once have 84 of 2 x 54 GB/s (H100's host)


class Tier(enum.IntEnum):
    """Where a block lies below the device, from near to far."""

    HOST = 0
    DISK = 1


class Below(NamedTuple):
    """A block that a lower tier says it has: to be believed once it was read."""

    content: Content
    salt: bytes
    tier: Tier
    slot: int  # of the pool


@dataclass(slots=True)
class Arrived:
    """What a restore brought: blocks from the front, and by tier how many in how long."""

    counts: list[int] = field(default_factory=lambda: [0] * len(Tier))
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(Tier))

    @property
    def blocks(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Blocks of one tier whose copies are under way."""

    below: Sequence[Below]  # as far as the tier had them
    asked: int
    generations: list[int]
    copied: Copied
    read_s: float = 0.0  # before the copies began


class Carrier:
    """Called in copying threads: one that stores, one that loads."""

    def __init__(self, memory: KVMemory, pool: PoolMemory, disk: Disk | None) -> None:
        self._memory = memory
        self._pool = pool
        self._disk = disk
        self._loads = 0
        self._ended = threading.Condition()

    # Down ------------------------------------------------------------------------------------------------------------

    def store(self, blocks: Sequence[int], slots: Sequence[int], evicted: Sequence[Content | None]) -> None:
        """Copy blocks out. What a slot held before goes to disk, if there is one."""
        payloads = [self._pool.payloads[slot] for slot in slots]
        for payload, old in zip(payloads, evicted, strict=True):
            if old is not None and self._disk is not None:
                self._disk.write(old, payload)
        with self._ended:
            self._ended.wait_for(lambda: not self._loads, STORE_PATIENCE_S)
        self._memory.save(blocks, payloads)()

    # Up --------------------------------------------------------------------------------------------------------------

    def load(
        self, blocks: Sequence[int], below: Sequence[Below], after: Fence, is_given_up: Callable[[], bool]
    ) -> Arrived:
        """Copy blocks in, up to the first that a tier does not have after all."""
        arrived, under_way = Arrived(), deque[_Batch]()
        with self._before_stores():
            try:
                for span in _batches(below):
                    if is_given_up():
                        break
                    under_way.append(self._begin(blocks[span], below[span], after))
                    if len(under_way) > LOADS_AHEAD and not self._end(under_way.popleft(), arrived):
                        return arrived
                    if under_way[-1].asked > len(under_way[-1].below):
                        break
                while under_way and self._end(under_way.popleft(), arrived):
                    pass
            finally:
                for batch in under_way:  # of no use any more, but nobody may have these blocks before
                    batch.copied()
        return arrived

    @contextmanager
    def _before_stores(self) -> Iterator[None]:
        with self._ended:
            self._loads += 1
        try:
            yield
        finally:
            with self._ended:
                self._loads -= 1
                self._ended.notify_all()

    def _begin(self, blocks: Sequence[int], below: Sequence[Below], after: Fence) -> _Batch:
        return (self._begin_disk if below[0].tier == Tier.DISK else self._begin_host)(blocks, below, after)

    def _begin_host(self, blocks: Sequence[int], below: Sequence[Below], after: Fence) -> _Batch:
        generations: list[int] = []
        for item in below:
            generation = self._pool.standing(item.slot, item.content.key, item.content.tokens)
            if not generation:
                break
            generations.append(generation)
        found = below[: len(generations)]
        payloads = [self._pool.payloads[item.slot] for item in found]
        return _Batch(found, len(below), generations, self._memory.load(blocks[: len(found)], payloads, after))

    def _begin_disk(self, blocks: Sequence[int], below: Sequence[Below], after: Fence) -> _Batch:
        started, begun = time.perf_counter(), list[Copied]()

        def into(payload: Bytes) -> None:
            begun.append(self._memory.load(blocks, [payload], after))

        has_it = self._disk is not None and self._disk.read(below[0].content, into)
        read_s = time.perf_counter() - started
        found = below if has_it else below[:0]
        return _Batch(found, len(below), [], begun[0] if begun else float, read_s)

    def _end(self, batch: _Batch, arrived: Arrived) -> bool:
        """Wait for it; False: nothing behind it is of use."""
        seconds, whole = batch.copied(), len(batch.below)
        for at, generation in enumerate(batch.generations):
            item = batch.below[at]
            if self._pool.standing(item.slot, item.content.key, item.content.tokens) != generation:
                whole = at
                break
        if whole:
            arrived.counts[batch.below[0].tier] += whole
            arrived.seconds[batch.below[0].tier] += seconds + batch.read_s
        return whole == batch.asked


def _batches(below: Sequence[Below]) -> Iterator[slice]:
    """Runs of the pool's blocks, and each of the disk's."""
    start = 0
    while start < len(below):
        end = start + 1
        if below[start].tier == Tier.HOST:
            while end < len(below) and end - start < LOAD_BATCH and below[end].tier == Tier.HOST:
                end += 1
        yield slice(start, end)
        start = end
