"""Which rows wait for which: a session's turns, sub-agents and their callers, and what a failure costs."""

from __future__ import annotations

import pytest

from loadgen.sim.turns import Turns
from loadgen.traces import Header, Row, Trace
from tests.loadgen.sim.small import SMALL, world

TOKENS = {"input_length": 64, "output_length": 4}
FAMILY = (
    Row(timestamp=1000.0, session_id="s", **TOKENS),
    Row(delay=500.0, session_id="s/a", parent="s", after=["s#0"], **TOKENS),
    Row(delay=250.0, session_id="s/a", parent="s", **TOKENS),
    Row(delay=100.0, session_id="s", after=["s/a#1"], **TOKENS),
)


def test_a_sub_agent_waits_for_its_caller_and_its_caller_for_it() -> None:
    turns = Turns(Trace(Header(block_size=16), FAMILY))
    assert turns.roots(2.0) == [(0.5, 0)]
    assert turns.number == [0, 0, 1, 1]
    assert list(turns.ended(0)) == [1]  # the caller's next turn waits for the sub-agent, too
    assert list(turns.ended(1)) == [2]
    assert list(turns.ended(2)) == [3]


def test_a_turn_calls_a_tool_if_the_sessions_next_one_comes_back_from_it() -> None:
    gaps = ("none", "tool", "human", "tool")
    rows = tuple(Row(delay=1.0, session_id="s", gap=gap, **TOKENS) for gap in gaps)  # type: ignore[arg-type]
    assert Turns(Trace(Header(block_size=16), rows)).calls_tool == [True, False, True, False]


def test_a_failure_costs_all_who_wait_for_it_once_and_only_within_the_time() -> None:
    turns = Turns(Trace(Header(block_size=16), FAMILY))
    assert sorted(turns.lost(0, 1.0, until_s=10.0)) == [1, 2, 3]
    assert list(turns.ended(2)) == []  # row 3 is not offered any more
    assert list(Turns(Trace(Header(block_size=16), FAMILY)).lost(1, 1.0, until_s=1.3)) == [2]


def test_simulated_sub_agents_start_after_their_callers_turn_and_share_its_blocks() -> None:
    header = Header(block_size=16, hash_scope="local")
    rows = tuple(
        Row(
            timestamp=row.timestamp,
            delay=row.delay,
            session_id=row.session_id,
            parent=row.parent,
            after=row.after,
            input_length=64,
            output_length=4,
            hash_ids=[1, 2, 3, 4],
        )
        for row in FAMILY
    )
    records = {record.row: record for record in world(Trace(header, rows), profiles=(SMALL,)).run()}
    assert records[1].intended_s == pytest.approx((records[0].end_s or 0.0) + 0.5)
    assert records[3].intended_s == pytest.approx((records[2].end_s or 0.0) + 0.1)
    assert records[1].parent == "s"
    assert records[1].cached_tokens == 64
