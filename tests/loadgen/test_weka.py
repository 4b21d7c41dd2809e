"""Real Claude Code sessions become a trace: recorded gaps, shared blocks, nothing invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadgen import weka
from loadgen.compose import scale
from loadgen.traces import Trace, TraceError, encode, ideal_cached
from tests.loadgen.shared import shared_trace

COLUMNS = (
    "trace,thread,depth,t,in,out,blocks,lcp_blocks_prev,seen_prefix_blocks,api_time,think_time,stop,input_types,type"
)
FIRST = "one,0,0,0.0,130,9,3,0,0,2.0,,tool_use,text,s"
TOOL = "one,0,0,5.0,200,9,4,2,2,2.0,3.5,tool_use,tool_result,s"
HUMAN = "one,0,0,9.0,210,9,4,4,4,2.0,80,end_turn,text,s"
SUBAGENT = "one,1,1,1.0,99,9,2,0,0,2.0,0.1,tool_use,text,n"


def table(tmp_path: Path, *rows: str, columns: str = COLUMNS) -> Path:
    path = tmp_path / "weka.csv"
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def ideal_hit(trace: Trace) -> float:
    return sum(ideal_cached(trace)) / sum(row.input_length for row in trace.rows)


def test_blocks_shared_with_the_turn_before_keep_their_ids_and_others_are_new(tmp_path: Path) -> None:
    sessions, _ = weka.load(table(tmp_path, FIRST, TOOL, HUMAN))
    trace = weka.slice_of(sessions, 1, seed=1, duration_s=10.0)
    assert [row.hash_ids for row in trace.rows] == [[0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 4]]


def test_later_turns_wait_as_recorded_and_say_for_what(tmp_path: Path) -> None:
    sessions, _ = weka.load(table(tmp_path, FIRST, TOOL, HUMAN))
    trace = weka.slice_of(sessions, 1, seed=1, duration_s=10.0)
    assert [(row.timestamp, row.delay, row.gap) for row in trace.rows] == [
        (0.0, None, "none"),
        (None, 3500.0, "tool"),
        (None, 80_000.0, "human"),
    ]


def test_rows_of_subagents_are_left_out_and_counted(tmp_path: Path) -> None:
    sessions, left_out = weka.load(table(tmp_path, FIRST, SUBAGENT, TOOL))
    assert (len(sessions["one"]), left_out) == (2, 1)


def test_another_table_is_refused_by_the_name_of_the_missing_column(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 1: no column 'blocks'"):
        weka.load(table(tmp_path, columns="trace,thread,depth,in,out,lcp_blocks_prev,think_time,input_types"))


def test_a_bad_number_is_refused_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 3"):
        weka.load(table(tmp_path, FIRST, TOOL.replace("200", "many")))


def test_a_session_fits_only_if_its_longest_turn_does(tmp_path: Path) -> None:
    sessions, _ = weka.load(table(tmp_path, FIRST, TOOL, HUMAN))
    assert list(weka.fitting(sessions, divisor=16, context=16)) == ["one"]
    assert list(weka.fitting(sessions, divisor=16, context=15)) == []


def test_a_slice_of_the_real_trace_keeps_its_hit_when_it_is_scaled() -> None:
    sessions, left_out = weka.load(shared_trace("weka_requests.csv.zst"))
    trace = weka.slice_of(weka.fitting(sessions, 16, 8192), 40, seed=1, duration_s=100.0)
    assert (len(sessions), left_out) == (555, 574)
    assert ideal_hit(trace) > 0.9
    assert ideal_hit(scale(trace, 16)) == pytest.approx(ideal_hit(trace), abs=0.01)
    again = weka.slice_of(weka.fitting(sessions, 16, 8192), 40, seed=1, duration_s=100.0)
    assert encode(again) == encode(trace)
