"""The host pool: a stale, torn or foreign slot is a miss; what a dead worker wrote is still there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kv.keys import Ids
from engine.kv.pool import (
    DISTRUSTED_OFFSET,
    EXTENT_SLOTS,
    Content,
    PoolError,
    PoolMemory,
    PoolShape,
    PoolWriter,
    attach,
)
from engine.step import Bytes

SHAPE = PoolShape(block_tokens=4, slot_bytes=5000, slots=2 * EXTENT_SLOTS)


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def create(shape: PoolShape) -> int:
    descriptor = os.memfd_create("pool")
    os.ftruncate(descriptor, shape.total_bytes)
    attach(descriptor, shape.block_tokens, shape.slot_bytes).close()
    return descriptor


def content_of(number: int, parent: int = 0) -> Content:
    return Content(key_of(number), key_of(parent), tokens_of(number))


def tokens_of(number: int) -> Ids:
    return np.arange(number, number + 4, dtype=np.int32)


@pytest.fixture
def memory() -> Iterator[PoolMemory]:
    descriptor = create(SHAPE)
    mapped = PoolMemory(descriptor, SHAPE)
    yield mapped
    mapped.close()
    os.close(descriptor)


def store(writer: PoolWriter, number: int) -> int | None:
    begun = writer.begin(content_of(number))
    if begun is None:
        return None
    slot, _ = begun
    writer.memory.payloads[slot] = number % 251
    writer.finish(slot)
    return slot


def stored(writer: PoolWriter, number: int) -> int:
    slot = store(writer, number)
    assert slot is not None
    return slot


def load(memory: PoolMemory, slot: int, number: int) -> Bytes | None:
    generation = memory.standing(slot, key_of(number), tokens_of(number))
    payload = memory.payloads[slot].copy() if generation else None
    return payload if generation == memory.standing(slot, key_of(number), tokens_of(number)) else None


def test_a_block_written_is_read_back_whole(memory: PoolMemory) -> None:
    slot = stored(PoolWriter(memory, 1), 7)
    payload = load(memory, slot, 7)
    assert payload is not None
    assert (payload == 7).all()


def test_a_wrong_hint_is_a_miss(memory: PoolMemory) -> None:
    slot = stored(PoolWriter(memory, 1), 7)
    assert load(memory, slot, 8) is None
    assert load(memory, slot - 1, 7) is None
    assert load(memory, 10**9, 7) is None


def test_a_key_with_other_tokens_is_a_miss(memory: PoolMemory) -> None:
    slot = stored(PoolWriter(memory, 1), 7)
    assert memory.standing(slot, key_of(7), tokens_of(7))
    assert not memory.standing(slot, key_of(7), tokens_of(9))


def test_a_slot_being_written_is_a_miss(memory: PoolMemory) -> None:
    begun = PoolWriter(memory, 1).begin(content_of(7))
    assert begun is not None
    assert load(memory, begun[0], 7) is None


def test_a_slot_rewritten_during_the_copy_is_a_miss(memory: PoolMemory) -> None:
    writer = PoolWriter(memory, 1)
    slot = stored(writer, 7)

    before = memory.standing(slot, key_of(7), tokens_of(7))
    for number in range(100, 100 + writer.slots):
        store(writer, number)

    assert memory.standing(slot, key_of(7), tokens_of(7)) != before


def test_the_least_recently_used_block_makes_room(memory: PoolMemory) -> None:
    writer = PoolWriter(memory, 1)
    for number in range(EXTENT_SLOTS):
        store(writer, number + 1)
    writer.touch([key_of(1)])
    begun = writer.begin(content_of(999))
    assert begun is not None
    assert begun[1] is not None
    assert begun[1].key == key_of(2)
    assert writer.slot_of.get(key_of(1)) is not None


def test_a_pinned_slot_is_never_evicted(memory: PoolMemory) -> None:
    writer = PoolWriter(memory, 1)
    slots = [stored(writer, number + 1) for number in range(EXTENT_SLOTS)]
    for slot in slots:
        writer.pin(slot)
    assert store(writer, 999) is None
    writer.unpin(slots[5])
    assert store(writer, 999) == slots[5]


def test_a_pool_of_another_shape_is_refused() -> None:
    descriptor = create(SHAPE)
    with pytest.raises(PoolError, match="this worker needs"):
        PoolMemory(descriptor, PoolShape(block_tokens=8, slot_bytes=5000, slots=2 * EXTENT_SLOTS))
    os.close(descriptor)


def test_a_pool_smaller_than_one_extent_has_no_slots() -> None:
    assert PoolShape.fitting(10_000, block_tokens=4, slot_bytes=5000).slots == 0


def test_a_fitting_pool_stays_within_its_bytes() -> None:
    shape = PoolShape.fitting(10_000_000, block_tokens=16, slot_bytes=5000)
    assert shape.slots > 0
    assert shape.total_bytes <= 10_000_000


CHILD = """
import sys
from tests.engine.kv.test_pool import SHAPE, content_of, key_of, store
from engine.kv.pool import PoolMemory, PoolWriter
from engine.step import Bytes
writer = PoolWriter(PoolMemory(int(sys.argv[1]), SHAPE), 1)
store(writer, 7)
writer.begin(content_of(8, 7))
print(writer.extents[0], writer.slot_of.get(key_of(7)), flush=True)
sys.stdin.read()
"""


def test_a_dead_workers_blocks_are_adopted_and_a_living_ones_are_not() -> None:
    descriptor = create(SHAPE)
    memory = PoolMemory(descriptor, SHAPE)
    command = [sys.executable, "-c", CHILD, str(descriptor)]
    root = Path(__file__).resolve().parents[3]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, pass_fds=[descriptor], stdin=pipe, stdout=pipe, cwd=root) as child:
        assert child.stdout is not None
        extent, slot = map(int, child.stdout.readline().split())
        assert PoolWriter(memory, 2).extents == [1 - extent]
        assert load(memory, slot, 7) is not None
        child.kill()
        child.wait()
    heir = PoolWriter(memory, 2)
    assert heir.slot_of.get(key_of(7)) == slot
    assert heir.slot_of.get(key_of(8)) is None
    heir.check()
    memory.close()
    os.close(descriptor)


def distrust(memory: PoolMemory, epoch: int) -> None:
    os.pwrite(memory.descriptor, epoch.to_bytes(8, "little"), DISTRUSTED_OFFSET)


def test_what_a_distrusted_worker_wrote_is_a_miss_and_is_not_adopted(memory: PoolMemory) -> None:
    good = stored(PoolWriter(memory, 1, epoch=5), 7)
    heir = PoolWriter(memory, 1, epoch=6)
    bad = stored(heir, 8)

    distrust(memory, 6)

    assert load(memory, bad, 8) is None
    assert load(memory, good, 7) is not None  # the heir kept it, another one wrote it
    last = PoolWriter(memory, 1, epoch=7)
    assert list(last.slot_of) == [key_of(7)]
    last.check()
    assert load(memory, stored(last, 8), 8) is not None


class PoolMachine(RuleBasedStateMachine):
    """Whatever happens, each leased slot is free, being written, or holds one block; a read never lies."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = PoolShape(block_tokens=4, slot_bytes=64, slots=EXTENT_SLOTS)
        self.descriptor = create(self.shape)
        self.memory = PoolMemory(self.descriptor, self.shape)
        self.writer = PoolWriter(self.memory, 1)
        self.open: list[int] = []

    @rule(number=st.integers(1, 200))
    def begin(self, number: int) -> None:
        begun = self.writer.begin(content_of(number))
        if begun is not None:
            self.memory.payloads[begun[0]] = number
            self.open.append(begun[0])

    @precondition(lambda self: self.open)
    @rule()
    def finish(self) -> None:
        self.writer.finish(self.open.pop(0))

    @precondition(lambda self: self.open)
    @rule()
    def abandon(self) -> None:
        self.writer.abandon(self.open.pop(0))

    @rule(number=st.integers(1, 200), slot=st.integers(0, EXTENT_SLOTS - 1))
    def read(self, number: int, slot: int) -> None:
        payload = load(self.memory, slot, number)
        assert payload is None or (payload == number).all()

    @rule(number=st.integers(1, 200))
    def find(self, number: int) -> None:
        slot = self.writer.slot_of.get(key_of(number))
        if slot is not None:
            payload = load(self.memory, slot, number)
            assert payload is not None
            assert (payload == number).all()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.writer.check()

    def teardown(self) -> None:
        self.memory.close()
        os.close(self.descriptor)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=120, deadline=None)
