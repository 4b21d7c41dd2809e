"""Hints: a session's KV is kept, let go, moved down, fetched or outranked, and the answer says what was done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.kv.copies import Hands, Inline
from engine.kv.pool import EXTENT_SLOTS, PoolWriter
from engine.scheduling.hints import HintLimits, Hints
from engine.wire import Hint, HintAck, HintAction
from policies.retention import Band
from tests.engine.later import Later
from tests.engine.rig import AGENT, CHAT, FAKE_SPEED, SIZE, Rig, expected, order, pool_of, prompt

PROMPT = prompt(1, 10 * SIZE)
ANSWERED = 10  # full blocks of PROMPT and an answer of 8 tokens


def rig_with_pool(blocks: int = 40, **options: Any) -> Rig:
    return Rig(blocks=blocks, host=PoolWriter(pool_of(4 * EXTENT_SLOTS), 4), **options)


def serve(rig: Rig, handle: int, ids: Any, session: str = "s", **options: Any) -> None:
    rig.submit(order(handle, ids, session=session, **options))
    rig.run()


def push_out(rig: Rig) -> None:
    for number in range(1000, 1000 + rig.blocks // 8):
        serve(rig, number, prompt(number, 16 * SIZE), session="")


def hint(rig: Rig, verb: str, session: str = "s", salt: bytes = b"", ttl_s: float = 0.0) -> tuple[str, int]:
    """The answer, which a prefetch gives when its copies have ended."""
    asked = Hint("m", [HintAction("a", verb, salt, session, ttl_s)])
    acks = rig.scheduler.hints.obey(7, asked, FAKE_SPEED, rig.now)
    rig.tiers.poll(rig.now)
    ((link, ack),) = acks or rig.scheduler.hints.arrived()
    assert (link, ack.message_id, ack.action_id) == (7, "m", "a")
    return ack.status, ack.blocks


def on_device(rig: Rig, ids: Any = PROMPT) -> int:
    return len(rig.trie.match(ids.tobytes(), b"", 0))


def test_retain_outlives_the_pressure_that_would_have_evicted() -> None:
    rig, other = rig_with_pool(blocks=60), prompt(2, 10 * SIZE)
    serve(rig, 1, PROMPT, cls=AGENT)
    serve(rig, 2, other, session="t", cls=AGENT)
    assert hint(rig, "retain", ttl_s=200.0) == ("done", ANSWERED)
    rig.now += 100.0  # the ordinary leases have ended
    taken = rig.trie.take(50, rig.now) or []
    assert (on_device(rig), on_device(rig, other)) == (10, 0)
    rig.trie.release(taken, Band.EXPIRED, 0.0, rig.now)


def test_a_retained_block_still_never_blocks_an_allocation() -> None:
    rig = rig_with_pool()
    serve(rig, 1, PROMPT)
    hint(rig, "retain", ttl_s=200.0)
    serve(rig, 2, prompt(2, 38 * SIZE))
    assert rig.tokens[2] == expected(prompt(2, 38 * SIZE), 8)


def test_a_lease_is_no_longer_than_the_bound() -> None:
    rig = rig_with_pool()
    serve(rig, 1, PROMPT)
    hint(rig, "retain", ttl_s=1e9)
    found = rig.trie.match(PROMPT.tobytes(), b"", 0)
    assert all(block.lease_until == rig.now + HintLimits().lease_s_max for block in found)


def test_release_takes_the_lease_back() -> None:
    rig = rig_with_pool()
    serve(rig, 1, PROMPT)
    hint(rig, "retain", ttl_s=200.0)
    assert hint(rig, "release") == ("done", ANSWERED)
    assert all(block.lease_until <= rig.now for block in rig.trie.match(PROMPT.tobytes(), b"", 0))
    assert hint(rig, "release") == ("nothing", 0)


def test_demote_frees_the_device_and_the_pool_still_serves() -> None:
    rig = rig_with_pool()
    serve(rig, 1, PROMPT)
    free = rig.trie.counts().free
    assert hint(rig, "demote") == ("done", ANSWERED)
    assert rig.trie.counts().free == free + ANSWERED
    serve(rig, 2, PROMPT)
    assert rig.starts[2].cached_tokens == 10 * SIZE


def test_demote_never_drops_the_last_copy_nor_what_is_in_use() -> None:
    rig = Rig()
    serve(rig, 1, PROMPT)
    assert hint(rig, "demote") == ("nothing", 0)  # there is no pool
    rig = rig_with_pool()
    serve(rig, 1, PROMPT)
    rig.submit(order(2, PROMPT[: 4 * SIZE + 1], max_tokens=30))
    rig.step()
    assert hint(rig, "demote") == ("partial", 6)
    assert on_device(rig) == 4
    rig.run()


def test_prefetch_brings_a_session_back_before_it_asks() -> None:
    rig = rig_with_pool()
    serve(rig, 1, PROMPT)
    push_out(rig)
    assert on_device(rig) == 0
    assert hint(rig, "prefetch") == ("done", ANSWERED)
    assert on_device(rig) == 10
    assert hint(rig, "prefetch") == ("nothing", 0)
    steps = len(rig.steps)
    serve(rig, 2, PROMPT)
    assert rig.starts[2].cached_tokens == 10 * SIZE
    assert len(rig.steps) == steps + 8  # no step waited for a copy


def test_a_prefetch_is_answered_when_its_copies_have_ended() -> None:
    later = Later()
    rig = rig_with_pool(hands=Hands(Inline(), later))
    serve(rig, 1, PROMPT)
    push_out(rig)
    asked = Hint("m", [HintAction("a", "prefetch", b"", "s")])
    assert rig.scheduler.hints.obey(7, asked, FAKE_SPEED, rig.now) == []
    assert rig.scheduler.hints.arrived() == []
    later.run()
    rig.tiers.poll(rig.now)
    assert rig.scheduler.hints.arrived() == [(7, HintAck("m", "a", "done", ANSWERED))]


def test_a_prefetch_takes_no_room_from_the_blocks_that_it_continues() -> None:
    """What is left of the session is all that could be evicted: there is no room behind it."""
    rig = rig_with_pool(blocks=20)
    serve(rig, 1, PROMPT)
    taken = rig.trie.take(15, rig.now) or []
    assert on_device(rig) == rig.trie.available == 5
    assert hint(rig, "prefetch") == ("nothing", 0)
    rig.trie.release(taken[:3], Band.EXPIRED, 0.0, rig.now)
    assert hint(rig, "prefetch") == ("done", 3)
    rig.trie.release(taken[3:], Band.EXPIRED, 0.0, rig.now)
    assert on_device(rig) == 8


def test_supersede_gives_up_the_older_branchs_own_tail_and_keeps_what_both_share() -> None:
    rig = rig_with_pool(blocks=100)
    old = np.concatenate((PROMPT[: 6 * SIZE], prompt(2, 4 * SIZE)))
    new = np.concatenate((PROMPT[: 6 * SIZE], prompt(3, 4 * SIZE)))
    serve(rig, 1, old, cls=CHAT)
    serve(rig, 2, new, cls=CHAT)
    assert hint(rig, "supersede") == ("done", 4)
    bands = [block.band for block in rig.trie.match(old.tobytes(), b"", 0)]
    assert bands == [Band.CHATBOT] * 6 + [Band.EXPIRED] * 4
    assert all(block.band == Band.CHATBOT for block in rig.trie.match(new.tobytes(), b"", 0))
    assert rig.host is not None
    assert set(list(rig.host.slot_of)[:4]) == {block.key for block in rig.trie.match(old.tobytes(), b"", 0)[6:]}
    assert hint(rig, "supersede") == ("nothing", 0)


def test_a_turn_that_continues_the_last_one_is_no_second_branch() -> None:
    rig = rig_with_pool(blocks=100)
    serve(rig, 1, PROMPT)
    longer = np.concatenate((PROMPT, np.array(rig.tokens[1], dtype=np.int32), prompt(4, 2 * SIZE)))
    serve(rig, 2, longer)
    assert hint(rig, "supersede") == ("nothing", 0)


@pytest.mark.parametrize(("verb", "session", "salt"), [("retain", "other", b""), ("demote", "s", b"stranger")])
def test_an_unknown_session_and_a_strangers_are_the_same(verb: str, session: str, salt: bytes) -> None:
    rig = rig_with_pool()
    serve(rig, 1, PROMPT)
    assert hint(rig, verb, session, salt) == ("unknown", 0)


def test_an_unknown_verb_is_said_to_be_one() -> None:
    rig = rig_with_pool()
    serve(rig, 1, PROMPT)
    assert hint(rig, "pin") == ("unsupported", 0)


def test_sessions_are_remembered_within_their_bytes_and_branches() -> None:
    rig = rig_with_pool(blocks=100)
    rig.scheduler.hints = Hints(rig.trie, rig.tiers, HintLimits(session_bytes_max=1200, branches_max=2))
    serve(rig, 1, prompt(1, 6 * SIZE), session="a")
    serve(rig, 2, prompt(2, 6 * SIZE), session="b")
    assert hint(rig, "retain", "a", ttl_s=1.0)[0] == "done"
    serve(rig, 3, prompt(3, 6 * SIZE), session="b")
    assert hint(rig, "retain", "a", ttl_s=1.0)[0] == "unknown"
    serve(rig, 4, prompt(4, 6 * SIZE), session="b")
    assert hint(rig, "supersede", "b") == ("done", 6)  # of three branches two were remembered
