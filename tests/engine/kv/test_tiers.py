"""The tiers below the device: what was computed once comes back, whatever became of it; what is wrong is a miss."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.kv import keys
from engine.kv.copies import CopyLimits, Hands, Inline
from engine.kv.disk import QUEUE_MAX, Disk
from engine.kv.pool import EXTENT_SLOTS, PoolWriter
from engine.scheduling.scheduler import SchedulerLimits
from engine.wire import Hint, HintAck, HintAction
from policies.retention import Band
from router.host.keeper import distrust
from tests.engine.later import Later
from tests.engine.process import fake_worker
from tests.engine.rig import AGENT, BATCH, CHAT, FAKE_BLOCK_BYTES, SIZE, Rig, expected, order, pool_of, prompt


def rig_with_pool(blocks: int = 256, extents: int = 4, **options: Any) -> Rig:
    return Rig(blocks=blocks, host=PoolWriter(pool_of(extents * EXTENT_SLOTS), extents), **options)


def serve(rig: Rig, handle: int, ids: Any, **options: Any) -> None:
    """One request alone, its tokens as they must be."""
    rig.submit(order(handle, ids, **options))
    rig.run()
    assert rig.tokens[handle] == expected(ids, 8)


def push_out(rig: Rig, first: int = 1000) -> None:
    """Other prompts until nothing else is cached on the device."""
    for number in range(first, first + 2 * rig.blocks // 16 + 2):
        serve(rig, number, prompt(number, 16 * SIZE))


def test_every_full_block_is_written_through_also_those_of_the_answer() -> None:
    rig, ids = rig_with_pool(), prompt(1, 4 * SIZE - 4)
    serve(rig, 1, ids)
    known = np.concatenate((ids, np.array(expected(ids, 8), dtype=np.int32)))
    chain = keys.split(keys.chain(rig.trie.root_key, known, SIZE))
    assert rig.host is not None
    assert set(rig.host.slot_of) == set(chain[:4])


def test_what_the_device_evicted_comes_back_from_the_host_pool_and_counts_as_cached() -> None:
    rig, ids = rig_with_pool(blocks=24), prompt(1, 10 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    assert rig.trie.match(ids.tobytes(), b"", 0) == []
    computed = len(rig.steps)
    serve(rig, 2, ids)
    assert rig.starts[2].cached_tokens == 10 * SIZE
    assert rig.tiers.load().restored_host == 10
    assert sum(int(step.tokens.sum()) for step in rig.steps[computed:]) == 8  # the last prompt row, then decodes


def test_without_a_pool_it_is_computed_again() -> None:
    rig, ids = Rig(blocks=24), prompt(1, 10 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    serve(rig, 2, ids)
    assert rig.starts[2].cached_tokens == 0


def test_a_preempted_answer_goes_on_from_the_pool() -> None:
    """Batch work fills the memory, a chat takes it, others evict what was left: the stream shows nothing of it."""
    rig = rig_with_pool(blocks=24, limits=SchedulerLimits(preempt_cooldown_s=0.0))
    ids = prompt(1, 12 * SIZE)
    rig.submit(order(1, ids, cls=BATCH, max_tokens=100))
    for _ in range(8):
        rig.step()
    for number in range(2, 6):
        rig.submit(order(number, prompt(number, 20 * SIZE), first_left_s=0.01))
    rig.run()
    assert rig.scheduler.room.preemptions >= 1
    assert rig.tiers.load().restored_host >= 12
    assert rig.tokens[1] == expected(ids, 100)
    for number in range(2, 6):
        assert rig.tokens[number] == expected(prompt(number, 20 * SIZE), 8)


def test_two_that_want_the_same_blocks_share_one_restore() -> None:
    later = Later()
    rig, ids = rig_with_pool(blocks=40, hands=Hands(Inline(), later)), prompt(1, 10 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    rig.submit(order(2, ids), order(3, ids))
    rig.step()
    rig.step()
    assert len(later.jobs) == 1
    later.run()
    rig.run()
    assert rig.tiers.load().restored_host == 10
    assert rig.tokens[2] == rig.tokens[3] == expected(ids, 8)
    assert rig.starts[2].cached_tokens == rig.starts[3].cached_tokens == 10 * SIZE


def test_others_are_served_while_one_waits_for_its_blocks() -> None:
    later = Later()
    rig, ids, other = rig_with_pool(blocks=40, hands=Hands(Inline(), later)), prompt(1, 10 * SIZE), prompt(7, SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    rig.submit(order(2, ids), order(3, other))
    while 3 not in rig.ends:
        assert rig.step() is not None
    assert 2 not in rig.tokens
    later.run()
    rig.run()
    assert rig.tokens[2] == expected(ids, 8)


def test_nobody_waits_for_a_restore_longer_than_computing_would_take() -> None:
    later = Later()
    rig, ids = rig_with_pool(blocks=40, hands=Hands(Inline(), later)), prompt(1, 10 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    rig.submit(order(2, ids))
    while 2 not in rig.ends:
        rig.step()
        rig.now += 0.01
    assert rig.tokens[2] == expected(ids, 8)
    assert rig.starts[2].cached_tokens == 0
    later.run()  # too late: what came is found computed, and dropped
    rig.run()
    rig.trie.check()


def test_a_slot_overwritten_before_the_copy_is_a_miss_and_computed() -> None:
    later = Later()
    rig, ids = rig_with_pool(blocks=40, hands=Hands(Inline(), later)), prompt(1, 10 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    rig.submit(order(2, ids))
    rig.step()
    assert rig.host is not None
    chain = keys.split(keys.chain(rig.trie.root_key, ids, SIZE))
    slot = rig.host.slot_of[chain[4]]
    rig.host.memory.headers["generation"][slot] += 1  # as a writer that begins
    later.run()
    rig.run()
    assert rig.tokens[2] == expected(ids, 8)
    assert rig.starts[2].cached_tokens == 4 * SIZE
    assert rig.tiers.load().missed == 6


def test_the_salt_walls_off_the_pool_too() -> None:
    rig, ids = rig_with_pool(blocks=24), prompt(1, 10 * SIZE)
    serve(rig, 1, ids, salt=b"a")
    push_out(rig)
    serve(rig, 2, ids, salt=b"b")
    assert rig.starts[2].cached_tokens == 0
    serve(rig, 3, ids, salt=b"a")
    assert rig.starts[3].cached_tokens == 10 * SIZE


def test_a_block_is_evicted_for_the_router_when_no_tier_has_it() -> None:
    rig, ids = rig_with_pool(blocks=24, extents=1), prompt(1, 10 * SIZE)
    chain = keys.split(keys.chain(rig.trie.root_key, ids, SIZE))
    serve(rig, 1, ids)
    stored, evicted = rig.tiers.take_events()
    assert set(chain) <= set(keys.split(stored))
    push_out(rig)  # 5 x 16 blocks: more than the pool's 64 slots
    _, evicted = rig.tiers.take_events()
    assert set(chain) <= set(keys.split(evicted))


def test_what_the_pool_still_has_is_not_evicted_for_the_router() -> None:
    rig, ids = rig_with_pool(blocks=24), prompt(1, 10 * SIZE)
    chain = keys.split(keys.chain(rig.trie.root_key, ids, SIZE))
    serve(rig, 1, ids)
    push_out(rig)
    assert not set(chain) & set(keys.split(rig.tiers.take_events()[1]))
    assert set(chain) <= set(keys.split(rig.tiers.resident_keys()))


def test_blocks_of_a_poisoned_sequence_leave_the_pool_as_well() -> None:
    from engine.fake import Fault

    rig, ids = rig_with_pool(faults=(Fault("nan", 4),)), prompt(1, 4 * SIZE)
    rig.submit(order(1, ids))
    rig.run()
    assert rig.ends[1].reason == "error"
    assert rig.host is not None
    assert not rig.host.slot_of
    rig.host.check()


def test_copies_let_go_when_memory_is_short() -> None:
    """Stores that never run hold every block; a decode that needs one takes it back from them."""
    later = Later()
    rig = rig_with_pool(blocks=8, hands=Hands(later, Inline()))
    ids = prompt(1, 3 * SIZE)
    rig.submit(order(1, ids))
    while rig.step() is not None:
        pass
    rig.submit(order(2, prompt(2, 6 * SIZE), max_tokens=20))
    while rig.step() is not None:
        pass
    assert rig.tokens[2] == expected(prompt(2, 6 * SIZE), 20)
    later.run()
    rig.run()


def test_more_than_may_be_under_way_is_not_written_through() -> None:
    later = Later()
    rig = rig_with_pool(hands=Hands(later, Inline()), copy_limits=CopyLimits(stores_max=4))
    rig.submit(order(1, prompt(1, 10 * SIZE)))
    while rig.step() is not None:
        pass
    assert sum(len(args[0]) for _, _, args in later.jobs) == 4
    assert rig.tiers.load().skipped == 6
    later.run()
    rig.run()


def test_no_more_comes_up_at_once_than_the_bound() -> None:
    rig, ids = rig_with_pool(blocks=24, copy_limits=CopyLimits(restores_max=3)), prompt(1, 10 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    serve(rig, 2, ids)
    assert rig.starts[2].cached_tokens == 3 * SIZE


def test_what_nobody_came_for_is_the_first_to_go_after_its_lease() -> None:
    """Restored for a batch item that left: within its lease it outlives a person's blocks, then it goes first."""
    later = Later()
    rig, ids, chat = rig_with_pool(blocks=40, hands=Hands(Inline(), later)), prompt(1, 10 * SIZE), prompt(2, 4 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    serve(rig, 2, chat)
    rig.submit(order(3, ids, cls=BATCH))
    rig.step()
    rig.abort(3)
    later.run()
    rig.tiers.poll(rig.now)
    restored = rig.trie.match(ids.tobytes(), b"", 0)
    assert len(restored) == 10
    assert all(block.lease_until == rig.now + CopyLimits().restore_lease_s for block in restored)
    rig.now += 6.0
    taken = rig.trie.take(rig.trie.counts().free + 10, rig.now) or []
    assert rig.trie.match(ids.tobytes(), b"", 0) == []
    assert len(rig.trie.match(chat.tobytes(), b"", 0)) == 4
    rig.trie.release(taken, Band.EXPIRED, 0.0, rig.now)


def test_classes_do_not_share_worth_but_share_blocks() -> None:
    rig, ids = rig_with_pool(blocks=24), prompt(1, 10 * SIZE)
    serve(rig, 1, ids, cls=AGENT)
    push_out(rig)
    serve(rig, 2, ids, cls=CHAT)
    assert rig.starts[2].cached_tokens == 10 * SIZE


def test_threads_copy_the_same() -> None:
    with ThreadPoolExecutor(1) as stores, ThreadPoolExecutor(1) as restores:
        rig, ids = rig_with_pool(blocks=24, hands=Hands(stores, restores)), prompt(1, 10 * SIZE)
        serve(rig, 1, ids)
        push_out(rig)
        serve(rig, 2, ids)
        assert rig.tiers.load().restored_host > 0


def test_what_was_adopted_of_a_worker_distrusted_later_is_computed_anew_and_stored_again() -> None:
    memory, ids = pool_of(4 * EXTENT_SLOTS), prompt(1, 10 * SIZE)
    serve(Rig(blocks=24, host=PoolWriter(memory, 4, epoch=5)), 1, ids)
    rig = Rig(blocks=24, host=PoolWriter(memory, 4, epoch=6))
    distrust(memory.descriptor, 5, 0)

    serve(rig, 1, ids)
    assert rig.tiers.load().restored_host == 0
    push_out(rig)
    serve(rig, 2, ids)
    assert rig.tiers.load().restored_host > 0


# Disk ----------------------------------------------------------------------------------------------------------------


def disk_of(folder: Path, files: int = 1000) -> Disk:
    return Disk(folder, files * FAKE_BLOCK_BYTES, FAKE_BLOCK_BYTES, Inline())


def evicted_to_disk(folder: Path) -> tuple[Rig, Any]:
    """A prompt of 10 blocks that lies on disk alone."""
    rig, ids = rig_with_pool(blocks=24, extents=1, disk=disk_of(folder)), prompt(1, 10 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    chain = keys.split(keys.chain(rig.trie.root_key, ids, SIZE))
    assert rig.host is not None
    assert not set(chain) & set(rig.host.slot_of)
    assert all(rig.tiers.holds(key) for key in chain)
    return rig, ids


def test_what_the_pool_evicts_comes_back_from_disk(tmp_path: Path) -> None:
    rig, ids = evicted_to_disk(tmp_path)
    serve(rig, 2, ids)
    assert rig.starts[2].cached_tokens == 10 * SIZE
    assert rig.tiers.load().restored_disk == 10


def test_a_folder_of_a_distrusted_worker_is_emptied_and_that_of_another_one_is_not(tmp_path: Path) -> None:
    _, ids = evicted_to_disk(tmp_path)
    chain = keys.split(keys.chain(keys.root("digest"), ids, SIZE))

    def reopened(epoch: int, distrusted: int) -> bool:
        bound = 1000 * FAKE_BLOCK_BYTES
        disk = Disk(tmp_path, bound, FAKE_BLOCK_BYTES, Inline(), epoch=epoch, distrusts=lambda each: each == distrusted)
        held = [disk.holds(key) for key in chain]
        disk.close()
        assert all(held) or not any(held)
        return held[0]

    assert reopened(epoch=6, distrusted=5)
    assert reopened(epoch=7, distrusted=5)
    assert not reopened(epoch=8, distrusted=7)
    assert not list(tmp_path.glob("*.kv"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "foreign", "old"])
def test_a_damaged_file_is_a_miss_and_is_removed(tmp_path: Path, damage: str) -> None:
    rig, ids = evicted_to_disk(tmp_path)
    chain = keys.split(keys.chain(rig.trie.root_key, ids, SIZE))
    path = tmp_path / f"{chain[3].hex()}.kv"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    elif damage == "cut":
        del data[-1:]
    elif damage == "foreign":
        data = bytearray((tmp_path / f"{chain[5].hex()}.kv").read_bytes())
    elif damage == "old":
        data[8] += 1
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    serve(rig, 2, ids)
    assert rig.starts[2].cached_tokens == 3 * SIZE
    assert rig.tiers.load().disk_corrupt == (damage != "gone")
    assert not path.exists()


def test_files_outlive_the_process_and_their_number_is_bounded(tmp_path: Path) -> None:
    evicted_to_disk(tmp_path)[0].disk.close()  # type: ignore[union-attr]
    (tmp_path / "README").write_text("not ours")
    (tmp_path / "junk.part").write_text("half a file")
    found = disk_of(tmp_path)
    assert len(found) >= 10
    found.close()
    fewer = disk_of(tmp_path, files=4)
    assert len(fewer) == len(list(tmp_path.glob("*.kv"))) == 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".kv") == ["README", "epoch", "lock"]


def test_a_slow_disk_loses_blocks_and_delays_nobody(tmp_path: Path) -> None:
    slow = Later()
    disk = Disk(tmp_path, 2**20, FAKE_BLOCK_BYTES, slow)
    rig = rig_with_pool(blocks=24, extents=1, disk=disk)
    serve(rig, 1, prompt(1, 10 * SIZE))
    push_out(rig)
    assert len(slow.jobs) == QUEUE_MAX
    assert rig.tiers.load().disk_dropped > 0


# Processes -----------------------------------------------------------------------------------------------------------


# Computing 40 blocks takes 0.8 s then, and so long is waited for blocks on their way up: also on a busy machine.
SLOW = ("--slower", "60")


def pool_descriptor() -> int:
    descriptor = os.memfd_create("pool")
    os.ftruncate(descriptor, 8 * 2**20)
    return descriptor


def test_after_kill_9_the_next_worker_serves_the_old_prefix_from_the_pool(tmp_path: Path) -> None:
    pool, ids = pool_descriptor(), prompt(1, 40 * SIZE)
    arguments = ("--pool-fd", str(pool), "--pool-share", "2", "--vocab", "1000", *SLOW)
    with fake_worker(tmp_path, *arguments, fds=(pool,)) as first:
        peer = first.connect()
        peer.send(order(1, ids))
        peer.until_ended(1)
        peer.until(lambda: peer.loads[-1].tiers.stored >= 40)
        first.process.kill()
        first.process.wait()
    with fake_worker(tmp_path, *arguments, fds=(pool,)) as second:
        peer = second.connect()
        assert set(keys.split(keys.chain(keys.ChainKey(peer.hello.root), ids, SIZE))) <= set(
            keys.split(peer.hello.cached)
        )
        peer.send(order(1, ids))
        peer.until_ended(1)
        assert peer.starts[1].cached_tokens == 40 * SIZE
        assert peer.tokens[1] == expected(ids, 8)
    os.close(pool)


def test_a_neighbour_reads_what_another_worker_wrote(tmp_path: Path) -> None:
    pool, ids = pool_descriptor(), prompt(1, 40 * SIZE)
    arguments = ("--pool-fd", str(pool), "--pool-share", "2", "--vocab", "1000", *SLOW)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        fake_worker(tmp_path / "a", *arguments, fds=(pool,)) as one,
        fake_worker(tmp_path / "b", *arguments, fds=(pool,)) as other,
    ):
        peer = one.connect()
        peer.send(order(1, ids))
        peer.until_ended(1)
        peer.until(lambda: peer.loads[-1].tiers.stored >= 40)
        reader = other.connect()
        reader.send(order(1, ids))
        reader.until_ended(1)
        assert reader.starts[1].cached_tokens == 40 * SIZE
        assert reader.tokens[1] == expected(ids, 8)
    os.close(pool)


