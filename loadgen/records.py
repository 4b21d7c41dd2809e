"""Records: what became of each request, one JSON line each; the only thing that a verdict is made from.

Owns the fields, and reading an answer into them. Never judges: a record knows no target."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from loadgen.client import Answer
from loadgen.traces import ClassName, Gap, Slo

# left: the client's patience ended. abandoned: an earlier turn of its session failed. unfinished: the run ended first.
Outcome = Literal["done", "refused", "failed", "left", "abandoned", "unfinished"]
REASON_CHARS_MAX = 200


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One offered request. Times are seconds since the run began; latencies count from `intended_s`."""

    row: int
    session: str = ""
    parent: str = ""  # the session that this one is a sub-agent of
    turn: int = 0
    user: str = ""
    request_class: ClassName = msgspec.field(name="class")
    gap: Gap = "none"
    stripped: bool = False
    slo: Slo | None = None
    input_tokens: int
    output_tokens: int
    ideal_cached: int = 0
    intended_s: float | None = None  # None: abandoned before its time was known
    sent_s: float | None = None  # of the first attempt
    token_s: list[float] = []  # one stamp an event that carried text
    end_s: float | None = None
    outcome: Outcome
    status: int = 0
    reason: str = ""
    attempts: int = 0
    assigned_class: str = ""
    class_reason: str = ""
    worker: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """How the records came to be: enough to repeat it. The first line of a records file."""

    run: int = 1
    target: str
    model: str
    trace_name: str
    trace_digest: str
    trace_notes: dict[str, int | float | str] = {}
    trace_bad_rows: int = 0
    seed: int
    speed: float
    stripped_share: float
    duration_s: float  # offered time
    wall_s: float
    started: str  # wall clock, for people
    machine: str
    version: str
    client_cpu_s: float
    is_interrupted: bool = False
    not_reached: int = 0  # rows that were never offered: their time came after the offered time
    budgets: dict[str, dict[str, float | None]] = {}
    budgets_from: str = ""


def fill(record: Record, answer: Answer, origin: float) -> None:
    """Write an answer, whole or broken, into its record."""
    headers = answer.headers
    record.status, record.attempts = answer.status, answer.attempts
    record.end_s = round(answer.ended_at - origin, 6)
    record.assigned_class = headers.get("x-headway-class", "")
    record.class_reason = headers.get("x-headway-class-reason", "")
    record.worker = headers.get("x-headway-worker", "")
    if answer.status in (429, 503):
        record.outcome, record.reason = "refused", _reason(answer.body(), f"status {answer.status}")
    elif answer.status != 200:
        record.outcome, record.reason = "failed", answer.error or _reason(answer.body(), f"status {answer.status}")
    elif headers.get("content-type", "").startswith("text/event-stream"):
        _read_stream(record, answer, origin)
    else:
        _read_whole(record, answer)
    if answer.error:  # what had come before is kept: those tokens were made, and wasted
        record.outcome, record.reason = "failed", answer.error


def cut(record: Record, answer: Answer, now: float, origin: float, outcome: Outcome) -> None:
    """Write what had come before the client hung up. One that was waiting to come back as told stays refused."""
    answer.ended_at = now
    fill(record, answer, origin)
    if record.outcome != "refused":
        record.outcome, record.reason = outcome, ""


def _read_stream(record: Record, answer: Answer, origin: float) -> None:
    """An answer is done when [DONE] came, and not before: an error event, or silence, is a failure."""
    record.outcome, record.reason = "failed", "the stream ended without [DONE]"
    for at, data in answer.events():
        if data == b"[DONE]":
            if record.reason == "the stream ended without [DONE]":
                record.outcome, record.reason = "done", ""
            return
        event = _object(data)
        if event is None:
            record.reason = "an event that is not a JSON object"
            return
        if "error" in event:
            record.reason = _reason(data, "an error event")
            return
        if _text(event):
            record.token_s.append(round(at - origin, 6))
        _read_usage(record, event)


def _read_whole(record: Record, answer: Answer) -> None:
    body = _object(answer.body())
    if body is None or "choices" not in body:
        record.outcome, record.reason = "failed", "the answer is not a completion"
        return
    record.outcome = "done"
    _read_usage(record, body)


def _read_usage(record: Record, body: dict[str, Any]) -> None:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return
    details = usage.get("prompt_tokens_details")
    record.prompt_tokens = _count(usage.get("prompt_tokens"))
    record.completion_tokens = _count(usage.get("completion_tokens"))
    record.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else None


def _count(value: object) -> int | None:
    """A server may say anything; only a count is one."""
    return value if type(value) is int and value >= 0 else None


def _text(event: dict[str, Any]) -> str:
    choices = event.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    text = first.get("text") if isinstance(first, dict) else None
    return text if isinstance(text, str) else ""


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        parsed = msgspec.json.decode(data)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _reason(data: bytes, otherwise: str) -> str:
    """The server's own words: its error's code and message."""
    error = (_object(data) or {}).get("error")
    if not isinstance(error, dict):
        return otherwise
    words = [str(error[key]) for key in ("code", "message") if error.get(key)]
    return ": ".join(words)[:REASON_CHARS_MAX] or otherwise


def write(run: Run, records: Iterable[Record], path: Path) -> None:
    """The run's line, then one line a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.Encoder().encode_lines([run, *records]))


def read(path: Path) -> tuple[Run, list[Record]]:
    """What `write` wrote. Raises ValueError naming the line."""
    lines = path.read_bytes().splitlines()
    if not lines:
        raise ValueError(f"{path}: empty")
    try:
        run = msgspec.json.decode(lines[0], type=Run)
    except ValueError as error:
        raise ValueError(f"{path}: line 1: {error}") from error
    decoder, records = msgspec.json.Decoder(Record), []
    for number, line in enumerate(lines[1:], 2):
        try:
            records.append(decoder.decode(line))
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
    return run, records
