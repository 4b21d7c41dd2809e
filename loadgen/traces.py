"""Traces: what will be asked, when, and of which kind, as JSON lines that Mooncake's own files already are.

Owns the format: reading with a line number and a reason for every bad row, writing the same bytes for the same trace.
Never guesses a block size: without a header it is Mooncake's 512, and rows that do not fit are bad rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from loadgen import files, texts

ClassName = Literal["chatbot+", "background-agent", "data-processor"]
Gap = Literal["none", "tool", "human"]
CLASSES: tuple[ClassName, ...] = ("chatbot+", "background-agent", "data-processor")

MOONCAKE_BLOCK = 512
REASONS_KEPT = 20  # of bad rows; all are counted
IDEAL_CACHE_S = 3600.0  # the hour within which a prefix counts as sent (the rule that sets targets)

ALIASES = {"created_time": "timestamp", "input_tokens": "input_length", "output_tokens": "output_length"}
ALIASES |= {"delay_ms": "delay"}

Tokens = Annotated[int, msgspec.Meta(ge=1)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class TraceError(ValueError):
    """A trace that cannot be used; the message names file and line."""


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A row's own target; what is absent is the class's."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_s: float | None = None  # the other name of deadline_s; the tighter of the two holds
    deadline_s: float | None = None


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """The optional first line."""

    trace: int = 1
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = MOONCAKE_BLOCK
    hash_scope: Literal["global", "local"] = "global"
    slos: dict[str, Slo] = {}
    source: str = ""
    licence: str = ""
    notes: dict[str, int | float | str] = {}

    def noting(self, **notes: int | float | str) -> Header:
        """The same with more notes."""
        return msgspec.structs.replace(self, notes=self.notes | notes)


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. A later turn of a session has `delay` (after the previous turn's end) and no timestamp.

    A turn is named `session#n`, n from 0. `after` names turns that must have ended too before `delay` begins: how a
    sub-agent waits for the turn that called it, and its caller for the sub-agent."""

    timestamp: Milliseconds | None = None
    delay: Milliseconds | None = None
    session_id: str = ""
    parent: str = ""  # the session that this one is a sub-agent of
    after: list[str] = []
    request_class: ClassName = msgspec.field(name="class", default="chatbot+")
    user: str = ""
    gap: Gap = "none"
    input_length: Tokens
    output_length: Tokens
    slo: str | Slo | None = None
    timeout_s: Seconds | None = None
    recorded_ms: Milliseconds | None = None  # how long the recorded server took: only to guess when later turns start
    hash_ids: list[int] = []
    text_input: str = ""  # words of its own, or messages in the form of OpenAI's chat: sent as they stand
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []

    @property
    def family(self) -> str:
        """The session, or the one that called it: local block ids are shared within it, and so is fate."""
        return self.parent or self.session_id


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    """A header and its good rows in file order; `bad` holds the first of the `bad_count` others."""

    header: Header
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()
    bad_count: int = 0


@dataclass(slots=True)
class Tally:
    """Counts bad rows with line and reason as a file is read; `strict` stops at the first."""

    path: Path
    strict: bool
    bad: list[BadRow] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, reason: object) -> None:
        """One more row that cannot be used."""
        if self.strict:
            raise TraceError(f"{self.path}: line {line}: {reason}")
        self.count += 1
        if len(self.bad) < REASONS_KEPT:
            self.bad.append(BadRow(line, str(reason)))

    def trace(self, header: Header, rows: Sequence[Row]) -> Trace:
        """What could be used, if anything could."""
        if not rows:
            first = f"; line {self.bad[0].line}: {self.bad[0].reason}" if self.bad else ""
            raise TraceError(f"{self.path}: no row can be used{first}")
        return Trace(header, tuple(rows), tuple(self.bad), self.count)


@dataclass(slots=True)
class _Reader:
    """Reads line by line, remembering what rows refer to."""

    header: Header = field(default_factory=Header)
    rows: list[Row] = field(default_factory=list)
    turns: dict[str, int] = field(default_factory=dict)  # by session: how many so far

    def take(self, line: bytes, number: int) -> None:
        """Keep one line, or raise ValueError with the reason."""
        if len(line) > files.LINE_BYTES_MAX:
            raise ValueError(f"the line is over {files.LINE_BYTES_MAX} bytes")
        parsed = msgspec.json.decode(line)
        if not isinstance(parsed, dict):
            raise ValueError("not a JSON object")
        if "trace" in parsed and number == 1:
            self.header = _header(parsed)
            return
        fields: dict[str, Any] = {str(ALIASES.get(key, key)): value for key, value in parsed.items()}
        row = msgspec.convert(texts.sized(fields, self.header.block_size), Row)
        self._check(row)
        if row.session_id:
            self.turns[row.session_id] = self.turns.get(row.session_id, 0) + 1
        self.rows.append(row)

    def _check(self, row: Row) -> None:
        if (row.timestamp is None) == (row.delay is None):
            raise ValueError("needs a timestamp, or a delay after the session's previous turn; not both")
        if row.delay is not None and row.session_id not in self.turns and not row.after:
            raise ValueError(f"a delay, but no earlier turn of session {row.session_id!r}")
        if row.timestamp is not None and row.session_id in self.turns:
            raise ValueError(f"a second first turn of session {row.session_id!r}: later turns have a delay")
        if row.timestamp is not None and row.after:
            raise ValueError("a timestamp waits for nothing: what comes after other turns has a delay")
        if unknown := [name for name in row.after if not self._is_known(name)]:
            raise ValueError(f"after {unknown[0]!r}, which no earlier row is (turns are named session#n, n from 0)")
        if isinstance(row.slo, str) and row.slo not in self.header.slos:
            raise ValueError(f"the header has no slo called {row.slo!r}")
        whole, rest = divmod(row.input_length, self.header.block_size)
        if row.hash_ids and not whole <= len(row.hash_ids) <= whole + bool(rest):
            raise ValueError(
                f"{len(row.hash_ids)} hash_ids, but {row.input_length} tokens are {whole + bool(rest)} blocks "
                f"of {self.header.block_size}: is the header's block_size right?"
            )

    def _is_known(self, name: str) -> bool:
        session, _, number = name.rpartition("#")
        return number.isdecimal() and int(number) < self.turns.get(session, 0)