def test_a_hint_crosses_the_wire_and_is_answered_in_a_frame(tmp_path: Path) -> None:
    with fake_worker(tmp_path) as worker:
        peer = worker.connect()
        peer.send(order(1, prompt(1, 4 * SIZE), session="s"))
        peer.until_ended(1)
        actions = [HintAction("a", "retain", b"", "s", 5.0), HintAction("b", "demote", b"", "t")]
        peer.send(Hint("m", actions))
        while not (frame := peer.frame()).acks:
            pass
        assert frame.acks == [HintAck("m", "a", "done", 4), HintAck("m", "b", "unknown", 0)]


def test_blocks_that_come_up_while_the_weights_change_are_not_found_under_the_new_ones() -> None:
    later = Later()
    rig, ids = rig_with_pool(blocks=40, hands=Hands(Inline(), later)), prompt(1, 10 * SIZE)
    serve(rig, 1, ids)
    push_out(rig)
    rig.submit(order(2, ids))
    rig.step()
    assert len(later.jobs) == 1
    rig.scheduler.renew(keys.root("other weights"), rig.now)
    later.run()
    rig.tiers.poll(rig.now)
    assert rig.trie.match(ids.tobytes(), b"", 0) == []
    rig.run()
    assert rig.starts[2].cached_tokens == 0
    assert rig.tiers.load().restored_host == 0
