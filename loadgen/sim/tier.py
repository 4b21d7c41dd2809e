"""A simulated worker's host pool: the real pool and the real tiers over it, with copies that end in virtual time.

Owns the link between host and device: one copy at a time, so many seconds a block. Payloads are one byte: what a block
holds is told by its key."""

from __future__ import annotations

import heapq
import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

from engine.kv.blocks import BlockTrie
from engine.kv.carrier import Arrived
from engine.kv.copies import Hands
from engine.kv.pool import EXTENT_SLOTS, PoolMemory, PoolShape, PoolWriter, attach
from engine.kv.tiers import Tiers
from engine.step import HOST_BYTES_PER_S, Bytes, Copied, Fence

SLOT_BYTES = 1


class _Memory:
    """Stands for the device's KV: every block is whole."""

    block_bytes = SLOT_BYTES
    first_bytes_per_s = HOST_BYTES_PER_S

    def fence(self) -> None:
        """No step is ever under way."""

    def save(self, _blocks: Sequence[int], _into: Sequence[Bytes]) -> Copied:
        """Nothing to copy."""
        return float

    def load(self, _blocks: Sequence[int], _payloads: Sequence[Bytes], _after: Fence) -> Copied:
        """Nothing to copy."""
        return float


class _Copy(Future[Arrived]):
    """Told when its time has come. Whoever has to wait for it, since memory is short, has it at once."""

    def __init__(self, told: Arrived) -> None:
        super().__init__()
        self.told = told
        self.set_running_or_notify_cancel()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """None: there is nothing that could fail."""
        if not self.done():
            self.set_result(self.told)
        return super().exception(timeout)


class Link(Executor):
    """Copies up, one behind the other. What a job found is known at once and told when its time has passed."""

    def __init__(self, block_s: float) -> None:
        self.now = 0.0
        self._block_s = block_s
        self._free_at = 0.0
        self._due: list[tuple[float, int, _Copy]] = []
        self._numbers = itertools.count()

    def submit(self, fn: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        """As any executor."""
        found: Arrived = fn(*arguments, **named)
        self._free_at = max(self.now, self._free_at) + found.blocks * self._block_s
        copy = _Copy(replace(found, seconds=[count * self._block_s for count in found.counts]))
        heapq.heappush(self._due, (self._free_at, next(self._numbers), copy))
        return copy

    @property
    def next_at(self) -> float:
        """When the next copy ends."""
        return self._due[0][0] if self._due else math.inf

    def advance(self, now: float) -> None:
        """It is `now`: what has ended is told."""
        self.now = now
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2].exception()


def tiers_of(trie: BlockTrie, host_blocks: int, link: Link) -> Tiers:
    """Tiers with a host pool of its own; none without blocks for it."""
    extents = -(-host_blocks // EXTENT_SLOTS)
    if not extents:
        return Tiers(trie)
    memory = _memory(trie.block_tokens, extents * EXTENT_SLOTS)
    writer = PoolWriter(memory, extents, lock=lambda *_: True)  # nobody else has it
    return Tiers(trie, _Memory(), writer, hands=Hands(restores=link))


def _memory(block_tokens: int, slots: int) -> PoolMemory:
    descriptor = os.memfd_create("simulated-pool")
    try:
        os.ftruncate(descriptor, PoolShape(block_tokens, SLOT_BYTES, slots).total_bytes)
        return attach(descriptor, block_tokens, SLOT_BYTES)
    finally:
        os.close(descriptor)
