"""Composed traces: all three classes from a seed, and scaling that keeps what prefix caches can do."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.compose import Mix, compose, drop_over_context, scale
from loadgen.traces import CLASSES, Header, Row, Trace, encode, ideal_cached, nominal_starts_s, read, write

DURATION_S = 100.0


def composed(seed: int = 1) -> Trace:
    return compose(Mix(), seed, DURATION_S)


def of_session(trace: Trace, name: str) -> list[Row]:
    return [row for row in trace.rows if row.session_id == name]


def ideal_hit(trace: Trace) -> float:
    return sum(ideal_cached(trace)) / sum(row.input_length for row in trace.rows)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    assert encode(composed(7)) == encode(composed(7))
    assert encode(composed(7)) != encode(composed(8))


def test_a_short_trace_already_has_all_three_classes_within_its_duration() -> None:
    trace = composed()
    assert {row.request_class for row in trace.rows} == set(CLASSES)
    assert 0 <= min(nominal_starts_s(trace.rows)) <= max(nominal_starts_s(trace.rows)) <= DURATION_S


@pytest.mark.parametrize("seed", range(1, 9))
def test_few_arrivals_are_spread_and_leave_no_idle_hole(seed: int) -> None:
    trace = compose(Mix(), seed, DURATION_S, load=2.0)
    starts = sorted(row.timestamp / 1e3 for row in trace.rows if row.timestamp is not None and row.session_id)
    chat = sorted(
        row.timestamp / 1e3 for row in trace.rows if row.request_class == "chatbot+" and row.timestamp is not None
    )
    assert [int(at * 16 / DURATION_S) for at in chat] == list(range(16))  # one in each of so many equal parts
    assert (
        max(later - earlier for earlier, later in itertools.pairwise([0.0, *starts, DURATION_S])) < 2 * DURATION_S / 16
    )


def test_many_arrivals_come_as_chance_has_them() -> None:
    trace = compose(Mix(), 1, 6000.0, load=2.0)
    starts = sorted(
        row.timestamp for row in trace.rows if row.request_class == "chatbot+" and row.timestamp is not None
    )
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert 0.9 < statistics.stdev(gaps) / statistics.mean(gaps) < 1.1  # of a Poisson process: 1; of spread ones: 0.4


def test_a_composed_trace_reads_back_without_one_bad_row(tmp_path: Path) -> None:
    trace = scale(composed(), 16)
    write(trace, tmp_path / "mix.jsonl.zst")
    assert read(tmp_path / "mix.jsonl.zst", strict=True) == trace


def test_a_later_turn_begins_with_the_whole_turn_before_it_and_its_answer() -> None:
    trace = composed()
    names = {row.session_id for row in trace.rows if row.delay is not None}
    turns = [pair for name in names for pair in zip(of_session(trace, name), of_session(trace, name)[1:], strict=False)]
    assert turns
    for before, after in turns:
        assert after.hash_ids[: len(before.hash_ids)] == before.hash_ids
        assert after.input_length > before.input_length + before.output_length


def test_rows_of_a_burst_share_their_template_and_nothing_else() -> None:
    trace = composed()
    bursts: dict[int, list[Row]] = {}
    for row in trace.rows:
        if row.request_class == "data-processor":
            bursts.setdefault(row.hash_ids[0], []).append(row)
    template = Mix().jobs.template_tokens // trace.header.block_size
    shared, other = next(iter(bursts.values()))[:2]
    assert shared.hash_ids[:template] == other.hash_ids[:template]
    assert not set(shared.hash_ids[template:]) & set(other.hash_ids[template:])


def test_the_first_user_starts_more_sessions_than_any_other() -> None:
    trace = compose(Mix(), 1, 5_000.0)
    sessions = Counter(row.user for row in trace.rows if row.timestamp is not None and row.session_id)
    assert sessions.most_common(1)[0][0] == "user-01"


def test_load_adds_sessions_and_leaves_the_clocks_alone() -> None:
    once, twice = compose(Mix(), 1, 2_000.0), compose(Mix(), 1, 2_000.0, load=2.0)
    sessions = [len({row.session_id for row in trace.rows if row.session_id}) for trace in (once, twice)]
    assert 1.6 < sessions[1] / sessions[0] < 2.4
    assert max(nominal_starts_s(twice.rows)) <= 2_000.0


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), divisor=st.sampled_from([2, 4, 8, 16]))
def test_scaling_keeps_the_ideal_hit_within_one_percent(seed: int, divisor: int) -> None:
    """Tokens and block size divided alike leave the share that an ideal cache holds where it was."""
    trace = compose(Mix(), seed, DURATION_S)
    scaled = scale(trace, divisor)
    assert scaled.header.block_size == trace.header.block_size // divisor
    assert ideal_hit(scaled) == pytest.approx(ideal_hit(trace), abs=0.01)


def test_a_block_that_cannot_be_cut_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="256 tokens cannot be cut into 3 equal parts"):
        scale(composed(), 3)


def test_a_session_over_the_context_goes_whole_and_is_counted() -> None:
    def turn(session: str, length: int) -> Row:
        return Row(timestamp=0, session_id=session, input_length=length, output_length=10)

    rows = (turn("a", 50), replace_delay(turn("a", 95)), turn("b", 50), turn("", 200))
    kept = drop_over_context(Trace(Header(block_size=16), rows), 100)
    assert [row.session_id for row in kept.rows] == ["b"]
    assert kept.header.notes["dropped_over_context"] == 2


def test_a_context_that_nothing_fits_is_an_error_and_not_an_empty_trace() -> None:
    with pytest.raises(ValueError, match="no session fits 10 tokens"):
        drop_over_context(composed(), 10)


def replace_delay(row: Row) -> Row:
    return Row(delay=1.0, session_id=row.session_id, input_length=row.input_length, output_length=row.output_length)


def test_a_mix_without_a_class_has_none_of_it() -> None:
    quiet = replace(Mix(), jobs=replace(Mix().jobs, bursts_per_s=0.0))
    assert "data-processor" not in {row.request_class for row in compose(quiet, 1, DURATION_S).rows}
