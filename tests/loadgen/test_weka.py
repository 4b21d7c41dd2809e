"""Real Claude Code sessions become a trace: recorded gaps, shared blocks, sub-agents where they were called."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from loadgen.compose import scale
from loadgen.formats import weka
from loadgen.traces import Tally, Trace, TraceError, encode, ideal_cached
from tests.loadgen.shared import shared_trace

COLUMNS = (
    "trace,thread,depth,t,in,out,blocks,lcp_blocks_prev,seen_prefix_blocks,api_time,think_time,stop,input_types,type"
)
FIRST = "one,0,0,0.0,130,9,3,0,0,2.0,,tool_use,text,s"
TOOL = "one,0,0,5.0,200,9,4,2,2,2.0,3.5,tool_use,tool_result,s"
HUMAN = "one,0,0,9.0,210,9,4,4,4,2.0,80,end_turn,text,s"
CALLED = "one,0/agent_001,1,0.0,99,9,2,0,0,2.0,0.0,tool_use,text,n"
AGAIN = "one,0/agent_001,1,3.0,160,9,3,1,1,1.0,1.5,end_turn,tool_result,n"
AFTER = "one,0,0,30.0,220,9,4,4,4,2.0,10,tool_use,tool_result,s"


def table(tmp_path: Path, *rows: str, columns: str = COLUMNS) -> Path:
    path = tmp_path / "weka.csv"
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def ideal_hit(trace: Trace) -> float:
    return sum(ideal_cached(trace)) / sum(row.input_length for row in trace.rows)


def sessions(path: Path) -> list[weka.Session]:
    return weka.sessions_of(path, Tally(path, strict=True))


def test_blocks_shared_with_the_turn_before_keep_their_ids_and_others_are_new(tmp_path: Path) -> None:
    trace = weka.load(table(tmp_path, FIRST, TOOL, HUMAN))
    assert [row.hash_ids for row in trace.rows] == [[0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 4]]


def test_a_prompt_that_returns_to_an_older_one_has_its_blocks_again(tmp_path: Path) -> None:
    back = "one,0,0,20.0,190,9,3,2,3,2.0,1,tool_use,tool_result,s"  # two blocks as before, three as the first turn
    trace = weka.load(table(tmp_path, FIRST, TOOL, back))
    assert trace.rows[2].hash_ids == [0, 1, 2]


def test_later_turns_wait_as_recorded_and_say_for_what(tmp_path: Path) -> None:
    trace = weka.slice_of(sessions(table(tmp_path, FIRST, TOOL, HUMAN)), 1, seed=1, duration_s=10.0)
    assert [(row.timestamp, row.delay, row.gap) for row in trace.rows] == [
        (0.0, None, "none"),
        (None, 3500.0, "tool"),
        (None, 80_000.0, "human"),
    ]


def test_a_subagent_waits_for_its_caller_and_the_caller_for_it(tmp_path: Path) -> None:
    first, called, again, after = weka.load(table(tmp_path, FIRST, CALLED, AGAIN, AFTER)).rows
    assert (called.session_id, called.parent, called.after, called.delay) == ("one/agent_001", "one", ["one#0"], 0.0)
    assert (again.after, again.delay) == ([], 1500.0)
    assert after.after == ["one/agent_001#1"]
    assert after.delay == 10_000 - (2000 + 1500 + 1000)  # the think time spans the sub-agent
    assert called.hash_ids[0] not in first.hash_ids


def archive(tmp_path: Path, *requests: dict[str, object]) -> Path:
    session = {"id": "one", "block_size": 64, "hash_id_scope": "local", "requests": requests}
    path = tmp_path / "weka.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("t/one.json", json.dumps(session).encode()), ("t/bad.json", b"{")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def called(at_s: float, ids: list[int], kind: str = "text") -> dict[str, object]:
    types = {"input_types": [kind], "api_time": 2.0, "think_time": 3.0}
    return {"t": at_s, "type": "n", "in": 64 * len(ids), "out": 9, "hash_ids": ids, **types}


def test_the_archive_gives_its_own_ids_and_a_subagent_begins_when_its_caller_ended(tmp_path: Path) -> None:
    nested = [called(0.0, [8, 9]), called(5.0, [8, 9, 10], "tool_result")]
    agent = {"t": 12.5, "type": "subagent", "agent_id": "a1", "duration_ms": 10_000, "requests": nested}
    path = archive(tmp_path, called(0.0, [1, 2]), agent, called(13.0, [1, 2, 3], "tool_result"))
    trace = weka.load(path)
    assert [row.hash_ids for row in trace.rows] == [[1, 2], [8, 9], [8, 9, 10], [1, 2, 3]]
    assert trace.rows[1].delay == 500.0  # its marker at 12.5 s less 10 s, after an answer that ended at 2 s
    assert (trace.rows[3].delay, trace.rows[3].after) == (500.0, ["one/a1#1"])
    assert (trace.bad_count, trace.bad[0].line) == (1, 2)
    assert "t/bad.json" in trace.bad[0].reason


def test_another_table_is_refused_by_the_name_of_the_missing_column(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 1: no column 'blocks'"):
        weka.load(table(tmp_path, FIRST, columns=COLUMNS.replace("out,blocks", "out,blobs")))


def test_a_session_with_a_bad_number_goes_whole_and_is_counted_by_its_line(tmp_path: Path) -> None:
    path = table(tmp_path, FIRST, TOOL.replace("200", "many"), FIRST.replace("one", "two"))
    trace = weka.load(path)
    assert [row.session_id for row in trace.rows] == ["two"]
    assert (trace.bad_count, trace.bad[0].line) == (1, 3)
    with pytest.raises(TraceError, match="line 3"):
        weka.load(path, strict=True)


def test_a_session_fits_only_if_its_longest_turn_does(tmp_path: Path) -> None:
    found = sessions(table(tmp_path, FIRST, TOOL, HUMAN))
    assert weka.fitting(found, divisor=16, context=16) == found
    assert weka.fitting(found, divisor=16, context=15) == []


def test_a_slice_of_the_real_trace_keeps_its_hit_when_it_is_scaled() -> None:
    found = sessions(shared_trace("weka_requests.csv.zst"))
    assert (len(found), sum(bool(row.parent) for one in found for row in one.rows)) == (555, 574)
    trace = weka.slice_of(weka.fitting(found, 16, 8192), 40, seed=1, duration_s=100.0)
    assert ideal_hit(trace) > 0.9
    assert ideal_hit(scale(trace, 16)) == pytest.approx(ideal_hit(trace), abs=0.01)
    assert encode(weka.slice_of(weka.fitting(found, 16, 8192), 40, seed=1, duration_s=100.0)) == encode(trace)
