"""The pool registered with the device while the worker serves: in whole slots, own first, and undone at the end."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.build import build
from engine.config import EngineConfig
from engine.core import Attach, Inbox, Order
from engine.fake import FAKE_SPEED, FakeKV, FakeRunner
from engine.kv import keys
from engine.kv.blocks import BlockTrie
from engine.kv.pinning import Pinning
from engine.kv.pool import EXTENT_SLOTS, PoolMemory, PoolShape, PoolWriter, attach
from engine.kv.tiers import Tiers
from engine.outbox import Outbox
from engine.step import Bytes
from engine.wire import Drain, StepFrame
from policies.retention import Band
from tests.engine.rig import FACTS, FAKE_BLOCK_BYTES, SIZE, order, prompt

STRIDE = 4096  # a fake block has 64 bytes, its slot a page


@dataclass
class Pinner:
    """Keeps book; may be told to fail, or to wait, at the so many-th piece."""

    fails_at: int = 10**9
    waits_at: int = 10**9
    go_on: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)
    held: dict[int, int] = field(default_factory=dict)
    order: list[tuple[int, int]] = field(default_factory=list)
    pinned_bytes_per_s: float = 50e9
    is_lost: bool = False  # the device fails every call

    def pin(self, memory: Bytes) -> None:
        if len(self.order) == self.waits_at:
            self.waiting.set()
            assert self.go_on.wait(30)
        if len(self.order) == self.fails_at:
            raise OSError("cudaHostRegister: out of memory")
        self.order.append((memory.ctypes.data, memory.nbytes))
        self.held[memory.ctypes.data] = memory.nbytes

    def unpin(self, memory: Bytes) -> None:
        assert self.held.pop(memory.ctypes.data) == memory.nbytes
        if self.is_lost:
            raise OSError("cudaHostUnregister: unspecified launch failure")


def descriptor_of(extents: int) -> int:
    descriptor = os.memfd_create("pool")
    os.ftruncate(descriptor, PoolShape(SIZE, FAKE_BLOCK_BYTES, extents * EXTENT_SLOTS).total_bytes)
    return descriptor


def pool_of(extents: int) -> PoolMemory:
    return attach(descriptor_of(extents), SIZE, FAKE_BLOCK_BYTES)


def run(pinning: Pinning) -> None:
    pinning.begin()
    assert pinning._thread is not None
    pinning._thread.join(30)


def test_whole_slots_are_registered_own_extents_first_and_all_is_undone() -> None:
    pool, pinner = pool_of(4), Pinner()
    pinning = Pinning(pool, [1, 2], pinner, piece_bytes=100 * STRIDE + 7)
    start = pool.span(range(1)).ctypes.data

    run(pinning)

    slots = [((address - start) // STRIDE, count // STRIDE) for address, count in pinner.order]
    assert slots == [(64, 100), (164, 28), (0, 64), (192, 64)]
    assert pinning.pinned_bytes == pinning.total_bytes == 4 * EXTENT_SLOTS * STRIDE
    pinning.close()
    assert not pinner.held
    assert pinning.pinned_bytes == 0


def test_registering_leaves_what_slots_hold_as_it_is() -> None:
    pool = pool_of(2)
    before = np.random.default_rng(1).integers(0, 255, pool.payloads.shape).astype(np.uint8)
    pool.payloads[:] = before

    run(Pinning(pool, [0, 1], Pinner()))

    assert (pool.payloads == before).all()


def test_a_refusal_is_said_once_and_what_was_registered_stays(caplog: pytest.LogCaptureFixture) -> None:
    pinner = Pinner(fails_at=2)
    pinning = Pinning(pool_of(4), [0, 1, 2, 3], pinner, piece_bytes=EXTENT_SLOTS * STRIDE)

    run(pinning)

    assert pinning.pinned_bytes == 2 * EXTENT_SLOTS * STRIDE
    assert [record.message for record in caplog.records] == [
        "0.0 of 0.0 GiB of the host pool are registered with the device, and no more: cudaHostRegister: out of memory"
    ]
    pinning.close()
    assert not pinner.held


def test_a_lost_device_does_not_keep_a_worker_from_ending(caplog: pytest.LogCaptureFixture) -> None:
    pinner = Pinner()
    pinning = Pinning(pool_of(2), [0, 1], pinner, piece_bytes=EXTENT_SLOTS * STRIDE)
    run(pinning)
    pinner.is_lost = True

    pinning.close()

    assert not pinner.held
    assert sum("not unregistered" in record.message for record in caplog.records) == 2


def test_a_worker_that_ends_waits_for_one_piece_and_undoes_it() -> None:
    pinner = Pinner(waits_at=1)
    pinning = Pinning(pool_of(4), [0, 1, 2, 3], pinner, piece_bytes=EXTENT_SLOTS * STRIDE)
    pinning.begin()
    assert pinner.waiting.wait(30)
    closing = threading.Thread(target=pinning.close)
    closing.start()
    assert pinning._is_over.wait(30)
    pinner.go_on.set()
    closing.join(30)

    assert len(pinner.order) == 2
    assert not pinner.held


def test_memory_that_cannot_be_had_is_said_before_the_driver_touches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    pinner = Pinner()
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    run(Pinning(pool_of(1), [0], pinner))

    assert not pinner.order


def test_what_restores_took_before_is_forgotten_when_the_pool_is_registered() -> None:
    """From slow memory computing is quicker; from registered memory it is not, and that is tried at once."""
    writer, kv = PoolWriter(pool_of(4), 4), FakeKV(np.zeros((256, SIZE), np.int32))
    kv.first_bytes_per_s = 1e3
    trie, pinning = BlockTrie(256, SIZE, keys.root(FACTS.digest)), Pinning(writer.memory, writer.extents, Pinner())
    tiers = Tiers(trie, kv, writer, pinning=pinning)
    ids = prompt(1, 10 * SIZE)
    parent = None
    for number, block in enumerate(trie.take(10, 0.0) or []):
        parent = trie.publish(block, parent, ids[number * SIZE : (number + 1) * SIZE].tobytes())
    tiers.store(trie.commit())
    tiers.wait(0.0)
    below = tiers.find([], ids.tobytes(), b"", 0)
    assert len(below.keys) == 10

    def bring_up() -> object:
        return tiers.bring_up([], below, Band.CHATBOT, make_room=lambda _: True, model=FAKE_SPEED, now=0.0)

    assert bring_up() is None
    tiers.pin()
    run(pinning)
    tiers.poll(0.0)
    assert bring_up() is not None
    assert tiers.load().pinned_bytes == pinning.total_bytes


class PinnableKV(FakeKV):
    """The fake device's KV with a driver beside it."""

    def __init__(self, blocks: int) -> None:
        super().__init__(np.full((blocks, SIZE), -1, np.int32))
        self.pinner = Pinner()
        self.pinned_bytes_per_s = 50e9
        self.pin, self.unpin = self.pinner.pin, self.pinner.unpin


