"""The two indexes: who holds a prefix, and what an ideal cache would hold."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from policies.chain import FEW, KEY_BYTES, sample
from policies.prefix_index import PrefixIndex, SeenIndex
from tests.policies.scenes import chain


def test_each_worker_hits_as_far_as_its_own_prefix_goes() -> None:
    index, keys = PrefixIndex(100), sample(chain("a", 40), 1)
    index.add(0, keys.sampled()[:7])
    index.add(2, keys.sampled()[:40])
    index.add(3, keys.sampled()[:7])
    assert index.hit_blocks(keys, 4).tolist() == [7.0, 0.0, 40.0, 7.0]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 50))
def test_bisection_finds_what_walking_would(held: list[int], length: int) -> None:
    """Law: for prefix-closed workers the hit is the shorter of what they hold and what is asked."""
    index, keys = PrefixIndex(1_000), sample(chain("a", 50), 1).sampled()
    for slot, blocks in enumerate(held):
        index.add(slot, keys[:blocks])
    asked = sample(b"".join(keys[:length]), 1)
    assert index.hit_blocks(asked, len(held)).tolist() == [min(blocks, length) for blocks in held]


def test_an_evicted_tail_shortens_the_hit_and_a_lost_worker_holds_nothing() -> None:
    index, keys = PrefixIndex(100), sample(chain("a", 10), 1)
    for slot in (0, 1):
        index.add(slot, keys.sampled())
    index.remove(0, keys.sampled()[4:])
    index.remove_worker(1)
    assert index.hit_blocks(keys, 2).tolist() == [4.0, 0.0]
    assert len(index) == 4


def test_nodes_of_a_worker_are_bounded_oldest_first_out() -> None:
    index = PrefixIndex(nodes_per_worker=8)
    for name in "abcdef":
        index.add(0, sample(chain(name, 4), 1).sampled())
    assert len(index) == 8
    assert index.hit_blocks(sample(chain("a", 4), 1), 1)[0] == 0
    assert index.hit_blocks(sample(chain("f", 4), 1), 1)[0] == 4


@given(st.integers(0, 3 * FEW), st.sampled_from([1, 2, 4, 8]))
def test_a_frame_and_a_prompt_agree_on_the_sample(blocks: int, every: int) -> None:
    """Law: a key is kept or not by itself, wherever it stands."""
    keys = chain("a", blocks)
    alone = [
        key for at in range(blocks) for key in sample(keys[at * KEY_BYTES : (at + 1) * KEY_BYTES], every).sampled()
    ]
    assert sample(keys, every).sampled() == alone


def test_a_sampled_index_never_promises_more_than_is_held() -> None:
    index, keys = PrefixIndex(1_000), chain("a", 200)
    index.add(0, sample(keys[: 100 * KEY_BYTES], 4).sampled())
    hit = float(index.hit_blocks(sample(keys, 4), 1)[0])
    assert 80 <= hit <= 100


def test_new_tokens_are_those_beyond_what_was_sent_or_received_within_the_hour() -> None:
    seen, keys = SeenIndex(1_000), chain("a", 30)
    assert seen.blocks_seen(sample(keys[: 10 * KEY_BYTES], 1), 0.0) == 0
    seen.note(sample(keys[10 * KEY_BYTES : 12 * KEY_BYTES], 1).sampled(), 5.0)  # the answer, as the worker stored it
    assert seen.blocks_seen(sample(keys, 1), 60.0) == 12
    assert seen.blocks_seen(sample(keys, 1), 70.0) == 30


def test_what_nobody_sent_for_an_hour_is_new_again_and_what_was_resent_is_not() -> None:
    seen, kept, dropped = SeenIndex(1_000), sample(chain("a", 10), 1), sample(chain("b", 10), 1)
    seen.blocks_seen(dropped, 0.0)
    said = [seen.blocks_seen(kept, minute * 60.0) for minute in range(0, 100, 10)]
    assert said == [0] + [10] * 9
    assert seen.blocks_seen(dropped, 6_000.0) == 0


def test_the_ideal_cache_is_bounded() -> None:
    seen = SeenIndex(keys_max=20)
    for number in range(200):
        seen.blocks_seen(sample(chain(str(number), 10), 1), number)
    assert len(seen) <= SeenIndex.GENERATIONS * (20 + 10)  # a generation closes after the chain that fills it


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(0, 600)), max_size=30))
def test_the_ideal_cache_agrees_with_a_plain_book(turns: list[tuple[str, int, int]]) -> None:
    """Law: within its hour, blocks seen are the longest common prefix with anything sent before."""
    seen, book, now = SeenIndex(10_000), {"a": 0, "b": 0, "c": 0}, 0.0
    for name, blocks, gap_s in turns:
        now += min(gap_s, 3_000.0 / len(turns))
        assert seen.blocks_seen(sample(chain(name, blocks), 1), now) == min(book[name], blocks)
        book[name] = max(book[name], blocks)


def test_slots_beyond_64_fit_the_bitset() -> None:
    index, keys = PrefixIndex(100), sample(chain("a", 3), 1)
    index.add(200, keys.sampled())
    assert np.flatnonzero(index.hit_blocks(keys, 256)).tolist() == [200]