def _header(parsed: dict[str, Any]) -> Header:
    header = msgspec.convert(parsed, Header)
    if header.trace != 1:
        raise TraceError(f"line 1: trace format {header.trace} is not known; this reads 1")
    if "block_size" not in parsed:
        raise TraceError("line 1: a header must name its block_size")
    return header


def read(path: Path, strict: bool = False) -> Trace:
    """The trace in `path` (.zst and .gz too). Bad rows are left out and counted; `strict` raises at the first."""
    reader, tally = _Reader(), Tally(path, strict)
    for number, line in enumerate(files.lines(path), 1):
        if not line.strip():
            continue
        try:
            reader.take(line, number)
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from error
        except ValueError as error:  # msgspec's errors are ValueErrors, and name the key
            if number == 1 and b'"trace"' in line:
                raise TraceError(f"{path}: line {number}: {error}") from error
            tally.add(number, error)
    spoken = sum(map(texts.is_text, reader.rows))
    header = reader.header.noting(text_rows=spoken) if spoken else reader.header
    return tally.trace(header, reader.rows)


def encode(trace: Trace) -> bytes:
    """The trace as JSON lines; equal traces give equal bytes."""
    encoder = msgspec.json.Encoder(order="deterministic")
    header = msgspec.to_builtins(trace.header) | {"trace": 1, "block_size": trace.header.block_size}
    return encoder.encode_lines([{"trace": 1} | header, *trace.rows])


def write(trace: Trace, path: Path) -> None:
    """Write `encode`'s bytes, compressed as the suffix says; the same trace gives the same file."""
    files.write(encode(trace), path)


def turn_names(rows: Iterable[Row]) -> list[str]:
    """`session#n` for each row, empty for one without a session: what `after` refers to."""
    turns: dict[str, int] = {}
    names = []
    for row in rows:
        number = turns.get(row.session_id, 0)
        turns[row.session_id] = number + 1
        names.append(f"{row.session_id}#{number}" if row.session_id else "")
    return names


def nominal_starts_s(rows: Sequence[Row], turn_s: float = 0.0) -> list[float]:
    """When each row would start if every turn took as long as was recorded, or else `turn_s`."""
    ends: dict[str, float] = {}  # of turns by name, and of sessions' last turns by session
    starts = []
    for row, name in zip(rows, turn_names(rows), strict=True):
        if row.timestamp is not None:
            start = row.timestamp / 1e3
        else:
            before = [ends[name] for name in (row.session_id, *row.after) if name in ends]
            start = max(before) + (row.delay or 0.0) / 1e3
        end = start + (turn_s if row.recorded_ms is None else row.recorded_ms / 1e3)
        if row.session_id:
            ends[row.session_id] = ends[name] = end
        starts.append(start)
    return starts


def families(rows: Sequence[Row]) -> list[str]:
    """The session of each row, a sub-agent's being its caller's; a row without one is a session of its own."""
    return [row.family or f"\0{index}" for index, row in enumerate(rows)]


def cached_of(trace: Trace, keep_s: float) -> list[int]:
    """Tokens of each row that an endless prefix cache would hold: the leading blocks sent within `keep_s`.

    Answers are not counted: a synthesised next turn cannot repeat what the model really said."""
    starts = nominal_starts_s(trace.rows)
    seen: dict[str, dict[int, float]] = {}  # by scope, then block
    cached = [0] * len(trace.rows)
    for index in sorted(range(len(starts)), key=lambda index: (starts[index], index)):
        row, now, run = trace.rows[index], starts[index], 0
        known = seen.setdefault(row.family if trace.header.hash_scope == "local" else "", {})
        for at in map(known.get, row.hash_ids):
            if at is None or now - at > keep_s:
                break
            run += 1
        known.update(dict.fromkeys(row.hash_ids, now))
        cached[index] = min(run * trace.header.block_size, row.input_length)
    return cached


def ideal_cached(trace: Trace) -> list[int]:
    """The same, for the hour that sets targets."""
    return cached_of(trace, IDEAL_CACHE_S)
