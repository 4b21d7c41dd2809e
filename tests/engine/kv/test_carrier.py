"""What copying threads do: batches in order, one ahead; what comes in before what goes out; nothing left under way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.kv import carrier
from engine.kv.carrier import LOAD_BATCH, Below, Carrier, Tier
from engine.kv.pool import EXTENT_SLOTS, Content, PoolMemory, PoolWriter
from engine.step import HOST_BYTES_PER_S, Bytes, Copied, Fence
from tests.engine.rig import FAKE_BLOCK_BYTES, SIZE, pool_of

FENCE = object()


@dataclass
class Slow:
    """KV memory whose copies land only when they are waited for, told in order."""

    told: list[str] = field(default_factory=list)
    blocks: dict[int, bytes] = field(default_factory=dict)
    under_way: int = 0
    most: int = 0
    fails_at: int = 10**9  # the so many-th load
    waits: dict[int, threading.Event] = field(default_factory=dict)  # by block: how long its load takes at most
    block_bytes: int = FAKE_BLOCK_BYTES
    first_bytes_per_s: float = HOST_BYTES_PER_S

    def fence(self) -> Fence:
        return FENCE

    def save(self, blocks: Sequence[int], into: Sequence[Bytes], /) -> Copied:
        self.told.append(f"save {blocks[0]}")
        for block, payload in zip(blocks, into, strict=True):
            payload[:] = np.frombuffer(self.blocks[block], np.uint8)
        return lambda: 0.5

    def load(self, blocks: Sequence[int], payloads: Sequence[Bytes], after: Fence, /) -> Copied:
        assert after is FENCE
        self.fails_at -= 1
        if not self.fails_at:
            raise OSError("no link")
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        first = blocks[0] if blocks else -1
        self.told.append(f"begin {first}")

        def copied() -> float:
            self.waits.get(first, threading.Event()).wait(0.1 if first in self.waits else 0.0)
            for block, payload in zip(blocks, payloads, strict=True):
                self.blocks[block] = payload.tobytes()
            self.under_way -= 1
            self.told.append(f"end {first}")
            return 0.25

        return copied


def filled(count: int) -> tuple[PoolMemory, list[Below]]:
    """A pool that holds so many blocks, each of one byte's value."""
    pool = pool_of(4 * EXTENT_SLOTS)
    writer = PoolWriter(pool, 4)
    below = []
    for number in range(count):
        content = Content(number.to_bytes(16, "little"), bytes(16), np.arange(SIZE, dtype=np.int32) + number)
        begun = writer.begin(content)
        assert begun is not None
        pool.payloads[begun[0]] = number % 251
        writer.finish(begun[0])
        below.append(Below(content, b"", Tier.HOST, begun[0]))
    return pool, below


def never() -> bool:
    return False


def test_a_long_restore_goes_batch_by_batch_with_one_ahead_of_the_one_waited_for() -> None:
    pool, below = filled(40)
    memory = Slow()

    arrived = Carrier(memory, pool, None).load(range(100, 140), below, FENCE, never)

    assert memory.told == ["begin 100", "begin 116", "end 100", "begin 132", "end 116", "end 132"]
    assert memory.most == 2
    assert (arrived.blocks, arrived.counts, arrived.seconds) == (40, [40, 0], [0.75, 0.0])
    assert all(memory.blocks[100 + at] == bytes([at % 251]) * FAKE_BLOCK_BYTES for at in range(40))


def test_a_slot_torn_while_its_copy_runs_ends_the_restore_there_with_nothing_under_way() -> None:
    pool, below = filled(40)
    memory = Slow()
    torn = below[5]

    def tear(_: threading.Event) -> None:
        pool.headers["generation"][torn.slot] += 2

    memory.waits[100] = type("Tear", (threading.Event,), {"wait": lambda self, _: tear(self)})()
    arrived = Carrier(memory, pool, None).load(range(100, 140), below, FENCE, never)

    assert arrived.blocks == 5
    assert memory.under_way == 0
    assert memory.told == ["begin 100", "begin 116", "end 100", "end 116"]


def test_a_slot_torn_before_its_copy_is_where_the_restore_ends() -> None:
    pool, below = filled(40)
    pool.headers["generation"][below[20].slot] += 1
    memory = Slow()

    arrived = Carrier(memory, pool, None).load(range(100, 140), below, FENCE, never)

    assert arrived.blocks == 20
    assert set(memory.blocks) == set(range(100, 120))
    assert memory.under_way == 0


def test_a_link_that_fails_leaves_no_copy_under_way() -> None:
    pool, below = filled(40)
    memory = Slow(fails_at=2)

    with pytest.raises(OSError, match="no link"):
        Carrier(memory, pool, None).load(range(100, 140), below, FENCE, never)
    assert memory.told == ["begin 100", "end 100"]


def test_a_restore_given_up_ends_with_the_batches_under_way() -> None:
    pool, below = filled(5 * LOAD_BATCH)
    memory = Slow()

    arrived = Carrier(memory, pool, None).load(range(100, 100 + len(below)), below, FENCE, lambda: len(memory.told) > 1)

    assert arrived.blocks == 2 * LOAD_BATCH
    assert memory.under_way == 0


def test_a_store_gives_way_to_a_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "STORE_PATIENCE_S", 60.0)
    pool, below = filled(20)
    memory = Slow(blocks={1: bytes(FAKE_BLOCK_BYTES)})
    carries = Carrier(memory, pool, None)
    begun = memory.waits[100] = threading.Event()  # never set: the load takes its time
    store = threading.Thread(target=carries.store, args=([1], [99], [None]))
    load_of = memory.load

    def load(blocks: Sequence[int], payloads: Sequence[Bytes], after: Fence, /) -> Copied:
        if blocks[0] == 100:
            store.start()
        return load_of(blocks, payloads, after)

    memory.load = load  # type: ignore[method-assign]
    carries.load(range(100, 120), below, FENCE, never)
    store.join()

    assert not begun.is_set()
    assert memory.told == ["begin 100", "begin 116", "end 100", "end 116", "save 1"]


def test_a_store_does_not_give_way_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "STORE_PATIENCE_S", 0.01)
    pool, below = filled(2)
    memory = Slow(blocks={1: bytes(FAKE_BLOCK_BYTES)})
    carries = Carrier(memory, pool, None)

    def is_given_up() -> bool:
        carries.store([1], [99], [None])  # while the restore goes on
        return False

    assert carries.load([100, 101], below, FENCE, is_given_up).blocks == 2
    assert memory.told[0] == "save 1"
