"""Traces: what will be asked, when, and of which kind, as JSON lines that Mooncake's own files already are.

Owns the format: reading with a line number and a reason for every bad row, writing the same bytes for the same trace.
Never guesses a block size: without a header it is Mooncake's 512, and rows that do not fit are bad rows."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import zstandard

ClassName = Literal["chatbot+", "background-agent", "data-processor"]
Gap = Literal["none", "tool", "human"]
CLASSES: tuple[ClassName, ...] = ("chatbot+", "background-agent", "data-processor")

MOONCAKE_BLOCK = 512
LINE_BYTES_MAX = 4 * 1024 * 1024  # a 1M-token prompt in 16-token blocks is about 0.7 MB
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


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. A later turn of a session has `delay` (after the previous turn's end) and no timestamp."""

    timestamp: Milliseconds | None = None
    delay: Milliseconds | None = None
    session_id: str = ""
    request_class: ClassName = msgspec.field(name="class", default="chatbot+")
    user: str = ""
    gap: Gap = "none"
    input_length: Tokens
    output_length: Tokens
    slo: str | Slo | None = None
    timeout_s: Seconds | None = None
    hash_ids: list[int] = []


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
class _Reader:
    """Reads line by line, remembering what rows refer to."""

    header: Header = field(default_factory=Header)
    rows: list[Row] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)

    def take(self, line: bytes, number: int) -> None:
        """Keep one line, or raise ValueError with the reason."""
        if len(line) > LINE_BYTES_MAX:
            raise ValueError(f"the line is over {LINE_BYTES_MAX} bytes")
        parsed = msgspec.json.decode(line)
        if not isinstance(parsed, dict):
            raise ValueError("not a JSON object")
        if "trace" in parsed and number == 1:
            self.header = _header(parsed)
            return
        row = msgspec.convert({ALIASES.get(key, key): value for key, value in parsed.items()}, Row)
        self._check(row)
        if row.session_id:
            self.sessions.add(row.session_id)
        self.rows.append(row)

    def _check(self, row: Row) -> None:
        if (row.timestamp is None) == (row.delay is None):
            raise ValueError("needs a timestamp, or a delay after the session's previous turn; not both")
        if row.delay is not None and row.session_id not in self.sessions:
            raise ValueError(f"a delay, but no earlier turn of session {row.session_id!r}")
        if row.timestamp is not None and row.session_id in self.sessions:
            raise ValueError(f"a second first turn of session {row.session_id!r}: later turns have a delay")
        if isinstance(row.slo, str) and row.slo not in self.header.slos:
            raise ValueError(f"the header has no slo called {row.slo!r}")
        whole, rest = divmod(row.input_length, self.header.block_size)
        if row.hash_ids and not whole <= len(row.hash_ids) <= whole + bool(rest):
            raise ValueError(
                f"{len(row.hash_ids)} hash_ids, but {row.input_length} tokens are {whole + bool(rest)} blocks "
                f"of {self.header.block_size}: is the header's block_size right?"
            )


def _header(parsed: dict[str, Any]) -> Header:
    header = msgspec.convert(parsed, Header)
    if header.trace != 1:
        raise TraceError(f"line 1: trace format {header.trace} is not known; this reads 1")
    if "block_size" not in parsed:
        raise TraceError("line 1: a header must name its block_size")
    return header


def read(path: Path, strict: bool = False) -> Trace:
    """The trace in `path` (.zst and .gz too). Bad rows are left out and counted; `strict` raises at the first."""
    reader, bad, bad_count = _Reader(), [], 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            reader.take(line, number)
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from error
        except ValueError as error:  # msgspec's errors are ValueErrors, and name the key
            if strict or (number == 1 and b'"trace"' in line):
                raise TraceError(f"{path}: line {number}: {error}") from error
            bad_count += 1
            bad.append(BadRow(number, str(error)))
            del bad[REASONS_KEPT:]
    if not reader.rows:
        raise TraceError(f"{path}: no row can be used" + (f"; line {bad[0].line}: {bad[0].reason}" if bad else ""))
    return Trace(reader.header, tuple(reader.rows), tuple(bad), bad_count)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            yield from gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
        else:
            yield from raw


def encode(trace: Trace) -> bytes:
    """The trace as JSON lines; equal traces give equal bytes."""
    encoder = msgspec.json.Encoder(order="deterministic")
    header = msgspec.to_builtins(trace.header) | {"trace": 1, "block_size": trace.header.block_size}
    return encoder.encode_lines([{"trace": 1} | header, *trace.rows])


def write(trace: Trace, path: Path) -> None:
    """Write `encode`'s bytes, compressed as the suffix says; the same trace gives the same file."""
    plain = encode(trace)
    if path.suffix == ".zst":
        plain = zstandard.ZstdCompressor(level=10).compress(plain)
    elif path.suffix == ".gz":
        plain = gzip.compress(plain, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plain)


def nominal_starts_s(rows: Iterable[Row], turn_s: float = 0.0) -> list[float]:
    """When each row would start if every turn took `turn_s`."""
    at: dict[str, float] = {}
    starts = []
    for row in rows:
        start = row.timestamp / 1e3 if row.timestamp is not None else at[row.session_id] + (row.delay or 0.0) / 1e3
        at[row.session_id] = start + turn_s
        starts.append(start)
    return starts


def ideal_cached(trace: Trace) -> list[int]:
    """Tokens of each row that an infinite prefix cache would hold: the leading blocks sent within the hour.

    Answers are not counted: a synthesised next turn cannot repeat what the model really said."""
    starts = nominal_starts_s(trace.rows)
    seen: dict[tuple[str, int], float] = {}
    cached = [0] * len(trace.rows)
    for index in sorted(range(len(starts)), key=lambda index: (starts[index], index)):
        row, now, run = trace.rows[index], starts[index], 0
        scope = row.session_id if trace.header.hash_scope == "local" else ""
        names = [(scope, hash_id) for hash_id in row.hash_ids]
        while run < len(names) and now - seen.get(names[run], -IDEAL_CACHE_S * 2) <= IDEAL_CACHE_S:
            run += 1
        seen.update(dict.fromkeys(names, now))
        cached[index] = min(run * trace.header.block_size, row.input_length)
    return cached
