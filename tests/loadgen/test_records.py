"""An answer becomes a record: done only with [DONE], and otherwise a failure that says why."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from loadgen import records
from loadgen.client import Answer
from loadgen.dialects import DIALECTS
from loadgen.records import Outcome, Record, Run, cut, fill

STREAM = {"content-type": "text/event-stream; charset=utf-8", "x-headway-class": "chatbot+", "x-headway-worker": "w1"}
A, B = b'data: {"choices":[{"text":" a"}]}\n\n', b'data: {"choices":[{"text":" b"}]}\n\n'
EMPTY = b'data: {"choices":[{"text":""}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
ORIGIN = 100.0
OPENAI, ANTHROPIC = DIALECTS["completions"], DIALECTS["anthropic"]


def blank() -> Record:
    return Record(row=0, request_class="chatbot+", input_tokens=9, output_tokens=2, outcome="unfinished")


def streamed(*pieces: bytes, error: str = "") -> Record:
    record = blank()
    timed = [(ORIGIN + number, piece) for number, piece in enumerate(pieces, 1)]
    fill(record, Answer(200, dict(STREAM), timed, ended_at=ORIGIN + 9, error=error, attempts=1), ORIGIN, OPENAI)
    return record


def whole(status: int, body: bytes, **headers: str) -> Record:
    record = blank()
    fill(
        record,
        Answer(status, {"content-type": "application/json", **headers}, [(ORIGIN, body)], attempts=3),
        ORIGIN,
        OPENAI,
    )
    return record


def test_a_stream_is_done_with_a_stamp_for_each_event_that_carried_text() -> None:
    record = streamed(A, EMPTY, B, USAGE + DONE)
    assert (record.outcome, record.token_s, record.end_s) == ("done", [1.0, 3.0], 9.0)
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (9, 2, 4)
    assert (record.worker, record.assigned_class) == ("w1", "chatbot+")


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ((A, B), "the stream ended without [DONE]"),
        ((A, b'data: {"error":{"code":"worker_lost","message":"gone"}}\n\n', DONE), "worker_lost: gone"),
        ((A, b"data: {not json\n\n", DONE), "an event that is not a JSON object"),
        ((A, b"data: 7\n\n", DONE), "an event that is not a JSON object"),
        ((A, b"data: [DONE"), "the stream ended without [DONE]"),
        ((), "the stream ended without [DONE]"),
    ],
)
def test_a_stream_that_breaks_is_a_failure_with_its_reason(pieces: tuple[bytes, ...], reason: str) -> None:
    record = streamed(*pieces)
    assert (record.outcome, record.reason) == ("failed", reason)


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices":"none"}',
        b'{"choices":[7]}',
        b'{"choices":[{"text":5}]}',
        b'{"usage":3}',
        b'{"usage":{"prompt_tokens_details":[]}}',
    ],
)
def test_an_event_of_an_odd_shape_carries_nothing_and_breaks_nothing(event: bytes) -> None:
    record = streamed(b"data: " + event + b"\n\n", A, DONE)
    assert (record.outcome, record.token_s) == ("done", [2.0])


@pytest.mark.parametrize("usage", [b'"many"', b"-1", b"1.5", b"true", b"[]"])
def test_a_count_that_is_no_count_is_not_taken(usage: bytes) -> None:
    record = streamed(A, b'data: {"usage":{"prompt_tokens":' + usage + b"}}\n\n", DONE)
    assert (record.outcome, record.prompt_tokens) == ("done", None)
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record


def test_a_cut_connection_fails_in_the_transports_words() -> None:
    assert streamed(A, error="the connection was lost").reason == "the connection was lost"


@pytest.mark.parametrize(
    ("record", "outcome", "reason"),
    [
        (whole(200, b'{"choices":[{"text":"a"}],"usage":{"completion_tokens":2}}'), "done", ""),
        (whole(200, b"<html>"), "failed", "the answer is not a completion"),
        (whole(200, b"{}"), "failed", "the answer is not a completion"),
        (whole(429, b'{"error":{"code":"rate","message":"later"}}'), "refused", "rate: later"),
        (whole(503, b"no"), "refused", "status 503"),
        (whole(500, b'{"error":{"message":"' + b"x" * 500 + b'"}}'), "failed", "x" * 200),
        (whole(404, b""), "failed", "status 404"),
    ],
)
def test_a_whole_answer_is_what_its_status_and_body_say(record: Record, outcome: Outcome, reason: str) -> None:
    assert (record.outcome, record.reason, record.attempts) == (outcome, reason, 3)


def test_a_client_that_left_keeps_its_stamps_and_one_told_to_wait_stays_refused() -> None:
    left, refused = blank(), blank()
    ended = ORIGIN + 5
    cut(left, Answer(200, dict(STREAM), [(ORIGIN + 1, A)], ended_at=ended, attempts=1), "left", ORIGIN, OPENAI)
    cut(refused, Answer(503, {}, [], ended_at=ended, attempts=1), "left", ORIGIN, OPENAI)
    assert (left.outcome, left.token_s, left.end_s, left.worker, left.reason) == ("left", [1.0], 5.0, "w1", "")
    assert refused.outcome == "refused"


def run() -> Run:
    return Run(
        target="http://x",
        model="m",
        trace_name="t",
        trace_digest="d",
        seed=1,
        speed=1.0,
        stripped_share=0.2,
        duration_s=10.0,
        wall_s=11.0,
        started="now",
        machine="here",
        version="1",
        client_cpu_s=0.5,
    )


def test_records_are_read_back_as_written(tmp_path: Path) -> None:
    kept = [streamed(A, B, USAGE + DONE), whole(503, b"no")]
    records.write(run(), kept, tmp_path / "r.jsonl")
    assert records.read(tmp_path / "r.jsonl") == (run(), kept)


@pytest.mark.parametrize(("text", "why"), [("", "empty"), ("{}\n", "line 1"), (None, "line 2")])
def test_a_records_file_that_is_none_is_refused_by_its_line(tmp_path: Path, text: str | None, why: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(msgspec.json.encode(run()).decode() + "\n{}\n" if text is None else text)
    with pytest.raises(ValueError, match=why):
        records.read(path)


def event(kind: str, **fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind} | fields).encode())


START = event("message_start", message={"usage": {"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens": 1}})
DELTA = event("content_block_delta", index=0, delta={"type": "text_delta", "text": " a"})
TOOL = event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": "{"})
SPENT = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 7})
STOP = event("message_stop")


def messages(*pieces: bytes) -> Record:
    record = blank()
    timed = [(ORIGIN + number, piece) for number, piece in enumerate(pieces, 1)]
    fill(record, Answer(200, dict(STREAM), timed, ended_at=ORIGIN + 9, attempts=1), ORIGIN, ANTHROPIC)
    return record


def test_a_stream_of_messages_is_done_when_it_says_so_and_counts_the_whole_prompt() -> None:
    record = messages(START, event("ping"), event("content_block_start", index=0), DELTA, TOOL, SPENT + STOP)
    assert (record.outcome, record.token_s) == ("done", [4.0, 5.0])
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens) == (9, 4, 7)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ((START, DELTA), "the stream ended without message_stop"),
        ((START, event("error", error={"type": "overloaded_error", "message": "full"})), "overloaded_error: full"),
    ],
)
def test_a_stream_of_messages_that_breaks_is_a_failure_with_its_reason(pieces: tuple[bytes, ...], reason: str) -> None:
    record = messages(*pieces)
    assert (record.outcome, record.reason) == ("failed", reason)


def test_a_whole_message_is_an_answer_and_an_overloaded_server_a_refusal() -> None:
    json_head = {"content-type": "application/json"}
    body = b'{"type":"message","content":[],"usage":{"input_tokens":3,"output_tokens":2}}'
    done, full = blank(), blank()
    fill(done, Answer(200, json_head, [(ORIGIN, body)], attempts=1), ORIGIN, ANTHROPIC)
    fill(full, Answer(529, json_head, [(ORIGIN, b"{}")], attempts=3), ORIGIN, ANTHROPIC)
    assert (done.outcome, done.prompt_tokens, done.completion_tokens) == ("done", 3, 2)
    assert (full.outcome, full.reason) == ("refused", "status 529")
