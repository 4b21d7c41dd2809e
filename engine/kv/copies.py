"""Copies between the device and the tiers below it: what is under way, which blocks it holds, what comes of it.

Owns the jobs and the references they hold. Never decides what is worth copying, and never waits for a job, except where
memory is so short that nothing else is left to take."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy as np

from engine.kv.blocks import Block, BlockTrie
from engine.kv.carrier import Arrived, Below, Carrier, Tier
from engine.kv.disk import Disk
from engine.kv.pool import Content, PoolWriter
from engine.step import KVMemory
from policies.retention import Band

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """What may be under way at once."""

    stores_max: int = 1024  # blocks on their way out; what comes beyond is not written through (counted)
    store_batch: int = 16  # blocks a copy job: what has not begun can be given up
    restores_max: int = 4096  # blocks on their way in: 262k tokens of 64; beyond, they are computed
    restore_lease_s: float = 5.0  # from arrival until whoever asked has come to use them


@dataclass(slots=True)
class CopyCounts:
    """Blocks since the start."""

    stored: int = 0
    skipped: int = 0  # not written through: too much was under way, or no slot could be had
    restored: list[int] = field(default_factory=lambda: [0] * len(Tier))
    missed: int = 0  # promised by a tier, but torn, overwritten, corrupt or given up
    failed: int = 0  # jobs that raised


@dataclass(slots=True)
class Restore:
    """Blocks on their way up."""

    parent: Block | None
    blocks: list[Block]
    below: list[Below]
    band: Band
    until: float  # who waits for it computes instead from here on
    pinned: list[int]  # slots of our own that must not be evicted meanwhile
    is_done: bool = False
    arrived: int = 0  # of the blocks, from the front
    is_given_up: bool = False
    future: Future[Arrived] | None = None

    def is_awaited(self, now: float) -> bool:
        """Whether it is still worth waiting for."""
        return not self.is_done and now < self.until


@dataclass(slots=True)
class _Store:
    blocks: list[Block]
    slots: list[int]
    evicted: list[Content | None]
    future: Future[None]


class Inline(Executor):
    """Runs a job where it is submitted: for tests, and where there is nothing to copy."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        """As any executor."""
        future: Future[object] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 -- border: as with any executor, the future carries it
            future.set_exception(error)
        return future


@dataclass(frozen=True, slots=True)
class Hands:
    """Who carries: stores and restores have threads of their own, so that bringing up never queues behind writing."""

    stores: Executor = field(default_factory=Inline)
    restores: Executor = field(default_factory=Inline)
    wake: Callable[[], None] = lambda: None  # called when a job has ended, from its thread


class Copies:
    """Called by the loop's thread alone, between steps."""

    def __init__(
        self,
        trie: BlockTrie,
        memory: KVMemory,
        host: PoolWriter,
        disk: Disk | None,
        hands: Hands,
        *,
        limits: CopyLimits = CopyLimits(),
    ) -> None:
        self.counts = CopyCounts()
        self.gone: list[bytes] = []  # keys that the host pool evicted, for whoever tells others
        self.arrived: list[Arrived] = []  # for whoever learns from their times
        self._trie = trie
        self._memory = memory
        self._host = host
        self._carrier = Carrier(memory, host.memory, disk)
        self._hands = hands
        self._limits = limits
        self._stores: deque[_Store] = deque()
        self._storing = 0
        self._restores: list[Restore] = []
        self._coming: dict[bytes, Restore] = {}

    @property
    def held(self) -> list[Block]:
        """Blocks that copies hold, each once for every hold."""
        leaving = [block for store in self._stores for block in store.blocks]
        arriving = [block for restore in self._restores for block in restore.blocks]
        return leaving + arriving + [r.parent for r in self._restores if r.parent is not None]

    @property
    def is_busy(self) -> bool:
        return bool(self._stores or self._restores)

    @property
    def restores_left(self) -> int:
        """Blocks that `restore` may be asked for now."""
        return self._limits.restores_max - sum(len(restore.blocks) for restore in self._restores)

    # Down ------------------------------------------------------------------------------------------------------------

    def store(self, blocks: Sequence[Block]) -> None:
        """Write readable blocks through to the host pool, unless they are there."""
        new = [block for block in blocks if block.edge is not None and block.key not in self._host.slot_of]
        for at in range(0, len(new), self._limits.store_batch):
            self._begin_store(new[at : at + self._limits.store_batch])

    def _begin_store(self, blocks: list[Block]) -> None:
        store = _Store([], [], [], Future())
        for block in blocks:
            begun = self._host.begin(self._content(block)) if self._storing < self._limits.stores_max else None
            if begun is None:
                self.counts.skipped += 1
                continue
            slot, evicted = begun
            if evicted is not None:
                self.gone.append(evicted.key)
            self._trie.pin(block)
            self._storing += 1
            store.blocks.append(block)
            store.slots.append(slot)
            store.evicted.append(evicted)
        if store.blocks:
            numbers = [block.id for block in store.blocks]
            store.future = self._hands.stores.submit(self._carrier.store, numbers, store.slots, store.evicted)
            store.future.add_done_callback(lambda _: self._hands.wake())
            self._stores.append(store)

    def _content(self, block: Block) -> Content:
        assert block.edge is not None
        parent = block.parent.key if block.parent is not None else self._trie.root_key
        return Content(block.key, parent, np.frombuffer(block.edge[1], dtype=np.int32))

    def _end_store(self, store: _Store, now: float) -> None:
        is_whole = not store.future.cancelled() and store.future.exception() is None
        if not is_whole and not store.future.cancelled():
            self.counts.failed += 1
            log.error("blocks were not written through", exc_info=store.future.exception())
        for block, slot in zip(store.blocks, store.slots, strict=True):
            if is_whole and block.edge is not None:  # else it was forgotten meanwhile: not to be believed
                self._host.finish(slot)
                self.counts.stored += 1
            else:
                self._host.abandon(slot)
                self.counts.skipped += 1
        for block in reversed(store.blocks):  # tails first, as they are evicted
            self._trie.unpin(block, now)
        self._storing -= len(store.blocks)

    # Up --------------------------------------------------------------------------------------------------------------

    def coming(self, key: bytes) -> Restore | None:
        """The restore under way that brings this block."""
        return self._coming.get(key)

    def restore(self, parent: Block | None, below: list[Below], band: Band, until: float, now: float) -> Restore:
        """Bring these blocks up behind `parent`. There must be room for them (`BlockTrie.available`)."""
        if parent is not None:
            self._trie.pin(parent)
        blocks = self._trie.take(len(below), now) or []
        assert blocks, "room was made before"
        own = [item.slot for item in below if self._host.slot_of.get(item.content.key) == item.slot]
        for slot in own:
            self._host.pin(slot)
        restore = Restore(parent, blocks, below, band, until, own)
        self._coming |= {item.content.key: restore for item in below}
        self._restores.append(restore)
        numbers = [block.id for block in blocks]
        restore.future = self._hands.restores.submit(
            self._carrier.load, numbers, below, self._memory.fence(), lambda: restore.is_given_up
        )
        restore.future.add_done_callback(lambda _: self._hands.wake())
        return restore

    def _end_restore(self, restore: Restore, now: float) -> None:
        arrived = self._outcome(restore)
        self.arrived.append(arrived)
        for tier, count in enumerate(arrived.counts):
            self.counts.restored[tier] += count
        self.counts.missed += len(restore.blocks) - arrived.blocks
        for slot in restore.pinned:
            self._host.unpin(slot)
        for item in restore.below:
            if self._coming.get(item.content.key) is restore:
                del self._coming[item.content.key]
        self._forget_void(restore.below[arrived.blocks :])
        self._publish(restore, arrived.blocks, now)
        restore.arrived, restore.is_done = arrived.blocks, True

    def _forget_void(self, missed: Sequence[Below]) -> None:
        """What we adopted of a worker that is distrusted since would else stand in the way of the right block."""
        for item in missed:
            if self._host.slot_of.get(item.content.key) == item.slot and self._host.memory.is_void(item.slot):
                self._host.drop(item.content.key)
                self.gone.append(item.content.key)

    def _outcome(self, restore: Restore) -> Arrived:
        assert restore.future is not None
        if restore.future.cancelled():
            return Arrived()
        error = restore.future.exception()
        if error is None:
            return restore.future.result()
        self.counts.failed += 1
        log.error("blocks were not brought up", exc_info=error)
        return Arrived()

    def _publish(self, restore: Restore, whole: int, now: float) -> None:
        """Enter what arrived into the trie, cached, and free the rest."""
        parent, kept = restore.parent, []
        for block, item in zip(restore.blocks[:whole], restore.below[:whole], strict=True):
            if parent is not None and parent.edge is None:
                break  # forgotten meanwhile: what stands behind it cannot be found
            found = self._trie.publish(block, parent, item.content.tokens.tobytes(), item.salt)
            if found is block:
                kept.append(block)
            parent = found  # else the same tokens were computed meanwhile, and ours is not needed
        new = self._trie.commit()
        self._trie.release(kept, restore.band, self._limits.restore_lease_s, now)
        self._trie.release([block for block in restore.blocks if block.edge is None], Band.EXPIRED, 0.0, now)
        if restore.parent is not None:
            self._trie.unpin(restore.parent, now)
        if not restore.is_given_up:  # else memory is short: nothing may hold it again
            self.store(new)

    # Both ------------------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> None:
        """Take in what jobs have ended."""
        while self._stores and self._stores[0].future.done():
            self._end_store(self._stores.popleft(), now)
        for restore in [r for r in self._restores if r.future is not None and r.future.done()]:
            self._restores.remove(restore)
            self._end_restore(restore, now)

    def reclaim(self, now: float) -> None:
        """Let go of all blocks: jobs not begun are given up, those under way are waited for."""
        for restore in self._restores:
            restore.is_given_up = True
        for future in self._futures():
            future.cancel()
        self.wait(now)

    def wait(self, now: float) -> None:
        """Until every job has ended."""
        while self.is_busy:
            for future in self._futures():
                if not future.cancelled():
                    future.exception()  # waits for it
            self.poll(now)

    def _futures(self) -> Iterator[Future[None] | Future[Arrived]]:
        yield from [store.future for store in self._stores]
        yield from [restore.future for restore in self._restores if restore.future is not None]
