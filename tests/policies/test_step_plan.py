"""The step plan as a pure function of a batch: who decodes, whose chunk, in which order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from policies.costs import StepModel
from policies.request import RequestClass
from policies.step_plan import BatchView, Owed, PlanLimits, owe, peak_tokens, plan, victims

CHAT, AGENT, BATCH = RequestClass
# 18 ms to decode one sequence; 1 ms a prompt token.
MODEL = StepModel(floor_s=10e-3, row_s=1e-3, base_s=8e-3, decode_context_s=0.0, chunk_context_s=1e-9, sequence_s=0.0)
LIMITS = PlanLimits(quantum_tokens=16)


@dataclass(frozen=True)
class Row:
    cls: RequestClass = CHAT
    due: float = 1.0
    pace_s: float = 0.04
    context: int = 0
    pending: int = 1
    decoding: bool = False
    blocked: bool = False
    deadline: float = inf


def batch(*rows: Row, owed: Owed = (0.0, 0.0, 0.0)) -> BatchView:
    return BatchView(
        request_class=np.array([row.cls for row in rows], dtype=np.int64),
        due=np.array([row.due for row in rows], dtype=float),
        pace_s=np.array([row.pace_s for row in rows], dtype=float),
        context=np.array([row.context for row in rows], dtype=np.int64),
        pending=np.array([row.pending for row in rows], dtype=np.int64),
        arrived=np.arange(len(rows), dtype=float),
        deadline=np.array([row.deadline for row in rows], dtype=float),
        is_decoding=np.array([row.decoding for row in rows], dtype=bool),
        is_blocked=np.array([row.blocked for row in rows], dtype=bool),
        owed_s=owed,
    )


def chunks(view: BatchView, now: float = 0.0) -> list[tuple[int, int]]:
    return [(chunk.row, chunk.tokens) for chunk in plan(view, MODEL, now, LIMITS).chunks]


def test_the_tightest_resident_line_sizes_the_chunk() -> None:
    decode = Row(due=0.1, decoding=True, context=100)
    prompt = Row(cls=BATCH, due=inf, pace_s=inf, pending=1000)

    # 0.93 x 100 ms - 8 ms leaves 85 rows, one of them the decode's: 80 tokens in whole blocks.
    assert chunks(batch(decode, prompt)) == [(1, 80)]


def test_a_stream_far_ahead_lends_three_lines_at_most() -> None:
    decode = Row(due=9.0, decoding=True, context=100)
    prompt = Row(cls=BATCH, due=inf, pace_s=inf, pending=1000)

    assert chunks(batch(decode, prompt)) == [(1, 96)]  # 0.93 x 120 ms - 8 ms


def test_without_promises_a_step_is_as_long_as_a_step_may_be() -> None:
    decode = Row(cls=BATCH, due=inf, pace_s=inf, decoding=True, context=100)
    prompt = Row(cls=BATCH, due=inf, pace_s=inf, pending=1000)

    assert chunks(batch(decode, prompt)) == [(1, 240)]


def test_several_prompts_share_a_step() -> None:
    assert chunks(batch(Row(pending=30, due=2.0), Row(pending=40, due=1.0), Row(pending=1000, due=9.0))) == [
        (1, 40),
        (0, 30),
        (2, 160),
    ]


def test_chunks_end_where_blocks_end() -> None:
    assert chunks(batch(Row(context=5, pending=1000, due=9.0))) == [(0, 235)]


def test_a_chat_prompt_gets_a_small_chunk_even_where_residents_leave_no_time() -> None:
    tight = Row(due=0.019, pace_s=0.019, decoding=True, context=100)

    assert chunks(batch(tight, Row(pending=500))) == [(1, 20)]  # 20 ms of progress; a second block would take 32
    assert chunks(batch(tight, Row(cls=AGENT, pending=500))) == []
    assert chunks(batch(tight, Row(cls=AGENT, pending=500), owed=(0.0, 0.01, 0.0))) == [(1, 20)]


def test_what_can_still_be_in_time_goes_before_what_is_late() -> None:
    late, feasible, agent = Row(due=-9.0, pending=50), Row(due=9.0, pending=50), Row(cls=AGENT, due=9.0, pending=50)

    assert [row for row, _ in chunks(batch(late, agent, feasible))] == [2, 1, 0]


def test_a_late_prompt_ages_past_shorter_ones() -> None:
    long_ago, short = Row(due=-30.0, pending=100), Row(due=-0.1, pending=50)

    assert [row for row, _ in chunks(batch(short, long_ago))] == [1, 0]


def test_what_is_blocked_stays_out_and_the_rest_goes_on() -> None:
    chosen = plan(batch(Row(decoding=True, blocked=True), Row(decoding=True, context=9)), MODEL, 0.0, LIMITS)

    assert chosen.decodes.tolist() == [1]
    assert not len(chosen.paused)


def test_batch_decodes_pause_before_background_ones() -> None:
    slow = StepModel(0.0, 0.0, 0.0, 0.0, 0.0, sequence_s=15e-3)
    rows = (Row(decoding=True), Row(cls=AGENT, pace_s=0.15, decoding=True), Row(cls=BATCH, pace_s=inf, decoding=True))

    assert plan(batch(*rows), slow, 0.0, LIMITS).paused.tolist() == [2]
    assert plan(batch(rows[0], rows[0], rows[1], rows[2]), slow, 0.0, LIMITS).paused.tolist() == [2, 3]
    assert plan(batch(*rows, owed=(0.0, 0.0, 0.1)), slow, 0.0, LIMITS).excused == (BATCH,)


def test_an_answer_with_time_to_spare_makes_way_for_a_chat_prompt() -> None:
    chat = Row(decoding=True, context=100)
    agent = Row(cls=AGENT, due=9.0, pace_s=0.15, decoding=True, deadline=100.0)
    prompt, job = Row(pending=500), Row(cls=BATCH, due=inf, pace_s=inf, decoding=True)

    def paused(*rows: Row, now: float = 0.0, owed: Owed = (0.0, 0.0, 0.0)) -> list[int]:
        rows_paused: list[int] = plan(batch(*rows, owed=owed), MODEL, now, LIMITS).paused.tolist()
        return rows_paused

    assert paused(chat, agent, job, prompt) == [1, 2]
    assert paused(chat, agent, job) == []  # nobody needs the time
    assert paused(chat, agent, job, Row(cls=AGENT, pending=500)) == []  # nor has an agent's prompt a claim to it
    assert paused(chat, Row(cls=AGENT, due=0.2, decoding=True, deadline=100.0), prompt) == []  # its next token is due
    assert paused(chat, replace(agent, due=90.0), prompt, now=42.0) == []  # two fifths of its time are gone: from 1 on
    assert paused(chat, replace(agent, due=41.0), prompt, now=200.0) == [1]  # it is late: nothing more is lost
    assert paused(chat, agent, prompt, owed=(0.0, 0.1, 0.0)) == []  # starvation has earned it a step
    assert paused(agent, job, prompt) == [1]  # a step without any decode might find no room for the prompt


def test_an_answer_short_of_time_makes_way_where_a_chat_prompt_would_be_late_otherwise() -> None:
    chat = Row(decoding=True, context=100)
    agent = Row(cls=AGENT, due=90.0, pace_s=0.15, decoding=True, deadline=100.0)

    def paused(*prompts: Row) -> list[int]:
        rows_paused: list[int] = plan(batch(chat, agent, *prompts), MODEL, 42.0, LIMITS).paused.tolist()
        return rows_paused

    assert paused(Row(due=43.0, pending=400)) == []  # 0.4 s of work, and steps leave it more than half of the second
    assert paused(Row(due=43.0, pending=800)) == [1]
    assert paused(Row(due=43.0, pending=400), Row(due=43.1, pending=400)) == [1]  # together they are too much
    assert paused(Row(due=41.0, pending=800)) == []  # late as it is


def test_victims_are_batch_first_then_the_laxest_background_never_chat() -> None:
    view = batch(Row(), Row(cls=AGENT, due=5.0), Row(cls=AGENT, due=9.0), Row(cls=BATCH, due=inf))

    assert victims(view, CHAT, 0.0).tolist() == [3, 2, 1]
    assert victims(view, AGENT, 0.0).tolist() == [3]
    assert victims(view, BATCH, 0.0).tolist() == []


def test_waiting_earns_time_and_a_chunk_spends_it() -> None:
    tight, agent = Row(due=0.019, pace_s=0.019, decoding=True), Row(cls=AGENT, pending=500)
    starved = batch(tight, agent)
    chosen = plan(starved, MODEL, 0.0, LIMITS)
    earned = owe(chosen, starved, MODEL, 0.02, LIMITS)
    served = batch(tight, agent, owed=earned)
    spent = owe(plan(served, MODEL, 0.0, LIMITS), served, MODEL, 0.05, LIMITS)

    assert earned[AGENT] > 0.0
    assert spent[AGENT] < 0.0
    assert owe(plan(batch(tight), MODEL, 0.0, LIMITS), batch(tight), MODEL, 1.0, LIMITS) == (0.0, 0.0, 0.0)


def test_the_coming_peak_counts_those_who_will_have_ended() -> None:
    known, remaining = np.array([100.0, 50.0]), np.array([10.0, 40.0])

    # After 10 steps both have grown: 110 + 60; after 40 only the second is left with 90.
    assert peak_tokens(known, remaining) == 170.0


rows = st.builds(
    Row,
    cls=st.sampled_from(list(RequestClass)),
    due=st.one_of(st.floats(-100.0, 100.0), st.just(inf)),
    pace_s=st.one_of(st.floats(0.001, 1.0), st.just(inf)),
    context=st.integers(0, 100_000),
    pending=st.integers(1, 5000),
    decoding=st.booleans(),
    blocked=st.booleans(),
)


@given(st.lists(rows, max_size=60), st.floats(-1.0, 1.0), st.floats(-1.0, 1.0))
def test_a_plan_is_bounded_and_never_idle(given_rows: list[Row], agent_s: float, batch_s: float) -> None:
    """Each row at most once, chunks within what is pending and within the row limit; empty only if all is blocked."""
    view = batch(*given_rows, owed=(0.0, agent_s, batch_s))
    chosen = plan(view, MODEL, 0.0, LIMITS)
    chunk_rows = [chunk.row for chunk in chosen.chunks]
    used = [*chosen.decodes.tolist(), *chosen.paused.tolist(), *chunk_rows]

    assert len(used) == len(set(used))
    assert all(not given_rows[row].blocked for row in used)
    assert all(0 < chunk.tokens <= given_rows[chunk.row].pending for chunk in chosen.chunks)
    assert all(not given_rows[row].decoding for row in chunk_rows)
    assert sum(chunk.tokens for chunk in chosen.chunks) <= LIMITS.rows_max
    assert len(used) > len(chosen.paused) or all(row.blocked for row in given_rows)
    assert np.isfinite(chosen.predicted_s)
