"""Replay: the trace against a server, open loop; each later turn when its session's previous answer has ended.

Owns pacing and the intended times that all latencies count from. Never caps what is in flight: a slow server does not
slow the load, and a turn that waits for its own session is late on the server's account, not the clock's."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from loadgen.client import Answer, Client, post_obediently
from loadgen.dialects import DIALECTS, Dialect, Name
from loadgen.prompts import Dresser, prompt_ids
from loadgen.records import Outcome, Record, cut, fill, is_read
from loadgen.texts import is_text
from loadgen.traces import ClassName, Row, Slo, Trace, ideal_cached, turn_names

GRACE_S = 30.0  # after the offered time, for answers under way; what is open then is unfinished
PREPARE_S = 0.02  # before its time a prompt is made: 8,000 ids take about 1 ms
# Client patience by class, as in the published budgets: for the first token of a stream, and for the whole of any other
# answer. A row's own timeout_s wins.
PATIENCE_S: dict[ClassName, float] = {"chatbot+": 30.0, "background-agent": 600.0, "data-processor": 900.0}

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Options:
    """How a trace is replayed."""

    model: str
    seed: int = 1
    speed: float = 1.0  # divides arrival times and gaps; it changes reuse, so more sessions are the better load
    duration_s: float = 60.0  # nothing is offered later
    stripped_share: float = 0.2
    dialect: Name = "completions"
    grace_s: float = GRACE_S
    share: tuple[int, int] = (0, 1)  # of the families: this one of so many clients


@dataclass(frozen=True, slots=True)
class Progress:
    """What has happened so far."""

    at_s: float
    offered: int
    open: int
    done: int
    other: int


@dataclass(slots=True)
class Replay:
    """One run. `records` fills as it goes, so that an interrupted run can be judged too."""

    trace: Trace
    client: Client
    options: Options
    clock: Clock = time.monotonic
    records: list[Record] = field(default_factory=list)
    origin: float = 0.0
    _dresser: Dresser = field(init=False)
    _dialect: Dialect = field(init=False)
    _ideal: list[int] = field(init=False)
    _done: int = 0
    _other: int = 0
    _names: list[str] = field(default_factory=list)
    _awaited: dict[str, asyncio.Future[float | None]] = field(default_factory=dict)  # turns that others wait for

    def __post_init__(self) -> None:
        self._dresser = Dresser(self.options.stripped_share, self.options.seed)
        self._dialect = DIALECTS[self.options.dialect]
        self._ideal = ideal_cached(self.trace)

    async def run(self, start_at: float | None = None) -> None:
        """Offer everything, and wait for what is open. When cancelled, what is open is unfinished."""
        self.origin = self.clock() if start_at is None else start_at
        self._names = turn_names(self.trace.rows)
        loop = asyncio.get_running_loop()
        self._awaited = {name: loop.create_future() for row in self.trace.rows for name in row.after}
        limit_s = self.options.duration_s + self.options.grace_s
        tasks: set[asyncio.Task[None]] = set()  # of sessions that have begun and not ended
        try:
            async with asyncio.timeout(limit_s):
                for family in self._families():
                    begin_s = self._first_s(family[0])
                    if begin_s > self.options.duration_s:
                        break
                    await self._sleep_until(begin_s - PREPARE_S)
                    for session in family:
                        task = asyncio.create_task(self._session(session))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                await asyncio.gather(*tasks)
        except TimeoutError:
            self.client.close()  # what is open is recorded as unfinished by its own cancellation, below
        finally:
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.client.close()
            self._forget_unsent()

    def _forget_unsent(self) -> None:
        """What an interrupted run had prepared but not sent was never offered."""
        self.records = [one for one in self.records if one.sent_s is not None or one.intended_s is None]

    @property
    def not_reached(self) -> int:
        """Rows that were not offered: their time came after the offered time, or the run was interrupted."""
        return len(self.trace.rows) - len(self.records)

    def progress(self) -> Progress:
        """For the progress line."""
        offered = len(self.records)
        return Progress(self.now(), offered, offered - self._done - self._other, self._done, self._other)

    def _families(self) -> list[list[list[int]]]:
        """Rows by session, sessions with their sub-agents, a row without a session alone; by the time they begin."""
        grouped: dict[str, dict[str, list[int]]] = {}
        for index, row in enumerate(self.trace.rows):
            family = grouped.setdefault(row.family or f"\0{index}", {})
            family.setdefault(row.session_id, []).append(index)
        families = [list(sessions.values()) for sessions in grouped.values()]
        first, step = self.options.share
        return sorted(families, key=lambda family: self._first_s(family[0]))[first::step]

    def _first_s(self, session: list[int]) -> float:
        first = self.trace.rows[session[0]].timestamp
        return (first or 0.0) / 1e3 / self.options.speed

    async def _session(self, session: list[int]) -> None:
        """Turn after turn; a turn that fails takes the rest of its session with it, and who waits for them."""
        end_s: float | None = self._first_s(session)
        for turn, index in enumerate(session):
            intended_s = await self._due_s(self.trace.rows[index], end_s)
            if intended_s is None:
                self._abandon(session, turn)
            if intended_s is None or intended_s > self.options.duration_s:
                self._end_all(session[turn:], None if intended_s is None else math.inf)
                return
            record = self._record(index, turn, intended_s)
            await self._request(index, record)
            self._done += record.outcome == "done"
            self._other += record.outcome != "done"
            end_s = record.end_s if record.outcome == "done" else None
            self._end_all([index], end_s)

    async def _due_s(self, row: Row, end_s: float | None) -> float | None:
        """When a turn is meant to start: its delay after the last of what it waits for; None if one of those failed."""
        others = [await self._awaited[name] for name in row.after]
        ends = [end_s, *others]
        known = [end for end in ends if end is not None]
        return max(known) + (row.delay or 0.0) / 1e3 / self.options.speed if len(known) == len(ends) else None

    def _end_all(self, indices: Iterable[int], end_s: float | None) -> None:
        """Tell who waits for these turns: when they ended, None if they failed, infinity if their time never came."""
        for index in indices:
            awaited = self._awaited.get(self._names[index])
            if awaited is not None and not awaited.done():
                awaited.set_result(end_s)

    def _record(self, index: int, turn: int, intended_s: float | None) -> Record:
        row = self.trace.rows[index]
        record = Record(
            row=index,
            session=row.session_id,
            parent=row.parent,
            turn=turn,
            user=row.user,
            request_class=row.request_class,
            gap=row.gap,
            stripped=self._dresser.is_stripped(row),
            slo=self._slo(row),
            input_tokens=row.input_length,
            output_tokens=row.output_length,
            ideal_cached=self._ideal[index],
            intended_s=intended_s,
            outcome="unfinished" if intended_s is not None else "abandoned",
        )
        self._other += intended_s is None
        self.records.append(record)
        return record

    def _slo(self, row: Row) -> Slo | None:
        return self.trace.header.slos[row.slo] if isinstance(row.slo, str) else row.slo

    def _abandon(self, session: list[int], turn: int) -> None:
        """The turns that the failure cost: those that an ideal server would have been asked within the time."""
        at_s = self.now()
        for later in range(turn, len(session)):
            at_s += (self.trace.rows[session[later]].delay or 0.0) / 1e3 / self.options.speed
            if at_s > self.options.duration_s:
                return
            self._record(session[later], later, None)

    async def _request(self, index: int, record: Record) -> None:
        row = self.trace.rows[index]
        costume = self._dresser.costume(row)
        headers = {**self._dialect.headers, **costume.headers}
        ids = [] if is_text(row) else prompt_ids(self.trace, index, self.options.seed)
        payload = self._dialect.body(row, ids, costume, self.options.model)
        await self._sleep_until(record.intended_s or 0.0)
        record.sent_s = round(self.now(), 6)
        patience_s = row.timeout_s or PATIENCE_S[row.request_class]
        left_s = patience_s - (record.sent_s - (record.intended_s or 0.0))
        answer = Answer()
        try:
            async with self._patience(left_s, answer):
                await post_obediently(self.client, self._dialect.path, headers, payload, answer)
        except TimeoutError:
            self._cut(record, answer, "left")
        except asyncio.CancelledError:
            self._cut(record, answer, "unfinished")
            raise
        else:
            fill(record, answer, self.origin, self._dialect)

    @contextlib.asynccontextmanager
    async def _patience(self, left_s: float, answer: Answer) -> AsyncIterator[None]:
        """TimeoutError when it ends; who reads a stream by then stays, as people do and the simulator has it."""
        loop = asyncio.get_running_loop()

        def end() -> None:
            if not is_read(answer, self._dialect):
                scope.reschedule(loop.time())

        async with asyncio.timeout(None) as scope:
            ending = loop.call_later(left_s, end)
            try:
                yield
            finally:
                ending.cancel()

    def _cut(self, record: Record, answer: Answer, outcome: Outcome) -> None:
        answer.ended_at = self.clock()
        cut(record, answer, outcome, self.origin, self._dialect)

    async def _sleep_until(self, at_s: float) -> None:
        """uvloop counts whole milliseconds and may wake half of one early: nothing is sent before its time."""
        while (left_s := at_s - self.now()) > 0:  # noqa: ASYNC110  it waits for time alone
            await asyncio.sleep(left_s)

    def now(self) -> float:
        """Seconds since the run began."""
        return self.clock() - self.origin
