"""The block trie: conservation, salt walls, no use after free, eviction order, events."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.kv import keys
from engine.kv.blocks import Block, BlockTrie, Reach
from policies.retention import Band

SIZE = 4
ROOT = keys.root("model")


def ids(*blocks: int) -> bytes:
    """So many blocks, each of one repeated token."""
    return np.repeat(np.array(blocks, dtype=np.int32), SIZE).tobytes()


def fill(trie: BlockTrie, tokens: bytes, salt: bytes = b"", now: float = 0.0) -> list[Block]:
    """Compute and publish a chain that nobody had; still held."""
    blocks = trie.take(len(tokens) // (SIZE * 4), now)
    assert blocks is not None
    parent = None
    for number, block in enumerate(blocks):
        piece = tokens[number * SIZE * 4 : (number + 1) * SIZE * 4]
        parent = trie.publish(block, parent, piece, salt if number == 0 else b"")
    trie.commit()
    return blocks


def test_a_prefix_is_found_by_its_tokens_and_only_behind_the_same_parent() -> None:
    trie = BlockTrie(8, SIZE, ROOT)
    chain = fill(trie, ids(1, 2, 3))

    assert trie.match(ids(1, 2, 3, 4), b"", 0) == chain
    assert trie.match(ids(1, 2, 9), b"", 0) == chain[:2]
    assert trie.match(ids(2, 3), b"", 0) == []


def test_a_salt_walls_off_everything_behind_it() -> None:
    trie = BlockTrie(8, SIZE, ROOT)
    chain = fill(trie, ids(1, 2), salt=b"mine")

    assert trie.match(ids(1, 2), b"mine", 0) == chain
    assert trie.match(ids(1, 2), b"yours", 0) == []
    assert trie.match(ids(1, 2), b"", 0) == []


def test_keys_are_those_of_the_chain_that_the_router_makes() -> None:
    trie = BlockTrie(8, SIZE, ROOT)
    fill(trie, ids(1, 2, 3), salt=b"s")

    assert trie.take_events()[0] == keys.chain(ROOT, np.frombuffer(ids(1, 2, 3), dtype=np.int32), SIZE, b"s")


def test_a_reach_goes_on_where_it_ended_and_no_further_than_a_match() -> None:
    trie = BlockTrie(16, SIZE, ROOT)
    wanted = np.frombuffer(ids(1, 2, 3, 4), dtype=np.int32)
    first = fill(trie, ids(1, 2), salt=b"mine")
    begun = trie.reach(wanted, b"mine", 0, Reach())

    assert begun == Reach(2, first[-1].serial)
    assert trie.reach(wanted, b"yours", 0, Reach()) == Reach()
    assert trie.reach(wanted, b"mine", 0, begun) == begun

    longer = trie.take(1, 0.0) or []
    trie.publish(longer[0], first[-1], ids(3))
    assert trie.reach(wanted, b"mine", 0, begun) == Reach(3, longer[0].serial)
    assert trie.reach(wanted, b"mine", 0, Reach()) == Reach(3, longer[0].serial)


def test_what_a_step_still_writes_is_neither_told_nor_readable() -> None:
    trie = BlockTrie(8, SIZE, ROOT)
    (block,) = trie.take(1, 0.0) or []
    trie.publish(block, None, ids(1))

    assert trie.match(ids(1), b"", 0)[0].is_pending
    assert trie.take_events() == (b"", b"")
    assert trie.resident_keys() == b""


def test_the_second_to_publish_the_same_tokens_gets_the_first_ones_block() -> None:
    trie = BlockTrie(8, SIZE, ROOT)
    (first,) = fill(trie, ids(1))
    (second,) = trie.take(1, 0.0) or []

    assert trie.publish(second, None, ids(1)) is first
    assert second.edge is None


def test_eviction_goes_by_band_then_age_and_takes_tails_before_heads() -> None:
    trie = BlockTrie(4, SIZE, ROOT)
    old_chat, batch = fill(trie, ids(1, 2)), fill(trie, ids(3, 4))
    trie.release(old_chat, Band.CHATBOT, 0.0, now=1.0)
    trie.release(batch, Band.DATA_PROCESSOR, 0.0, now=2.0)

    taken = [(trie.take(1, 3.0) or [])[0].id for _ in range(4)]
    assert taken == [batch[1].id, batch[0].id, old_chat[1].id, old_chat[0].id]


def test_a_lease_outranks_every_band_until_it_ends_and_never_blocks_an_allocation() -> None:
    trie = BlockTrie(2, SIZE, ROOT)
    leased, chat = fill(trie, ids(1)), fill(trie, ids(2))
    trie.release(leased, Band.EXPIRED, 10.0, now=0.0)
    trie.release(chat, Band.CHATBOT, 0.0, now=1.0)

    assert trie.take(1, 5.0) == chat
    assert trie.take(1, 5.0) == leased


def test_an_ended_lease_counts_no_more() -> None:
    trie = BlockTrie(2, SIZE, ROOT)
    leased, chat = fill(trie, ids(1)), fill(trie, ids(2))
    trie.release(leased, Band.EXPIRED, 10.0, now=0.0)
    trie.release(chat, Band.CHATBOT, 0.0, now=1.0)

    assert trie.take(1, 11.0) == leased


def test_a_prefix_that_chat_continues_stays_in_its_band_when_a_batch_item_leaves() -> None:
    trie = BlockTrie(3, SIZE, ROOT)
    head, chat = fill(trie, ids(1, 2))
    trie.release([head, chat], Band.CHATBOT, 0.0, now=0.0)
    trie.hold([head])
    (tail,) = trie.take(1, 1.0) or []
    trie.publish(tail, head, ids(3))
    trie.commit()
    trie.release([head, tail], Band.DATA_PROCESSOR, 0.0, now=2.0)

    assert trie.take(1, 3.0) == [tail]
    assert trie.take(1, 3.0) == [chat]


def test_what_is_forgotten_is_found_no_more_and_neither_is_what_is_behind_it() -> None:
    trie = BlockTrie(4, SIZE, ROOT)
    chain = fill(trie, ids(1, 2, 3))
    trie.release(chain, Band.CHATBOT, 0.0, now=0.0)
    trie.forget([chain[1]], 0.0)

    assert trie.match(ids(1, 2, 3), b"", 0) == chain[:1]
    assert trie.counts().free == 3
    trie.check()


class TrieMachine(RuleBasedStateMachine):
    """Whatever happens, free + cached + held == total, no chain crosses a salt, and no held block is given away."""

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.trie = BlockTrie(total, SIZE, ROOT)
        self.now = 0.0
        self.held: list[tuple[list[Block], bytes]] = []  # what sequences hold, and their salt
        self.content: dict[int, tuple[bytes, bytes]] = {}  # block id -> (salt, all tokens up to its end)
        self.known: set[bytes] = set()  # what a router would believe

    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=5),
        salt=st.sampled_from([b"", b"a", b"b"]),
    )
    def run(self, tokens: list[int], salt: bytes) -> None:
        data = ids(*tokens)
        found = self.trie.match(data, salt, 0)
        for number, block in enumerate(found):
            assert self.content[block.id] == (salt, data[: (number + 1) * SIZE * 4])
        self.trie.hold(found)
        fresh = self.trie.take(len(tokens) - len(found), self.now)
        if fresh is None:
            self.trie.release(found, Band.CHATBOT, 0.0, self.now)
            return
        others = {block.id for blocks, _ in self.held for block in blocks} | {block.id for block in found}
        assert others.isdisjoint(block.id for block in fresh)
        parent = found[-1] if found else None
        for number, block in enumerate(fresh, start=len(found)):
            self.content[block.id] = (salt, data[: (number + 1) * SIZE * 4])
            piece = data[number * SIZE * 4 : (number + 1) * SIZE * 4]
            parent = self.trie.publish(block, parent, piece, salt if number == 0 else b"")
            assert parent is block
        self.trie.commit()
        self.held.append((found + fresh, salt))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), band=st.sampled_from(list(Band)[:4]), lease_s=st.sampled_from([0.0, 1.0, 40.0]))
    def end(self, data: st.DataObject, band: Band, lease_s: float) -> None:
        blocks, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.trie.release(blocks, band, lease_s, self.now)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def doubt(self, data: st.DataObject) -> None:
        blocks, _ = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        self.trie.forget(blocks, 0.0)

    @rule(seconds=st.sampled_from([0.5, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tell(self) -> None:
        stored, evicted = map(keys.split, self.trie.take_events())
        assert set(stored).isdisjoint(evicted)
        self.known = (self.known | set(stored)) - set(evicted)
        assert self.known == set(keys.split(self.trie.resident_keys()))

    @invariant()
    def is_conserved(self) -> None:
        self.trie.check()
        assert self.trie.counts().held == len({block.id for blocks, _ in self.held for block in blocks})


TrieMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTrie = TrieMachine.TestCase
