"""Weka: real Claude Code sessions (callanjfox/kv-cache-tester), from its archive of JSON files or the table made of it.

Owns both layouts, how block ids come back from the table's counts, and where sub-agents hang. Never invents a gap."""

# A sub-agent's marker is stamped when it ended: markers less their duration fall on the end of the turn before, so its
# caller's next turn waits for it. Its own requests count from its own start.

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from loadgen import files
from loadgen.compose import ordered
from loadgen.traces import Header, Row, Tally, Trace, TraceError

BLOCK_TOKENS = 64
COUNTS = ("blocks", "lcp_blocks_prev", "seen_prefix_blocks")
COLUMNS = ("trace", "thread", "in", "out", *COUNTS, "api_time", "think_time", "input_types")
USERS = 12
SOURCE = "callanjfox/kv-cache-tester, real Claude Code sessions"

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Time = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Call(msgspec.Struct, frozen=True):
    """One request as recorded; lengths in tokens, times in seconds."""

    input_length: Count = msgspec.field(name="in")
    output_length: Count = msgspec.field(name="out")
    t: Time = 0.0
    hash_ids: list[int] = []
    input_types: list[str] = []
    api_time: Time | None = None
    think_time: Time | None = None


class SubAgent(msgspec.Struct, frozen=True):
    """A nested session; `t` is its end."""

    agent_id: str
    t: Time
    requests: list[Call]
    duration_ms: Time | None = None

    @property
    def lasted_s(self) -> float:
        """As recorded, or until its last answer."""
        if self.duration_ms is not None:
            return self.duration_ms / 1e3
        return max((call.t + (call.api_time or 0.0) for call in self.requests), default=0.0)


class _Kind(msgspec.Struct, frozen=True):
    type: str = "n"


class _File(msgspec.Struct, frozen=True):
    """One session's JSON file."""

    id: str
    block_size: int
    hash_id_scope: str
    requests: list[msgspec.Raw]


@dataclass(frozen=True, slots=True)
class Session:
    """A whole session: the main thread's rows and its sub-agents', in order; the first starts at 0."""

    name: str
    rows: tuple[Row, ...]

    @property
    def longest(self) -> int:
        """Tokens of its longest turn with its answer."""
        return max(row.input_length + row.output_length for row in self.rows)


@dataclass(slots=True)
class _Weaver:
    """Turns the calls of one session into rows, thread by thread, with the edges between them."""

    name: str
    rows: list[Row] = field(default_factory=list)
    turns: dict[str, int] = field(default_factory=dict)
    ids: dict[int, int] = field(default_factory=dict)  # one object an id: a session names each of them many times
    waits: list[str] = field(default_factory=list)  # sub-agents' last turns, which the main thread's next one awaits

    def main(self, call: Call, delay_s: float | None = None) -> None:
        """A call of the main thread; `delay_s` after what it waits for, else its think time."""
        is_first = self.name not in self.turns
        wait_s = (call.think_time or 0.0) if delay_s is None else delay_s
        self._add(self.name, call, None if is_first else wait_s, self.waits, parent="")
        self.waits = []

    def sub_agent(self, agent: str, calls: Iterable[Call], delay_s: float) -> None:
        """A nested session, `delay_s` after the main thread's last turn."""
        name = f"{self.name}/{agent}"
        caller = [f"{self.name}#{self.turns[self.name] - 1}"] if self.name in self.turns else []
        for number, call in enumerate(calls):
            wait_s = (call.think_time or 0.0) if number else delay_s
            is_root = not (number or caller)
            self._add(name, call, None if is_root else wait_s, [] if number else caller, self.name)
        if name in self.turns:
            self.waits.append(f"{name}#{self.turns[name] - 1}")

    def _add(self, name: str, call: Call, delay_s: float | None, after: list[str], parent: str) -> None:
        number = self.turns.get(name, 0)
        self.turns[name] = number + 1
        is_tool = "tool_result" in call.input_types
        is_timed = delay_s is None
        self.rows.append(
            Row(
                timestamp=0.0 if is_timed else None,
                delay=None if delay_s is None else round(delay_s * 1e3, 3),
                session_id=name,
                parent=parent,
                after=[] if is_timed else after,
                gap="none" if is_timed or not number else "tool" if is_tool else "human",
                input_length=max(1, call.input_length),
                output_length=max(1, call.output_length),
                recorded_ms=None if call.api_time is None else round(call.api_time * 1e3, 3),
                hash_ids=list(map(self.ids.setdefault, call.hash_ids, call.hash_ids)),
            )
        )


