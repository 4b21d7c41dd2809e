"""Records: what became of each request, one JSON line each; the only thing that a verdict is made from.

Owns the fields, and reading an answer into them. Never judges: a record knows no target."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from loadgen.client import REFUSALS, Answer
from loadgen.dialects import Dialect, Usage
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


class Incident(msgspec.Struct, frozen=True, order=True):
    """Something that befell a worker: when it was seen, as the router told it."""

    at_s: float
    text: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """How the records came to be: enough to repeat it. The first line of a records file."""

    run: int = 1
    target: str
    model: str
    trace_name: str
    trace_digest: str
    trace_notes: dict[str, int | float | str] = {}
    trace_bad_rows: int = 0
    dialect: str = "completions"
    seed: int
    speed: float
    stripped_share: float
    duration_s: float  # offered time
    warmup_s: float = 0.0  # of it, from the start: offered, but not judged
    wall_s: float
    started: str  # wall clock, for people
    machine: str
    version: str
    client_cpu_s: float
    clients: int = 1  # processes
    is_interrupted: bool = False
    not_reached: int = 0  # rows that were never offered: their time came after the offered time
    budgets: dict[str, dict[str, float | None]] = {}
    budgets_from: str = ""
    incidents: list[Incident] = []

    @property
    def judged_s(self) -> float:
        """The offered time that counts."""
        return max(self.duration_s - self.warmup_s, 1e-9)


def judged_of(run: Run, records: Iterable[Record]) -> list[Record]:
    """Without those that were meant for the warm-up: caches fill then, and a server learns its own pace."""
    return [one for one in records if one.intended_s is None or one.intended_s >= run.warmup_s]


def fill(record: Record, answer: Answer, origin: float, dialect: Dialect) -> None:
    """Write an answer, whole or broken, into its record."""
    headers = answer.headers
    record.status, record.attempts = answer.status, answer.attempts
    record.end_s = round(answer.ended_at - origin, 6)
    record.assigned_class = headers.get("x-headway-class", "")
    record.class_reason = headers.get("x-headway-class-reason", "")
    record.worker = headers.get("x-headway-worker", "")
    if answer.status in REFUSALS:
        record.outcome, record.reason = "refused", _reason(answer.body(), f"status {answer.status}")
    elif answer.status != 200:
        record.outcome, record.reason = "failed", answer.error or _reason(answer.body(), f"status {answer.status}")
    elif _is_stream(answer):
        _read_stream(record, answer, origin, dialect)
    else:
        _read_whole(record, answer, dialect)
    if answer.error:  # what had come before is kept: those tokens were made, and wasted
        record.outcome, record.reason = "failed", answer.error


def cut(record: Record, answer: Answer, outcome: Outcome, origin: float, dialect: Dialect) -> None:
    """Write what had come before the client hung up, at `answer.ended_at`. Who waited to come back stays refused."""
    fill(record, answer, origin, dialect)
    if record.outcome != "refused":
        record.outcome, record.reason = outcome, ""


def is_read(answer: Answer, dialect: Dialect) -> bool:
    """Whether a stream has brought its first text: a ping or an opening is not yet something to read."""
    if not _is_stream(answer):
        return False
    events = (_object(data) for _, data in answer.events())
    return any(event is not None and dialect.says(event) == "text" for event in events)


def _is_stream(answer: Answer) -> bool:
    return answer.headers.get("content-type", "").startswith("text/event-stream")


def _read_stream(record: Record, answer: Answer, origin: float, dialect: Dialect) -> None:
    """An answer is done when its dialect says that it is, and not before: an error event, or silence, is a failure."""
    cut_short = "the stream ended without [DONE]" if dialect.has_done else "the stream ended without message_stop"
    record.outcome, record.reason = "failed", cut_short
    for at, data in answer.events():
        if dialect.has_done and data == b"[DONE]":
            record.outcome, record.reason = "done", ""
            return
        event = _object(data)
        if event is None:
            record.reason = "an event that is not a JSON object"
            return
        said = dialect.says(event)
        if said == "error":
            record.reason = _reason(data, "an error event")
            return
        if said == "text":
            record.token_s.append(round(at - origin, 6))
        elif said == "end":
            record.outcome, record.reason = "done", ""
            return
        _read_usage(record, dialect.usage(event))


def _read_whole(record: Record, answer: Answer, dialect: Dialect) -> None:
    body = _object(answer.body())
    if body is None or not dialect.is_answer(body):
        record.outcome, record.reason = "failed", "the answer is not a completion"
        return
    record.outcome = "done"
    _read_usage(record, dialect.usage(body))


def _read_usage(record: Record, usage: Usage | None) -> None:
    """The last that was said: Anthropic's streams begin with a first count and end with the final one."""
    if usage is None:
        return
    record.prompt_tokens = record.prompt_tokens if usage.prompt is None else usage.prompt
    record.completion_tokens = record.completion_tokens if usage.completion is None else usage.completion
    record.cached_tokens = record.cached_tokens if usage.cached is None else usage.cached


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
    words = [str(error[key]) for key in ("code", "type", "message") if error.get(key)]
    words = [words[0], words[-1]] if len(words) > 2 else words  # OpenAI's code, or else the type, which Anthropic has
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
