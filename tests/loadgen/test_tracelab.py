"""TraceLab's rounds become turns: prompts that share what the cache held, gaps by who came back, bad rounds counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadgen import formats
from loadgen.formats.tracelab import TOKENS_MAX
from loadgen.traces import Trace, ideal_cached
from tests.loadgen.shared import shared_trace


def said(session: str, total: int, prefix: int, *events: tuple[str, float]) -> str:
    timed = [{"event_type": kind, "timestamp": f"2026-06-01T05:40:{at:06.3f}Z"} for kind, at in events]
    tokens = {"input_tokens_total": total, "prefix_tokens": prefix, "newly_append_tokens": 0, "output_tokens": 7}
    return json.dumps({"session_id": session, "project": "p", "timing_events": timed, **tokens})


LINES = (
    said("b", 640, 128, ("user_message", 10), ("text", 12)),
    said("a", 320, 0, ("user_message", 4), ("reasoning", 5), ("tool_call", 6)),
    said("b", 1000, 600, ("tool_result", 12.5), ("tool_result", 13), ("text", 15)),
    said("b", 1100, 1000, ("user_message", 20), ("text", 21)),
)


def loaded(tmp_path: Path, *lines: str) -> Trace:
    path = tmp_path / "rounds.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return formats.load(path)


def test_rounds_are_turns_timed_from_their_last_input_to_their_last_event(tmp_path: Path) -> None:
    trace = loaded(tmp_path, *LINES)
    times = [(row.session_id, row.timestamp, row.delay, row.gap, row.recorded_ms) for row in trace.rows]
    assert times == [
        ("b", 6000, None, "none", 2000),
        ("a", 0, None, "none", 2000),
        ("b", None, 1000, "tool", 2000),
        ("b", None, 5000, "human", 1000),
    ]
    assert [(row.input_length, row.output_length, row.user) for row in trace.rows][:2] == [(640, 7, "p"), (320, 7, "p")]


def test_a_prompt_shares_with_the_one_before_what_the_cache_held_in_whole_blocks(tmp_path: Path) -> None:
    trace = loaded(tmp_path, *LINES)
    assert (trace.header.block_size, trace.header.hash_scope) == (64, "local")
    assert ideal_cached(trace) == [0, 0, 600 // 64 * 64, 1000 // 64 * 64]
    assert [len(row.hash_ids) for row in trace.rows] == [10, 5, 15, 17]


@pytest.mark.parametrize(
    "line",
    [
        said("c", 100, 0, ("text", 1)),
        said("c", 0, 0, ("user_message", 1)),
        said("c", 100, -1, ("user_message", 1)),
        said("c", TOKENS_MAX + 1, 0, ("user_message", 1)),
        '{"session_id": "c"}',
    ],
    ids=["no input", "no tokens", "less than nothing held", "a prompt over the bound", "fields missing"],
)
def test_a_bad_round_is_counted_with_its_line(tmp_path: Path, line: str) -> None:
    trace = loaded(tmp_path, *LINES, line)
    assert (len(trace.rows), trace.bad_count, trace.bad[0].line) == (4, 1, 5)


def test_the_published_example_comes_in_whole_and_holds_what_its_provider_held() -> None:
    path = shared_trace("tracelab_example_round_trace.jsonl")
    trace = formats.load(path, strict=True)
    assert (len(trace.rows), len({row.session_id for row in trace.rows})) == (19, 2)
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    for one, row, held in zip(rounds, trace.rows, ideal_cached(trace), strict=True):
        told = one["prefix_tokens"] // 64 * 64
        assert held <= told
        assert held == told or row.timestamp is not None or told > rounds[rounds.index(one) - 1]["input_tokens_total"]
