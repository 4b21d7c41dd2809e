"""Whatever happens to trie, pool and disk: no block is lost, none crosses a salt domain, none is read stale."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.fake import FAKE_SPEED, FakeKV
from engine.kv import keys
from engine.kv.blocks import Block, BlockTrie
from engine.kv.copies import CopyLimits, Hands, Inline
from engine.kv.disk import Disk
from engine.kv.keys import Ids
from engine.kv.pool import EXTENT_SLOTS, PoolShape, PoolWriter, attach
from engine.kv.tiers import Tiers
from policies.retention import Band
from tests.engine.later import Later

SIZE = 2
BLOCKS = 24
BLOCK_BYTES = SIZE * 4
SALTS = (b"", b"one", b"two")
MARK = 1000  # KV of salt domain n is its tokens + n * MARK: a block that crosses over shows

Ints = st.integers


@dataclass
class Holder:
    """A sequence as far as blocks go: its tokens, all of them in full blocks that it holds."""

    domain: int
    ids: Ids
    blocks: list[Block]

    @property
    def salt(self) -> bytes:
        return SALTS[self.domain]


class TierMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.pool = os.memfd_create("pool")
        os.ftruncate(self.pool, PoolShape(SIZE, BLOCK_BYTES, EXTENT_SLOTS).total_bytes)
        self.memory = attach(self.pool, SIZE, BLOCK_BYTES)
        self.chains: list[tuple[int, Ids]] = []
        self.now = 0.0
        self.serial = 0
        self.begin_worker()

    def begin_worker(self) -> None:
        """A fresh process: device and trie empty, pool and disk as they were left."""
        self.trie = BlockTrie(BLOCKS, SIZE, keys.root("m"))
        self.kv = np.full((BLOCKS, SIZE), -1, dtype=np.int32)
        self.host = PoolWriter(self.memory, 1)
        self.disk = Disk(Path(self.folder.name), 40 * BLOCK_BYTES, BLOCK_BYTES, Inline())
        self.hands = Hands(Later(), Later())
        limits = CopyLimits(stores_max=12, store_batch=3, restores_max=16, restore_lease_s=1.0)
        self.tiers = Tiers(self.trie, FakeKV(self.kv), self.host, self.disk, hands=self.hands, limits=limits)
        self.holders: list[Holder] = []

    # Sequences

    @rule(domain=Ints(0, 2), seed=Ints(0, 5), blocks=Ints(1, 8))
    def allocate(self, domain: int, seed: int, blocks: int) -> None:
        ids = np.random.default_rng(seed).integers(0, 4, blocks * SIZE).astype(np.int32)
        found = self.trie.match(ids.tobytes(), SALTS[domain], 0)
        self.trie.hold(found)
        holder = Holder(domain, ids[: len(found) * SIZE], found)
        self.holders.append(holder)
        for number in range(len(found), blocks):
            if not self.compute(holder, ids[number * SIZE : (number + 1) * SIZE]):
                break
        self.chains = [*self.chains[-15:], (domain, holder.ids)]

    @precondition(lambda self: self.holders)
    @rule(which=Ints(0, 99), seed=Ints(0, 3))
    def append(self, which: int, seed: int) -> None:
        holder = self.holders[which % len(self.holders)]
        self.compute(holder, np.random.default_rng(seed).integers(0, 4, SIZE).astype(np.int32))
        self.chains = [*self.chains[-15:], (holder.domain, holder.ids)]

    def compute(self, holder: Holder, tokens: Ids) -> bool:
        """One more block of a sequence, as a step and its collect do it."""
        if not self.trie.available:
            self.tiers.reclaim(self.now)
        taken = self.trie.take(1, self.now)
        if taken is None:
            return False
        parent = holder.blocks[-1] if holder.blocks else None
        salt = holder.salt if parent is None else b""
        self.kv[taken[0].id] = tokens + holder.domain * MARK
        is_findable = parent is None or parent.edge is not None
        block = self.trie.publish(taken[0], parent, tokens.tobytes(), salt) if is_findable else taken[0]
        self.tiers.store(self.trie.commit())
        if block is not taken[0]:
            self.trie.hold([block])
            self.trie.release(taken, Band.EXPIRED, 0.0, self.now)
        holder.blocks.append(block)
        holder.ids = np.concatenate((holder.ids, tokens))
        return True

    @precondition(lambda self: self.holders)
    @rule(which=Ints(0, 99))
    def fork(self, which: int) -> None:
        holder = self.holders[which % len(self.holders)]
        blocks = self.trie.match(holder.ids.tobytes(), holder.salt, 0)  # fewer than it holds, if some were forgotten
        self.trie.hold(blocks)
        self.holders.append(Holder(holder.domain, holder.ids[: len(blocks) * SIZE], blocks))

    @precondition(lambda self: self.holders)
    @rule(which=Ints(0, 99), band=st.sampled_from(list(Band)[:-1]), lease_s=st.sampled_from([0.0, 2.0, 20.0, 200.0]))
    def free(self, which: int, band: Band, lease_s: float) -> None:
        holder = self.holders.pop(which % len(self.holders))
        self.tiers.touch(holder.blocks)
        self.trie.release(holder.blocks, band, lease_s, self.now)

    # Cache

    @precondition(lambda self: self.chains)
    @rule(which=Ints(0, 99), band=st.sampled_from(list(Band)[:-1]), lease_s=st.sampled_from([0.0, 5.0, 50.0]))
    def lease(self, which: int, band: Band, lease_s: float) -> None:
        domain, ids = self.chains[which % len(self.chains)]
        for block in reversed(self.trie.match(ids.tobytes(), SALTS[domain], 0)):
            self.trie.rank(block, band, self.now + lease_s, self.now)

    @rule(count=Ints(1, BLOCKS))
    def evict(self, count: int) -> None:
        taken = self.trie.take(min(count, self.trie.available), self.now) or []
        for block in taken:
            self.kv[block.id] = -7
        self.trie.release(taken, Band.EXPIRED, 0.0, self.now)

    @precondition(lambda self: self.chains)
    @rule(which=Ints(0, 99))
    def demote(self, which: int) -> None:
        domain, ids = self.chains[which % len(self.chains)]
        for block in reversed(self.trie.match(ids.tobytes(), SALTS[domain], 0)):
            if not (self.tiers.holds(block.key) and self.trie.drop(block)):
                break

    @precondition(lambda self: self.chains)
    @rule(which=Ints(0, 99))
    def restore(self, which: int) -> None:
        domain, ids = self.chains[which % len(self.chains)]
        found = self.trie.match(ids.tobytes(), SALTS[domain], 0)
        below = self.tiers.find(found, ids.tobytes(), SALTS[domain], 0)

        def has_room(blocks: int) -> bool:
            return blocks <= self.trie.available

        self.tiers.bring_up(found, below, Band.CHATBOT, make_room=has_room, model=FAKE_SPEED, now=self.now)

    @precondition(lambda self: self.chains)
    @rule(which=Ints(0, 99))
    def forget(self, which: int) -> None:
        domain, ids = self.chains[which % len(self.chains)]
        self.tiers.forget(self.trie.forget(self.trie.match(ids.tobytes(), SALTS[domain], 0)[-1:], self.now))

    # Copies and the world

    @rule(stores=Ints(0, 3), restores=Ints(0, 3))
    def copy(self, stores: int, restores: int) -> None:
        assert isinstance(self.hands.stores, Later)
        assert isinstance(self.hands.restores, Later)
        self.hands.stores.run(stores)
        self.hands.restores.run(restores)
        self.tiers.poll(self.now)

    @rule()
    def reclaim(self) -> None:
        self.tiers.reclaim(self.now)
        assert not self.tiers.held

    @rule(seconds=st.sampled_from([0.1, 3.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.host.slot_of)
    @rule(which=Ints(0, 99), is_other=st.booleans())
    def tear(self, which: int, is_other: bool) -> None:
        """A slot is not what its index says: rewritten since, or with other tokens under the same key."""
        slot = list(self.host.slot_of.values())[which % len(self.host.slot_of)]
        self.memory.headers["generation"][slot] += 2
        if is_other:
            self.memory.headers["tokens"][slot] = 9
            self.memory.payloads[slot] = 99

    @rule(which=Ints(0, 99), at=Ints(0, 99))
    def corrupt(self, which: int, at: int) -> None:
        files = sorted(Path(self.folder.name).glob("*.kv"))
        if files:
            path = files[which % len(files)]
            data = bytearray(path.read_bytes())
            data[at % len(data)] ^= 0x40
            path.write_bytes(data)

    @rule()
    def die(self) -> None:
        """kill -9: copies stop where they are, sequences are gone, the next worker adopts the pool."""
        self.disk.close()
        self.begin_worker()

    # What must hold

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.trie.check()
        self.host.check()
        copies = [block.id for block in self.tiers.held]
        held = [block for holder in self.holders for block in holder.blocks] + self.tiers.held
        in_use: set[int] = set()
        for block in held:  # with a block, those before it are in use
            at: Block | None = block
            while at is not None:
                in_use.add(at.id)
                at = at.parent
        assert self.trie.counts().held == len(in_use)
        refs = [block.id for holder in self.holders for block in holder.blocks] + copies
        assert sum(block.refs for block in self.trie._blocks) == len(refs)

    @invariant()
    def what_can_be_hit_is_what_was_computed(self) -> None:
        for domain, ids in self.chains:
            for number, block in enumerate(self.trie.match(ids.tobytes(), SALTS[domain], 0)):
                wanted = ids[number * SIZE : (number + 1) * SIZE] + domain * MARK
                assert (self.kv[block.id] == wanted).all()

    @invariant()
    def who_holds_a_block_finds_its_own_kv_there(self) -> None:
        for holder in self.holders:
            for number, block in enumerate(holder.blocks):
                wanted = holder.ids[number * SIZE : (number + 1) * SIZE] + holder.domain * MARK
                assert (self.kv[block.id] == wanted).all()

    def teardown(self) -> None:
        self.disk.close()
        self.folder.cleanup()
        os.close(self.pool)


TestTiers = TierMachine.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
