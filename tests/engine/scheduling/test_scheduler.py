"""The scheduler in virtual time on a fake device: tokens, cache, memory, faults, aborts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fake import Fault
from engine.kv.blocks import Counts
from engine.scheduling.scheduler import SchedulerLimits
from engine.wire import Sampling
from policies.costs import StepModel
from policies.request import RequestClass
from policies.step_plan import PlanLimits
from tests.engine.rig import AGENT, BATCH, CHAT, FACTS, SIZE, VOCAB, Rig, expected, order, prompt


def test_a_request_gets_its_tokens_in_order_and_one_ending() -> None:
    rig = Rig()
    rig.submit(order(1, prompt(1, 100), max_tokens=20))
    rig.run()

    assert rig.tokens[1] == expected(prompt(1, 100), 20)
    assert (rig.ends[1].reason, rig.ends[1].output_tokens) == ("length", 20)
    assert rig.starts[1].cached_tokens == 0


def test_a_second_request_with_the_same_prefix_computes_only_the_rest() -> None:
    rig = Rig()
    shared = prompt(1, 64)
    rig.submit(order(1, np.concatenate((shared, prompt(2, 30)))))
    rig.run()
    rig.submit(order(2, np.concatenate((shared, prompt(3, 30)))))
    rig.run()

    assert rig.starts[2].cached_tokens == 64
    assert rig.tokens[2] == expected(np.concatenate((shared, prompt(3, 30))), 8)


def test_the_next_turn_finds_the_answer_of_the_last_one_in_the_cache() -> None:
    rig = Rig()
    first = prompt(1, 60)
    rig.submit(order(1, first, max_tokens=40))
    rig.run()
    second = np.concatenate((first, np.array(rig.tokens[1], dtype=np.int32), prompt(2, 10)))
    rig.submit(order(2, second))
    rig.run()

    assert rig.starts[2].cached_tokens == 96  # 99 tokens have KV (the last one sampled has none): 6 full blocks


def test_a_full_hit_runs_one_row_that_writes_nowhere() -> None:
    rig = Rig()
    rig.submit(order(1, prompt(1, 4 * SIZE), max_tokens=1))
    rig.run()
    rig.submit(order(2, prompt(1, 4 * SIZE)))
    launch = rig.step()

    assert launch is not None
    assert launch.batch.write_slots.tolist() == [-1]
    rig.run()
    assert rig.tokens[2] == expected(prompt(1, 4 * SIZE), 8)


def test_no_block_crosses_a_salt() -> None:
    rig = Rig()
    rig.submit(order(1, prompt(1, 100), salt=b"a"))
    rig.run()
    rig.submit(order(2, prompt(1, 100), salt=b"b"))
    rig.run()

    assert rig.starts[2].cached_tokens == 0


def test_in_one_step_the_first_leads_and_those_behind_it_wait_for_its_blocks() -> None:
    rig = Rig()
    rig.submit(*(order(handle, np.concatenate((prompt(1, 160), prompt(handle, 5)))) for handle in range(1, 9)))
    rig.run()

    computed = sum(int(launch.tokens[len(launch.plan.decodes) :].sum()) for launch in rig.steps)
    assert computed == 160 + 8 * 5
    assert all(rig.tokens[h] == expected(np.concatenate((prompt(1, 160), prompt(h, 5))), 8) for h in range(1, 9))


def test_siblings_of_a_prefix_that_was_computed_after_they_came_share_one_step() -> None:
    """Each was shown to the planner as all of its prompt when it came: one would fill half a step of 512 rows."""
    rig = Rig(plan_limits=PlanLimits(quantum_tokens=SIZE, rows_max=512))
    rig.submit(*(order(h, np.concatenate((prompt(1, 256), prompt(h, 16))), cls=BATCH) for h in range(1, 10)))
    rig.run()

    chunks = [len(launch.plan.chunks) for launch in rig.steps if launch.plan.chunks]
    assert chunks == [1, 8]
    assert all(rig.tokens[h] == expected(np.concatenate((prompt(1, 256), prompt(h, 16))), 8) for h in range(1, 10))


def test_equal_requests_share_the_blocks_of_their_equal_answers() -> None:
    rig = Rig()
    rig.submit(*(order(handle, prompt(1, 32), max_tokens=48) for handle in range(1, 5)))
    rig.run()

    assert len({tuple(tokens) for tokens in rig.tokens.values()}) == 1
    assert rig.trie.counts().cached == (32 + 48 - 1) // SIZE


def test_a_resumed_request_goes_on_with_the_next_token() -> None:
    rig = Rig()
    emitted = np.array(expected(prompt(1, 50), 5), dtype=np.int32)
    rig.submit(order(1, np.concatenate((prompt(1, 50), emitted)), max_tokens=12, prompt_len=50))
    rig.run()

    assert rig.tokens[1] == expected(prompt(1, 50), 12)[5:]
    assert rig.ends[1].output_tokens == 12


def test_stop_ids_end_a_request_but_not_before_its_minimum() -> None:
    third = expected(prompt(1, 50), 3)[2]
    stop, held = Rig(), Rig()
    stop.submit(order(1, prompt(1, 50), sampling=Sampling(stop_ids=(third,), max_tokens=9)))
    held.submit(order(1, prompt(1, 50), sampling=Sampling(stop_ids=(third,), max_tokens=9, min_tokens=4)))
    stop.run()
    held.run()

    assert (stop.ends[1].reason, len(stop.tokens[1])) == ("stop", 3)
    assert (held.ends[1].reason, len(held.tokens[1])) == ("length", 9)


def test_the_context_ends_what_its_budget_would_not() -> None:
    rig = Rig(blocks=8)  # 128 tokens are all the memory there is
    rig.submit(order(1, prompt(1, 100), max_tokens=500))
    rig.run()

    assert (rig.ends[1].reason, rig.ends[1].output_tokens) == ("length", 28)


@pytest.mark.parametrize("kind", ["nan", "foreign"])
def test_a_bad_row_fails_its_own_sequence_and_its_kv_is_never_hit(kind: str) -> None:
    rig = Rig(faults=(Fault(kind, 3),))
    rig.submit(order(1, prompt(1, 40)), order(2, prompt(2, 40)))
    rig.run()

    assert {handle: end.reason for handle, end in rig.ends.items()} == {1: "error", 2: "length"}
    assert rig.tokens[2] == expected(prompt(2, 40), 8)
    rig.submit(order(3, prompt(1, 40)))
    rig.run()
    assert rig.starts[3].cached_tokens == 0


REFUSED = {
    "no token": order(1, prompt(1, 0)),
    "token outside": order(1, np.array([VOCAB], dtype=np.int32)),
    "negative token": order(1, np.array([-1], dtype=np.int32)),
    "too long": order(1, prompt(1, FACTS.context_max)),
    "nothing left": order(1, prompt(1, 20), max_tokens=4, prompt_len=16),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_at_once_with_a_reason(name: str) -> None:
    rig = Rig()
    rig.submit(REFUSED[name])

    assert rig.ends[1].reason == "refused"
    assert rig.ends[1].message
    assert rig.scheduler.is_idle


def test_beyond_the_waiting_room_a_submit_is_refused() -> None:
    rig = Rig(limits=SchedulerLimits(waiting_max=2))
    rig.submit(*(order(handle, prompt(handle, 20)) for handle in range(1, 4)))

    assert list(rig.ends) == [3]
    rig.run()
    assert {rig.ends[1].reason, rig.ends[2].reason} == {"length"}


def test_a_thousand_aborts_in_every_phase_give_every_block_back() -> None:
    rig = Rig(blocks=64)
    chance = np.random.default_rng(0)
    for handle in range(1, 1001):
        cls = [CHAT, AGENT, BATCH][handle % 3]
        rig.submit(order(handle, prompt(handle % 40, int(chance.integers(1, 300))), cls=cls, max_tokens=30))
        for _ in range(int(chance.integers(0, 4))):
            rig.step()
        rig.abort(handle - int(chance.integers(0, 3)))
    for handle in range(1, 1001):
        rig.abort(handle)

    assert len(rig.ends) == 1000
    rig.scheduler.check_idle()
    rig.trie.check()


def test_an_aborted_prompt_stays_cached_for_its_retry() -> None:
    rig = Rig()
    rig.submit(order(1, prompt(1, 100), max_tokens=200))
    rig.step()
    rig.abort(1)
    rig.submit(order(2, prompt(1, 100)))
    rig.run()

    assert rig.starts[2].cached_tokens == 96


def test_memory_for_a_chat_comes_from_batch_work_which_later_goes_on_with_the_same_tokens() -> None:
    rig = Rig(blocks=24)
    rig.submit(order(1, prompt(1, 150), cls=BATCH, max_tokens=150))
    for _ in range(20):
        rig.step()
    rig.submit(order(2, prompt(2, 150), max_tokens=100))
    rig.run()

    assert rig.scheduler.load(rig.now, 0.0, 0).preemptions == 1
    assert rig.times[2][-1] < rig.times[1][-1]
    assert rig.tokens[1] == expected(prompt(1, 150), 150)
    assert rig.tokens[2] == expected(prompt(2, 150), 100)


def test_prompts_that_fill_the_memory_together_do_not_lock_each_other_out() -> None:
    rig = Rig(blocks=20)
    rig.submit(*(order(handle, prompt(handle, 180), max_tokens=120) for handle in range(1, 5)))
    rig.run()

    assert all(rig.tokens[handle] == expected(prompt(handle, 180), 120) for handle in range(1, 5))


def test_a_full_link_gets_no_tokens_and_others_go_on() -> None:
    rig = Rig()
    rig.submit(order(1, prompt(1, 30)), link=1)
    rig.submit(order(2, prompt(2, 30)), link=2)
    while rig.step(full_links=frozenset({1})):
        pass

    assert 1 not in rig.tokens
    assert rig.ends[2].reason == "length"
    rig.run()
    assert rig.tokens[1] == expected(prompt(1, 30), 8)


def test_a_dropped_link_takes_its_sequences_along() -> None:
    rig = Rig()
    rig.submit(order(1, prompt(1, 30), max_tokens=100), link=1)
    rig.submit(order(1, prompt(2, 30)), link=2)
    rig.step()
    rig.scheduler.drop_link(1, rig.now)
    rig.run()

    assert rig.ends[1].reason == "length"


def test_a_resident_goes_on_where_a_newcomer_of_its_class_finds_no_row() -> None:
    rig = Rig(blocks=20, limits=SchedulerLimits(sequences_max=1, preempt_cooldown_s=0.0))
    rig.submit(order(1, prompt(0, 144), cls=AGENT, max_tokens=2))
    rig.step()
    rig.submit(order(2, prompt(0, 175), cls=CHAT, max_tokens=3, salt=b"a"))  # preempts the first
    for _ in range(4):
        rig.step()
    rig.submit(order(3, prompt(0, 1), cls=AGENT, max_tokens=1))  # its line is earlier than the first's next one
    rig.run()

    assert [rig.ends[handle].reason for handle in (1, 2, 3)] == ["length"] * 3


@settings(max_examples=60, deadline=None)
@given(
    work=st.lists(
        st.tuples(
            st.integers(0, 4),  # which prompt
            st.integers(1, 260),  # how much of it
            st.sampled_from([CHAT, AGENT, BATCH]),
            st.integers(1, 60),  # output
            st.sampled_from([b"", b"a"]),
            st.integers(0, 6),  # steps before the next arrival
            st.sampled_from([0, 0, 0, 3]),  # abort after so many of those; 0: never
        ),
        min_size=1,
        max_size=14,
    ),
    blocks=st.integers(20, 60),
    residents=st.integers(1, 6),
    ahead=st.integers(0, 1),
)
def test_whatever_shares_preempts_or_aborts_nobody_sees_a_wrong_token(
    work: list[tuple[int, int, int, int, bytes, int, int]], blocks: int, residents: int, ahead: int
) -> None:
    """Tokens depend on the prompt alone: not on caching, chunking, company, preemption or the aborts of others."""
    rig = Rig(blocks=blocks, limits=SchedulerLimits(residents, preempt_cooldown_s=0.0, ahead_tokens=ahead))
    prompts = {}
    for handle, (seed, size, cls, output, salt, steps, abort_after) in enumerate(work, start=1):
        prompts[handle] = prompt(seed, 260)[:size]
        rig.submit(order(handle, prompts[handle], cls=RequestClass(cls), max_tokens=output, salt=salt))
        for number in range(steps):
            rig.step()
            rig.trie.check()
            if number + 1 == abort_after:
                rig.abort(handle)
    rig.run()

    for handle, ids in prompts.items():
        tokens = rig.tokens.get(handle, [])
        assert tokens == expected(ids, len(tokens))
        assert rig.ends[handle].reason == "abort" or len(tokens) == work[handle - 1][3]


def test_what_was_adopted_before_a_pending_block_stays_adopted() -> None:
    rig = Rig(speed=StepModel(0.0, 0.25 / 64, 0.0, 0.0, 0.0, 0.0, version=1))  # 64 tokens fill a step
    ids = prompt(1, 160)
    rig.submit(order(1, ids, cls=AGENT))
    rig.step()
    rig.submit(order(2, ids))  # overtakes with the same prompt, and leaves room for the first beside its last chunk
    rig.run()
    assert rig.tokens[1] == rig.tokens[2] == expected(ids, 8)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_block_is_reserved_a_step_ahead_where_there_is_room(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, batches = Rig(limits=SchedulerLimits(ahead_tokens=ahead)), []
    run = rig.runner.run
    monkeypatch.setattr(rig.runner, "run", lambda batch: batches.append(batch) or run(batch))
    rig.submit(*(order(handle, prompt(handle, 20 + handle), max_tokens=24) for handle in range(2)))
    rig.run()

    decodes = [batch for batch in batches if (np.diff(batch.row_starts) == 1).all()]
    beyond = [int((batch.room - batch.contexts).min()) for batch in decodes]
    assert min(beyond) == ahead
    assert all(rig.tokens[handle] == expected(prompt(handle, 20 + handle), 24) for handle in range(2))


def test_a_leak_is_mended_and_counted_in_production_and_a_failure_in_a_test() -> None:
    rig = Rig()
    rig.submit(order(1, prompt(1, 64)))
    rig.run()
    leaked = rig.trie.take(3, rig.now)
    assert leaked
    with pytest.raises(AssertionError, match="held by nobody"):
        rig.scheduler.check_idle()
    rig.scheduler._is_strict = False
    rig.scheduler.check_idle()
    assert rig.scheduler.load(0.0, 0.0, 0).repairs == 1
    assert rig.trie.counts() == Counts(free=256, cached=0, held=0)
    rig.trie.check()
    stored, evicted = rig.tiers.take_events()
    assert (len(stored), len(evicted)) == (0, 4 * 16)
    rig.submit(order(2, prompt(1, 64)))
    rig.run()
    assert rig.tokens[2] == expected(prompt(1, 64), 8)


def test_a_step_says_what_of_the_next_one_is_known() -> None:
    rig = Rig(limits=SchedulerLimits(ahead_tokens=1), plan_limits=PlanLimits(quantum_tokens=SIZE, rows_max=40))
    rig.submit(order(1, prompt(1, 2 * SIZE), max_tokens=3), order(2, prompt(2, 2 * SIZE), max_tokens=2))
    said = []
    while (launch := rig.scheduler.launch(rig.speed, rig.now)) is not None:
        batch = launch.batch
        said.append((len(batch.contexts), batch.ends_prompts, batch.is_last))
        assert (batch.room > batch.contexts)[np.diff(batch.row_starts) == 1].all()
        if batch.ends_prompts and not batch.is_last:
            assert (batch.room > batch.contexts).all()  # a block is there for the row that may be computed ahead
        rig.scheduler.collect(launch, rig.runner.run(batch), rig.speed, rig.now)

    # Two prompts of which one has to wait for its second half; a decode beside that; the last tokens of both.
    assert [ends for _, ends, _ in said] == [False, True, True]
    assert [is_last for *_, is_last in said] == [False, False, True]
