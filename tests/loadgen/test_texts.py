"""Rows with words of their own are read, sized, sent as they stand, and refused where that cannot be."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from loadgen import traces
from loadgen.client import Client, Target
from loadgen.compose import scale
from loadgen.dialects import Name
from loadgen.formats import export
from loadgen.replay import Options, Replay
from loadgen.session import Plan, measure
from loadgen.shape import at_load
from loadgen.traces import Trace, TraceError, ideal_cached, read
from tests.loadgen.fixture import BUDGETS
from tests.loadgen.server import answer_all, scripted

HEADER = {"trace": 1, "block_size": 16}
SYSTEM = {"role": "system", "content": "You are a careful assistant. " * 20}
FIRST = [SYSTEM, {"role": "user", "content": "Read the file."}]
SECOND = [*FIRST, {"role": "assistant", "content": "It is short."}, {"role": "user", "content": "And now?"}]
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {}}}]
TALK = [
    {"timestamp": 0, "session_id": "s", "messages": FIRST, "tools": TOOLS, "output_length": 3},
    {"delay": 5, "session_id": "s", "messages": SECOND, "tools": TOOLS, "output_length": 2},
]
PLAIN = {"timestamp": 0, "text_input": "one two three " * 40, "output_length": 2}


def written(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (HEADER, *rows)))
    return path


def test_a_row_is_as_long_as_its_text_and_turns_share_what_they_repeat(tmp_path: Path) -> None:
    trace = read(written(tmp_path, *TALK, PLAIN))
    assert trace.rows[2].input_length == 14 * 40 // 4
    assert len(trace.rows[2].hash_ids) == trace.rows[2].input_length // 16
    first, second = (row.hash_ids for row in trace.rows[:2])
    shared = sum(a == b for a, b in zip(first, second, strict=False))
    assert shared == len(first) > 5
    assert ideal_cached(trace) == [0, 16 * shared, 0]
    assert trace.header.notes == {"text_rows": 3}  # the report shows notes: these lengths are no tokeniser's


def test_a_trace_with_text_is_written_and_read_again_to_the_same_bytes(tmp_path: Path) -> None:
    trace = read(written(tmp_path, *TALK, PLAIN))
    traces.write(trace, tmp_path / "again.jsonl")
    assert traces.encode(read(tmp_path / "again.jsonl")) == traces.encode(trace)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"text_input": "a", "messages": FIRST}, "a prompt is one of them"),
        ({"text_input": 7}, "text_input is not a string"),
        ({"messages": "hello"}, "messages is not a list of objects"),
        ({"messages": FIRST, "tools": ["read"]}, "tools is not a list of objects"),
        ({"text_input": "a", "tools": TOOLS}, "tools without messages"),
        ({}, "missing required field `input_length`"),
    ],
)
def test_text_that_nobody_could_send_is_a_bad_row_with_its_reason(
    more: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=f"line 2: .*{why}"):
        read(written(tmp_path, {"timestamp": 0, "output_length": 1, **more}), strict=True)


def sent(trace: Trace, dialect: Name) -> list[dict[str, object]]:
    async def run() -> list[dict[str, object]]:
        async with scripted(answer_all) as server:
            options = Options(model="m", duration_s=1.0, dialect=dialect, stripped_share=0.0)
            await Replay(trace, Client(Target.parse(server.url)), options).run()
            return [asked.body for asked in server.asked]

    return asyncio.run(run())


def test_messages_and_tools_are_sent_as_they_stand(tmp_path: Path) -> None:
    first, second = sent(read(written(tmp_path, *TALK)), "chat")
    assert (first["messages"], first["tools"], first["max_tokens"]) == (FIRST, TOOLS, 3)
    assert (second["messages"], second["tools"]) == (SECOND, TOOLS)


@pytest.mark.parametrize("dialect", ["chat", "anthropic"])
def test_plain_text_is_a_message_of_the_user(dialect: Name, tmp_path: Path) -> None:
    (body,) = sent(read(written(tmp_path, PLAIN)), dialect)
    assert body["messages"] == [{"role": "user", "content": PLAIN["text_input"]}]
    assert "tools" not in body


def test_plain_text_is_a_prompt(tmp_path: Path) -> None:
    (body,) = sent(read(written(tmp_path, PLAIN)), "completions")
    assert body["prompt"] == PLAIN["text_input"]


@pytest.mark.parametrize("dialect", ["completions", "anthropic"])
def test_messages_are_refused_where_they_cannot_be_sent(dialect: Name, tmp_path: Path) -> None:
    trace = read(written(tmp_path, *TALK))
    with pytest.raises(ValueError, match=f"with --dialect chat, not {dialect}"):
        measure(Plan(tmp_path / "t", "http://127.0.0.1:9", tmp_path / "r", dialect=dialect), trace, BUDGETS)


def test_words_are_neither_scaled_nor_copied(tmp_path: Path) -> None:
    trace = read(written(tmp_path, *TALK))
    with pytest.raises(ValueError, match="text is as long as it is"):
        scale(trace, 4)
    with pytest.raises(ValueError, match="copies of its sessions would not be new text"):
        at_load(trace, 2.0, seed=1)
    assert at_load(read(written(tmp_path, *TALK, PLAIN)), 0.5, seed=1).rows


def test_aiperf_is_given_the_text_itself(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    export.write(read(written(tmp_path, *TALK, PLAIN)), out, "aiperf")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[1]["messages"] == SECOND
    assert rows[2]["text_input"] == PLAIN["text_input"]
    assert not any("input_length" in row or "hash_ids" in row for row in rows)
    export.write(read(written(tmp_path, *TALK, PLAIN)), out, "mooncake")
    assert all("hash_ids" in json.loads(line) for line in out.read_text().splitlines())