def sessions_of(path: Path, tally: Tally) -> list[Session]:
    """All sessions of an archive or of a table. A session with a bad row goes whole."""
    return list(_archive(path, tally) if ".tar" in path.suffixes else _table(path, tally))


def load(path: Path, strict: bool = False) -> Trace:
    """Every session from time 0: what `describe` and `convert` read."""
    tally = Tally(path, strict)
    sessions = sessions_of(path, tally)
    return tally.trace(_header(), [row for session in sessions for row in session.rows])


def _header(**notes: int | float) -> Header:
    return Header(block_size=BLOCK_TOKENS, hash_scope="local", source=SOURCE, licence="Apache-2.0", notes=dict(notes))


def _archive(path: Path, tally: Tally) -> Iterator[Session]:
    for number, (member, content) in enumerate(files.members(path, ".json"), 1):
        try:
            yield _session(content)
        except ValueError as error:
            tally.add(number, f"{member}: {error or 'too large'}")


def _session(content: bytes) -> Session:
    file = msgspec.json.decode(content, type=_File)
    if (file.block_size, file.hash_id_scope) != (BLOCK_TOKENS, "local"):
        raise ValueError(f"blocks of {file.block_size}, scope {file.hash_id_scope}: expected 64, local")
    weave, turn_end_s, agents_end_s = _Weaver(file.id), 0.0, 0.0
    for raw in file.requests:
        if msgspec.json.decode(raw, type=_Kind).type == "subagent":
            agent = msgspec.json.decode(raw, type=SubAgent)
            weave.sub_agent(agent.agent_id, agent.requests, max(0.0, agent.t - agent.lasted_s - turn_end_s))
            agents_end_s = max(agents_end_s, agent.t)
        else:
            call = msgspec.json.decode(raw, type=Call)
            weave.main(call, max(0.0, call.t - max(turn_end_s, agents_end_s)) if weave.waits else None)
            turn_end_s = call.t + (call.api_time or 0.0)
    if not weave.rows:
        raise ValueError("a session without requests")
    return Session(file.id, tuple(weave.rows))


def _table(path: Path, tally: Tally) -> Iterator[Session]:
    """Rows of one session follow each other; a sub-agent's stand behind the turn that called it."""
    group: list[tuple[int, dict[str, str]]] = []
    for numbered in _fields(path):
        if group and numbered[1]["trace"] != group[0][1]["trace"]:
            yield from _from_table(group, tally)
            group = []
        group.append(numbered)
    if group:
        yield from _from_table(group, tally)


