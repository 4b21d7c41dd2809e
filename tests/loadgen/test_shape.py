"""A trace is made smaller or mixed by whole sessions; blocks of two sources never become one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadgen import shape
from loadgen.traces import Header, Row, Trace, TraceError, ideal_cached


def session(name: str, at_ms: float, *, parent: str = "") -> list[Row]:
    first = Row(timestamp=at_ms, session_id=name, parent=parent, input_length=32, output_length=1, hash_ids=[1, 2])
    later = Row(delay=90_000, session_id=name, parent=parent, input_length=48, output_length=1, hash_ids=[1, 2, 3])
    return [first, later]


def trace(count: int = 40, size: int = 16) -> Trace:
    rows = [row for number in range(count) for row in session(f"s{number}", 3000.0 * number)]
    return Trace(Header(block_size=size), tuple(rows))


def test_a_sample_keeps_whole_sessions() -> None:
    found = shape.sample(trace(), 0.5, seed=1)
    kept = {row.session_id for row in found.rows}
    assert 8 < len(kept) < 32
    assert len(found.rows) == 2 * len(kept)
    assert shape.sample(trace(), 0.5, seed=1) == found


def test_a_sample_of_nothing_is_an_error() -> None:
    with pytest.raises(TraceError, match="empty"):
        shape.sample(trace(), 0.0, seed=1)


def test_jitter_moves_first_turns_within_the_step_and_no_other() -> None:
    before, after = trace(), shape.jitter(trace(), 3.0, seed=1)
    moved = {row.session_id: row.timestamp for row in after.rows if row.timestamp is not None}
    for row in before.rows:
        if row.timestamp is not None:
            assert row.timestamp <= moved[row.session_id] <= row.timestamp + 3000
    assert [row.delay for row in after.rows if row.delay] == [row.delay for row in before.rows if row.delay]
    assert len({value % 3000 for value in moved.values()}) > 30


def test_a_gap_is_capped_and_the_header_says_how_many_were() -> None:
    found = shape.cap_gap(trace(3), 60.0)
    assert {row.delay for row in found.rows} == {None, 60_000.0}
    assert found.header.notes == {"gap_cap_s": 60.0, "gaps_capped": 3}


def test_users_are_drawn_by_session_the_first_most_often_and_own_ones_kept() -> None:
    found = shape.with_users(trace(400), 12, seed=1)
    by_session = {row.session_id: row.user for row in found.rows}
    assert all(by_session[row.session_id] == row.user for row in found.rows)
    assert list(by_session.values()).count("user-01") == pytest.approx(0.32 * 400, rel=0.25)
    named = replace(trace(1), rows=(Row(timestamp=0, user="me", input_length=1, output_length=1),))
    assert shape.with_users(named, 12, seed=1).rows[0].user == "me"


def test_an_overlay_shares_no_blocks_sessions_or_callers() -> None:
    agent = Row(delay=0, session_id="s0/a", parent="s0", after=["s0#0"], input_length=16, output_length=1)
    one = trace(1)
    two = replace(one, rows=(*one.rows, agent))
    both = shape.overlay([one, two])
    assert {row.session_id for row in both.rows} == {"0/s0", "1/s0", "1/s0/a"}
    assert next(row for row in both.rows if row.parent).after == ["1/s0#0"]
    assert sum(ideal_cached(both)) == sum(ideal_cached(one)) + sum(ideal_cached(two))


def test_an_overlay_lasts_as_long_as_the_longest_where_all_say_how_long_they_are() -> None:
    def lasting(**notes: float) -> Trace:
        return Trace(Header(notes=dict(notes)), (Row(timestamp=0, input_length=1, output_length=1),))

    assert shape.overlay([lasting(duration_s=5.0), lasting(duration_s=9.0)]).header.notes == {"duration_s": 9.0}
    assert shape.overlay([lasting(duration_s=5.0), lasting()]).header.notes == {}


def test_an_overlay_of_two_block_sizes_is_refused() -> None:
    with pytest.raises(TraceError, match="blocks of 16 and 64 tokens"):
        shape.overlay(
            [
                trace(1),
                Trace(Header(block_size=64), (Row(timestamp=0, input_length=64, output_length=1, hash_ids=[1]),)),
            ]
        )


def test_a_local_trace_keeps_its_hit_when_its_ids_become_global() -> None:
    local = replace(trace(5), header=Header(block_size=16, hash_scope="local"))
    rows = [replace_ids(row, ids) for row, ids in zip(local.rows, shape.global_ids(local), strict=True)]
    assert ideal_cached(Trace(Header(block_size=16), tuple(rows))) == ideal_cached(local)


def replace_ids(row: Row, ids: list[int]) -> Row:
    return Row(**{name: getattr(row, name) for name in row.__struct_fields__} | {"hash_ids": ids})