def test_a_worker_registers_after_its_first_token_tells_it_and_undoes_it_when_it_ends() -> None:
    runner = FakeRunner(FACTS, (256, SIZE), FAKE_SPEED, lambda _: None)
    kv = runner.kv = PinnableKV(256)
    inbox, outbox, descriptor = Inbox(), Outbox(lambda: None), descriptor_of(2)
    core = build(runner, FACTS, EngineConfig(socket="", pool_fd=descriptor), inbox, lambda: 0.0)
    inbox.put(Attach(1, outbox))
    core.calibrate(0.0)
    core.turn()
    assert not kv.pinner.order
    inbox.put(Order(1, order(1, prompt(1, 20), max_tokens=3), 0.0))
    core.turn()
    until(lambda: len(kv.pinner.held) == 1)
    core.turn()
    loads = [frame.load for frame in iter(outbox.take, None) if isinstance(frame, StepFrame)]
    assert loads[-1].tiers.pinned_bytes == 2 * EXTENT_SLOTS * STRIDE
    inbox.put(Order(1, Drain(60.0), 0.0))
    core.run()

    assert len(kv.pinner.order) == 1
    assert not kv.pinner.held


def until(is_so: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(3000):
        if is_so():
            return
        waiting.wait(0.01)
    raise AssertionError("not within 30 s")