def _fields(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with files.opened(path) as plain:
        reader = csv.DictReader(io.TextIOWrapper(plain, encoding="utf-8", newline=""))
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise TraceError(f"{path}: line 1: no column {min(missing)!r}: is this weka_requests.csv?")
        yield from enumerate(reader, 2)


def _from_table(group: list[tuple[int, dict[str, str]]], tally: Tally) -> Iterator[Session]:
    ids, weave, reading = _Ids(), _Weaver(group[0][1]["trace"]), 0
    threads: list[tuple[str, list[Call]]] = []
    try:
        for reading, fields in group:  # noqa: B007  the line that a refusal names
            call = _call(fields, ids.next(fields["thread"], *(int(fields[name]) for name in COUNTS)))
            if threads and threads[-1][0] == fields["thread"]:
                threads[-1][1].append(call)
            else:
                threads.append((fields["thread"], [call]))
    except (TypeError, ValueError) as error:
        tally.add(reading, error)
        return
    for thread, calls in threads:
        if thread == "0":
            _main_of_table(weave, calls)
        else:
            weave.sub_agent(thread.removeprefix("0/"), calls, 0.0)
    yield Session(weave.name, tuple(weave.rows))


def _main_of_table(weave: _Weaver, calls: list[Call]) -> None:
    """The table does not say when a sub-agent ended, but its think time spans it: what is left of it is the delay."""
    for call in calls:
        nested_s = [_length_s(weave.rows, name.rpartition("#")[0]) for name in weave.waits]
        weave.main(call, max(0.0, (call.think_time or 0.0) - max(nested_s)) if nested_s else None)


def _length_s(rows: Iterable[Row], session: str) -> float:
    return sum((row.delay or 0.0) + (row.recorded_ms or 0.0) for row in rows if row.session_id == session) / 1e3


def _call(fields: Mapping[str, str], hash_ids: list[int]) -> Call:
    plain = {
        "in": int(fields["in"]),
        "out": int(fields["out"]),
        "hash_ids": hash_ids,
        "input_types": fields["input_types"].split("+"),
        "api_time": float(fields["api_time"]) if fields["api_time"] else None,
        "think_time": max(0.0, float(fields["think_time"])) if fields["think_time"] else None,
    }
    return msgspec.convert(plain, Call)


@dataclass(slots=True)
class _Ids:
    """Block ids from counts: how many leading blocks the thread's turn before had too, and how many any turn had."""

    next_id: int = 0
    earlier: list[list[int]] = field(default_factory=list)
    last: dict[str, list[int]] = field(default_factory=dict)  # by thread

    def next(self, thread: str, blocks: int, shared: int, seen: int) -> list[int]:
        """A new turn's ids. Ids are handed out once, so two lists that agree at one place agree before it."""
        known = self._source(self.last.get(thread, []), shared, seen)[: min(blocks, max(shared, seen))]
        fresh = list(range(self.next_id, self.next_id + blocks - len(known)))
        self.next_id += len(fresh)
        self.last[thread] = known + fresh
        self.earlier.append(self.last[thread])
        return self.last[thread]

    def _source(self, last: list[int], shared: int, seen: int) -> list[int]:
        """The latest turn with as many blocks as were seen that parts from the turn before where this one does."""
        if seen <= shared:
            return last
        for ids in reversed(self.earlier):
            parts = ids[shared : shared + 1] != last[shared : shared + 1]
            if len(ids) >= seen and parts and ids[:shared][-1:] == last[:shared][-1:]:
                return ids
        return last[:shared]


def fitting(sessions: Iterable[Session], divisor: int, context: int) -> list[Session]:
    """The sessions whose longest turn fits the context after scaling; the others go whole."""
    return [session for session in sessions if session.longest <= divisor * (context - 2)]


def slice_of(sessions: Iterable[Session], count: int, seed: int, duration_s: float) -> Trace:
    """`count` whole sessions drawn by seed, beginning at random times in the first half of the duration."""
    rng = np.random.default_rng(seed)
    by_name = sorted(sessions, key=lambda session: session.name)
    picked = rng.choice(len(by_name), size=min(count, len(by_name)), replace=False)
    starts = np.sort(rng.uniform(0.0, duration_s / 2, size=len(picked)))
    starts[:1] = 0.0
    users = rng.integers(1, USERS + 1, size=len(picked))
    rows = [
        _placed(row, float(start), f"user-{user:02d}")
        for index, start, user in zip(picked, starts, users, strict=True)
        for row in by_name[index].rows
    ]
    return ordered(Trace(_header(seed=seed, duration_s=duration_s), tuple(rows)))


def _placed(row: Row, start_s: float, user: str) -> Row:
    timestamp = None if row.timestamp is None else round(start_s * 1e3, 3)
    return msgspec.structs.replace(row, timestamp=timestamp, user=user)
