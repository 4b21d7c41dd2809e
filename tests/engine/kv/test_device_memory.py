"""A block's bytes on the device and in a slot are the same, over any link; what does not fit is refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engine.kv.device_memory import DeviceMemory
from engine.kv.link import HostLink, Piece, Way
from engine.kv.pinning import Pinning
from engine.kv.pool import EXTENT_SLOTS, PoolMemory, PoolShape, attach
from engine.step import Bytes, Copied, Fence

ON_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = (6, 3, 2, 2, 16, 8)  # blocks, layers, keys and values, heads, tokens, width


class Told(HostLink):
    """Copies by the host, and what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Way, list[Piece], int, Fence | None]] = []

    def copy(self, way: Way, pieces: Sequence[Piece], size: int, after: Fence | None) -> Copied:
        self.asked.append((way, list(pieces), size, after))
        return super().copy(way, pieces, size, after)


def random_kv(device: str = "cpu", shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, shape, device=device, dtype=torch.int16).view(torch.bfloat16)


def payloads_of(count: int, size: int) -> list[Bytes]:
    return [np.zeros(size, np.uint8) for _ in range(count)]


def test_a_block_is_one_piece_each_way() -> None:
    kv, link = random_kv(), Told()
    memory = DeviceMemory(kv, None, link)
    into, size = payloads_of(2, memory.block_bytes), memory.block_bytes

    memory.save([4, 1], into)()
    memory.load([0], into[:1], "fence")()

    start = kv.data_ptr()
    host = [payload.ctypes.data for payload in into]
    assert link.asked == [
        (Way.DOWN, [Piece(host[0], start + 4 * size), Piece(host[1], start + size)], size, None),
        (Way.UP, [Piece(start, host[0])], size, "fence"),
    ]
    assert torch.equal(kv[0].view(torch.int16), kv[4].view(torch.int16))
    assert into[1].tobytes() == kv[1].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("block", "extra"), [(6, 0), (-1, 0), (0, 1), (0, -1)])
def test_what_does_not_fit_is_refused(block: int, extra: int) -> None:
    memory = DeviceMemory(random_kv(), None)

    with pytest.raises(ValueError, match="does not fit"):
        memory.load([block], payloads_of(1, memory.block_bytes + extra), None)


# On a card -----------------------------------------------------------------------------------------------------------


def pool_for(memory: DeviceMemory) -> PoolMemory:
    descriptor = os.memfd_create("pool")
    os.ftruncate(descriptor, PoolShape(16, memory.block_bytes, 2 * EXTENT_SLOTS).total_bytes)
    return attach(descriptor, 16, memory.block_bytes)


@pytest.mark.gpu
@ON_CARD
@pytest.mark.parametrize("is_pinned", [False, True], ids=["pageable", "pinned"])
def test_kv_comes_back_bit_for_bit(is_pinned: bool) -> None:
    kv = random_kv("cuda", (64, 4, 2, 4, 64, 128))  # 512 KiB a block
    steps = torch.cuda.Stream()
    memory = DeviceMemory(kv, steps)
    pool = pool_for(memory)
    pinning = Pinning(pool, [0, 1], memory, piece_bytes=2**25)
    if is_pinned:
        pinning.begin()
        assert pinning._thread is not None
        pinning._thread.join(30)
        assert pinning.pinned_bytes == pinning.total_bytes
    before = kv.cpu().view(torch.int16)
    slots = [pool.payloads[64 + at] for at in range(64)]

    assert memory.save(range(64), slots)() > 0
    for block, slot in enumerate(slots):
        assert slot.tobytes() == before[block].numpy().tobytes()
    kv.zero_()
    torch.cuda.synchronize()
    assert memory.load(range(63, -1, -1), slots[::-1], memory.fence())() > 0

    assert torch.equal(kv.cpu().view(torch.int16), before)
    pinning.close()
    pinning.close()


@pytest.mark.gpu
@ON_CARD
def test_a_restore_waits_for_what_steps_in_flight_write() -> None:
    kv = torch.zeros(4, 1, 2, 1, 64, 1024, dtype=torch.bfloat16, device="cuda")
    steps = torch.cuda.Stream()
    memory = DeviceMemory(kv, steps)
    payload = np.full(memory.block_bytes, 7, np.uint8)
    torch.cuda.synchronize()
    with torch.cuda.stream(steps):
        torch.cuda._sleep(200_000_000)  # 0.1 s and more
        kv[2].fill_(1.0)  # as a step ahead that was not wanted

    memory.load([2], [payload], memory.fence())()

    assert steps.query()
    assert bool((kv[2].view(torch.uint8) == 7).all())


@pytest.mark.gpu
@ON_CARD
def test_copies_and_registering_go_on_beside_a_capture() -> None:
    """Steps are captured while threads copy: neither may end up in the other."""
    kv = random_kv("cuda", (32, 4, 2, 4, 64, 128))
    steps, before = torch.cuda.Stream(), kv.cpu().view(torch.int16)
    memory = DeviceMemory(kv, steps)
    pool = pool_for(memory)
    slots = [pool.payloads[at] for at in range(32)]
    memory.save(range(32), slots)()
    pinning, is_over = Pinning(pool, [0, 1], memory, piece_bytes=2**22), threading.Event()
    counter = torch.zeros(1, device="cuda").add_(0.0)  # its kernel is loaded before a capture needs it
    fence = memory.fence()

    def copy() -> int:
        count = 0
        while not is_over.is_set() or not count:
            memory.load(range(32), slots, fence)()
            memory.save(range(32), slots)()
            count += 1
        return count

    with ThreadPoolExecutor(1) as thread:
        copying = thread.submit(copy)
        pinning.begin()
        try:
            with torch.cuda.stream(steps):
                for _ in range(20):
                    graph = torch.cuda.CUDAGraph()
                    torch.cuda.synchronize()
                    graph.capture_begin(capture_error_mode="thread_local")
                    for _ in range(50):
                        counter.add_(1.0)
                    graph.capture_end()
                    graph.replay()
        finally:
            is_over.set()
        assert copying.result(30) > 0
    torch.cuda.synchronize()

    assert counter.item() == 20 * 50
    assert torch.equal(kv.cpu().view(torch.int16), before)
    pinning.close()


@pytest.mark.gpu
@ON_CARD
def test_memory_that_is_registered_already_is_refused_and_nothing_else_breaks() -> None:
    memory = DeviceMemory(random_kv("cuda"), torch.cuda.Stream())
    piece = pool_for(memory).span(range(4))
    memory.pin(piece)

    with pytest.raises(OSError, match="cudaHostRegister"):
        memory.pin(piece)

    memory.unpin(piece)
    assert torch.ones(4, device="cuda").sum().item() == 4.0
