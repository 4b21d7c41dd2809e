"""TraceLab: rounds of coding agents, a JSON line each: tokens, what came back from the cache, and when each event was.

Owns their fields. A prefix is what the provider's cache held; it is taken to be the beginning of the round before.
Never guesses what a first round hit: that belonged to sessions that are not in the file, and counts as new."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from loadgen import files
from loadgen.traces import Header, Row, Tally, Trace

BLOCK_TOKENS = 64  # Weka's, so that mixes agree; TraceLab tells prefixes in tokens
TOKENS_MAX = 4_194_304  # of a prompt: its blocks are made from this figure alone
INPUTS = ("user_message", "tool_result")


class Event(msgspec.Struct, frozen=True):
    """One of a round's events."""

    event_type: str
    timestamp: datetime


class Round(msgspec.Struct, frozen=True):
    """What is read of a line."""

    session_id: str
    input_tokens_total: int
    prefix_tokens: Annotated[int, msgspec.Meta(ge=0)]
    output_tokens: int
    timing_events: list[Event]
    project: str | None = None


@dataclass(slots=True)
class _Session:
    """A session as its rounds are read."""

    ids: list[int] = field(default_factory=list)
    next_id: int = 0
    ended_s: float | None = None

    def extended(self, tokens: int, prefix: int) -> list[int]:
        """The blocks of the next prompt: those that it shares with the one before, and fresh ones."""
        kept = self.ids[: min(prefix, tokens) // BLOCK_TOKENS]
        fresh = max(0, tokens // BLOCK_TOKENS - len(kept))
        self.next_id += fresh
        self.ids = kept + list(range(self.next_id - fresh, self.next_id))
        return self.ids


def load(path: Path, strict: bool = False) -> Trace:
    """The rounds in file order, times from the earliest one's."""
    tally, decoder = Tally(path, strict), msgspec.json.Decoder(Round)
    rows: list[tuple[float, Row]] = []  # each with the moment at which it was asked for
    sessions: dict[str, _Session] = {}
    for number, text in enumerate(files.lines(path), 1):
        if not text.strip():
            continue
        try:
            said = decoder.decode(text)
            start_s, end_s = _span_s(said)
            rows.append((start_s, _row(said, sessions.setdefault(said.session_id, _Session()), start_s, end_s)))
        except ValueError as error:
            tally.add(number, error)
    origin_s = min((start_s for start_s, _ in rows), default=0.0)
    timed = [_from(row, start_s - origin_s) for start_s, row in rows]
    source = "uw-syfi/TraceLab (arXiv 2606.30560)"
    return tally.trace(Header(block_size=BLOCK_TOKENS, hash_scope="local", source=source), timed)


def _from(row: Row, at_s: float) -> Row:
    return row if row.timestamp is None else msgspec.structs.replace(row, timestamp=round(at_s * 1e3, 3))


def _span_s(said: Round) -> tuple[float, float]:
    """A round is asked for when its last input has come, and ends with its last event."""
    inputs = [event.timestamp.timestamp() for event in said.timing_events if event.event_type in INPUTS]
    if not inputs:
        raise ValueError("a round without a message or a tool's result: when it began is not known")
    return max(inputs), max(event.timestamp.timestamp() for event in said.timing_events)


def _row(said: Round, session: _Session, start_s: float, end_s: float) -> Row:
    if said.input_tokens_total > TOKENS_MAX:
        raise ValueError(f"a prompt of {said.input_tokens_total} tokens: over {TOKENS_MAX}")
    plain = {
        "session_id": said.session_id,
        "user": said.project or "",
        "input_length": said.input_tokens_total,
        "output_length": said.output_tokens,
        "recorded_ms": round((end_s - start_s) * 1e3, 3),
    }
    if session.ended_s is None:
        plain["timestamp"] = 0.0
    else:
        is_human = any(event.event_type == "user_message" for event in said.timing_events)
        plain["delay"] = round(max(0.0, start_s - session.ended_s) * 1e3, 3)
        plain["gap"] = "human" if is_human else "tool"
    row = msgspec.convert(plain, Row)
    session.ended_s = end_s
    return msgspec.structs.replace(row, hash_ids=list(session.extended(row.input_length, said.prefix_tokens)))
