"""Weka: real Claude Code sessions (callanjfox/kv-cache-tester), from the table of one row a request.

Owns the columns of weka_requests.csv and how block ids come back from counts of shared blocks. Never invents a gap:
think times are the recorded ones. Sub-agents are left out and counted, since the table does not say when they began."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from loadgen.compose import ordered
from loadgen.traces import Header, Row, Trace, TraceError

BLOCK_TOKENS = 64
COLUMNS = ("trace", "thread", "depth", "in", "out", "blocks", "lcp_blocks_prev", "think_time", "input_types")
USERS = 12


@dataclass(frozen=True, slots=True)
class WekaTurn:
    """One request of a session's main thread, before scaling."""

    input_length: int
    output_length: int
    blocks: int
    shared_blocks: int  # the leading blocks that the previous turn had too
    think_s: float
    is_human: bool


Sessions = dict[str, list[WekaTurn]]


def load(path: Path) -> tuple[Sessions, int]:
    """The main threads by session name, and how many rows of sub-agents were left out."""
    sessions: Sessions = {}
    left_out = 0
    for number, fields in enumerate(_table(path), 2):
        try:
            if fields["depth"] != "0":
                left_out += 1
                continue
            sessions.setdefault(fields["trace"], []).append(_turn(fields))
        except (KeyError, ValueError) as error:
            raise TraceError(f"{path}: line {number}: {error}") from error
    return sessions, left_out


def _table(path: Path) -> Iterator[dict[str, str]]:
    with path.open("rb") as raw:
        plain = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        reader = csv.DictReader(io.TextIOWrapper(plain, encoding="utf-8", newline=""))
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise TraceError(f"{path}: line 1: no column {min(missing)!r}: is this weka_requests.csv?")
        yield from reader


def _turn(fields: dict[str, str]) -> WekaTurn:
    return WekaTurn(
        input_length=max(1, int(fields["in"])),
        output_length=max(1, int(fields["out"])),
        blocks=int(fields["blocks"]),
        shared_blocks=int(fields["lcp_blocks_prev"]),
        think_s=max(0.0, float(fields["think_time"] or 0.0)),
        is_human="tool_result" not in fields["input_types"],
    )


def slice_of(sessions: Sessions, count: int, seed: int, duration_s: float, left_out: int = 0) -> Trace:
    """`count` whole sessions drawn by seed, beginning at random times in the first half of the duration."""
    rng = np.random.default_rng(seed)
    names = sorted(sessions)
    picked = rng.choice(len(names), size=min(count, len(names)), replace=False)
    starts = np.sort(rng.uniform(0.0, duration_s / 2, size=len(picked)))
    starts[:1] = 0.0
    users = rng.integers(1, USERS + 1, size=len(picked))
    rows = [
        row
        for index, start, user in zip(picked, starts, users, strict=True)
        for row in _rows(names[index], sessions[names[index]], float(start), f"user-{user:02d}")
    ]
    header = Header(
        block_size=BLOCK_TOKENS,
        hash_scope="local",
        source="callanjfox/kv-cache-tester, real Claude Code sessions",
        licence="Apache-2.0",
        notes={"seed": seed, "duration_s": duration_s, "sub_agent_rows_left_out": left_out},
    )
    return ordered(Trace(header, tuple(rows)))


def fitting(sessions: Sessions, divisor: int, context: int) -> Sessions:
    """The sessions whose longest turn fits the context after scaling; the others go whole."""
    return {
        name: turns
        for name, turns in sessions.items()
        if max(turn.input_length + turn.output_length for turn in turns) <= divisor * (context - 2)
    }


def _rows(name: str, turns: Iterable[WekaTurn], start_s: float, user: str) -> Iterator[Row]:
    ids: list[int] = []
    next_id = 0
    for number, turn in enumerate(turns):
        fresh = turn.blocks - min(turn.shared_blocks, len(ids))
        ids = ids[: turn.blocks - fresh] + list(range(next_id, next_id + fresh))
        next_id += fresh
        yield Row(
            timestamp=round(start_s * 1e3, 3) if number == 0 else None,
            delay=round(turn.think_s * 1e3, 3) if number else None,
            session_id=name,
            request_class="chatbot+",
            user=user,
            gap="none" if number == 0 else "human" if turn.is_human else "tool",
            input_length=turn.input_length,
            output_length=turn.output_length,
            hash_ids=ids,
        )
