"""The search finds the edge that a server has, says what is sure about it, and compares sides session by session."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from loadgen import shape
from loadgen.compare import Compared, compare_text, difference, edge_text, goodputs, headline
from loadgen.compare_html import page
from loadgen.judge import judge, resampled
from loadgen.search import POINTS_MAX, Bounds, Edge, Measured, pooled, search
from loadgen.traces import Header, Row, Trace, ideal_cached
from tests.loadgen.fixture import BUDGETS, RUN, TWENTY

MET, MISSED = TWENTY[0], TWENTY[2]


def ran(met: int, missed: int) -> Measured:
    """A run of so many sessions of one request."""
    records = [
        msgspec.structs.replace(MET if number < met else MISSED, row=number, session=f"s{number}", sent_s=0.0)
        for number in range(met + missed)
    ]
    return RUN, records


def holds(edge: float) -> Callable[[float, int], Measured]:
    def measure(load: float, seed: int) -> Measured:  # noqa: ARG001  every seed alike
        sessions = round(200 * load)
        return ran(sessions, 0) if load <= edge else ran(sessions // 2, sessions - sessions // 2)

    return measure


def found(measure: Callable[[float, int], Measured], low: float = 0.25, high: float = 8.0) -> Edge:
    return search("one", measure, BUDGETS, [1, 2], Bounds(low, high))


@pytest.mark.parametrize("edge", [0.3, 1.0, 2.7, 6.5])
def test_the_edge_is_found_within_the_tolerance(edge: float) -> None:
    result = found(holds(edge))
    assert result.capacity is not None
    assert result.first_failed is not None
    assert result.capacity.load <= edge < result.first_failed.load <= 1.1 * result.capacity.load
    assert (result.at_least, result.less_than) == (result.capacity.load, result.first_failed.load)
    assert len(result.points) <= POINTS_MAX


def test_a_server_that_holds_nothing_has_no_capacity() -> None:
    result = found(holds(0.1))
    assert (result.capacity, len(result.points)) == (None, 1)
    assert "not even the smallest load" in headline(result)


def test_a_server_that_holds_everything_is_not_searched_beyond_the_bound() -> None:
    result = found(holds(100.0))
    assert result.capacity is not None
    assert (result.capacity.load, result.first_failed) == (8.0, None)


def test_an_edge_within_the_noise_is_not_called_sure() -> None:
    def measure(load: float, seed: int) -> Measured:
        return ran(99 if seed == 1 and load > 1.0 else 100, 1 if load > 1.0 else 0)

    result = found(measure, low=1.0, high=2.0)
    assert result.capacity is not None
    assert result.points[-1].classes["chatbot+"].low < 0.99
    assert result.at_least == 1.0


def test_a_load_that_missed_by_chance_is_neither_passed_nor_failed() -> None:
    def measure(load: float, seed: int) -> Measured:  # noqa: ARG001  every seed alike
        return ran(100, 0) if load <= 1.0 else ran(98, 2) if load <= 1.5 else ran(50, 50)

    result = found(measure, low=1.0, high=2.0)
    marks = {one.load: one.mark for one in result.points}
    assert (marks[1.0], marks[1.5], marks[2.0]) == ("pass", "too few to say", "FAIL")
    assert result.capacity is not None
    assert result.capacity.load == 1.0
    assert "did not pass (too few to say)" in headline(result)
    lines = edge_text(result).splitlines()
    assert [line.rsplit("  ", 1)[1] for line in lines[3:]] == list(marks.values())


def test_the_most_goodput_is_told_at_three_shares_of_the_loads_that_were_tried() -> None:
    def measure(load: float, seed: int) -> Measured:  # noqa: ARG001  every seed alike
        return ran(100, 0) if load <= 1.0 else ran(96, 4) if load <= 1.5 else ran(50, 50)

    said = goodputs(found(measure, low=1.0, high=2.0))
    met = [round(share * 100 / RUN.duration_s, 2) for share in (0.96, 1.0)]
    assert f"at 90%: {max(met):.2f}/s at x1" in said.replace("class at 90%", "at 90%")
    assert "at 99%: 1.00/s at x1" in said
    assert "99%: none" in goodputs(found(lambda *_: ran(50, 50)))


def test_a_first_load_that_missed_by_chance_says_so() -> None:
    assert headline(found(lambda *_: ran(98, 2))).endswith("not even the smallest load passed (too few to say)")
    assert headline(found(lambda *_: ran(50, 50))).endswith("not even the smallest load passed")


def test_seeds_are_pooled_and_their_sessions_stay_apart() -> None:
    verdict = pooled([ran(10, 0), ran(10, 0)], BUDGETS)
    assert (verdict.offered, verdict.run.duration_s) == (20, 2 * RUN.duration_s)
    assert verdict.goodput_per_s == judge(*ran(10, 0), BUDGETS).goodput_per_s


def test_pooled_seeds_lose_the_time_of_each_warm_up() -> None:
    """Two runs of 100 s with 10 s of warm-up are 180 s; these were all intended at 0 s, so none is judged."""
    run, asked = ran(10, 0)
    warm = msgspec.structs.replace(run, warmup_s=10.0)
    verdict = pooled([(warm, asked), (warm, asked)], BUDGETS)
    assert (verdict.run.judged_s, verdict.offered, verdict.warmup_requests) == (180.0, 0, 20)


def test_a_difference_is_paired_by_session_and_zero_with_itself() -> None:
    first, other = ran(90, 10), ran(100, 0)
    same = difference([first], [first], BUDGETS)["chatbot+"]
    more = difference([first], [other], BUDGETS)["chatbot+"]
    assert (same.more, same.low, same.high) == (0.0, 0.0, 0.0)
    assert more.more == pytest.approx(0.1)
    assert 0.04 < more.low < 0.1 < more.high < 0.17


def test_a_bootstrap_in_parts_is_the_one_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.array([[1, 2], [3, 4], [5, 6]])
    whole = resampled(counts)
    monkeypatch.setattr("loadgen.judge.BOOTSTRAP_CELLS", 7)
    assert (resampled(counts) == whole).all()
    assert whole.shape == (1000, 2)


def session(name: str) -> list[Row]:
    first = Row(timestamp=1000, session_id=name, input_length=32, output_length=1, hash_ids=[1, 2])
    return [first, Row(delay=10, session_id=name, input_length=32, output_length=1, hash_ids=[1, 2])]


@pytest.mark.parametrize(("load", "sessions"), [(0.25, 5), (0.5, 10), (1.0, 20), (2.5, 50), (3.0, 60)])
def test_load_is_changed_by_whole_sessions_with_text_of_their_own(load: float, sessions: int) -> None:
    trace = Trace(Header(block_size=16), tuple(row for number in range(20) for row in session(f"s{number}")))
    scaled = shape.at_load(trace, load, seed=1)
    assert len({row.session_id for row in scaled.rows}) == sessions
    assert len(scaled.rows) == 2 * sessions
    copies = -(-round(load * 100) // 100)
    cold = sum(hit == 0 for hit in ideal_cached(scaled))
    assert cold == copies  # within a copy all share their text, as in the trace
    assert shape.at_load(trace, load, seed=1) == scaled


def sides() -> Compared:
    first, other = ran(90, 10), ran(100, 0)
    return Compared(
        names=["plain", "<new>"],
        verdicts=[pooled([first], BUDGETS), pooled([other], BUDGETS)],
        differences=[difference([first], [one], BUDGETS) for one in (first, other)],
        edges=[],
    )


def level() -> Compared:
    """Two sides alike."""
    both, same = sides(), ran(90, 10)
    return msgspec.structs.replace(
        both, differences=[difference([same], [same], BUDGETS)] * 2, verdicts=both.verdicts[:1] * 2
    )


def comparison_page() -> str:
    """Of two sides, each at several loads."""
    edges = [msgspec.structs.replace(found(holds(load)), name=f"holds {load:g}") for load in (1.0, 2.0)]
    return page(msgspec.structs.replace(sides(), edges=edges), "Comparison")


def test_the_page_shows_sides_and_curves_and_needs_nothing_else() -> None:
    drawn = comparison_page()
    assert "&lt;new&gt;" in drawn
    assert "better: +10.0 points" in drawn
    assert "may be chance: +0.0 points" in page(level(), "Level")
    assert drawn.count("99% wanted") == 1
    assert "+10.0" in compare_text(sides())
    assert drawn.count('<polyline class="curve"') == 2
    assert "<script" not in drawn
