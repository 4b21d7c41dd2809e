"""The world in virtual time: clients that obey, the real dispatcher, simulated workers, and a heap of what comes next.

Owns the clock and who waits for whom. Never decides what a policy decides; the same seed gives the same run, byte for
byte. Network, tokenising and frames take no time here: what is left is policy, prefill and decode."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engine.kv import keys
from engine.kv.keys import Ids
from engine.wire import Sampling, Submit
from loadgen.client import RETRIES_MAX, RETRY_AFTER_MAX_S
from loadgen.records import Record
from loadgen.replay import PATIENCE_S
from loadgen.sim.aggregate import AggregateWorker
from loadgen.sim.guise import Guises, Names
from loadgen.sim.profiles import Profile
from loadgen.sim.script import Failure
from loadgen.sim.turns import Turns
from loadgen.sim.worker import MODEL, ROOT, Attempt, News, SimWorker
from loadgen.traces import Slo, Trace, ideal_cached
from policies.actions import Action, Cancel, Dispatch, Reject, Tokenise, WakeAt
from policies.api import EnginePolicy, RouterPolicy
from policies.dispatcher import Dispatcher
from policies.events import Arrived, Event, Failed, Gone, Offered, Started, Tick, WorkerLost
from policies.limits import Limits
from policies.request import RequestId, WorkerId
from policies.reservations import Counts


class Recorder(Protocol):
    """Who writes down what the dispatcher saw and said."""

    def write(self, now: float, event: Event, actions: Sequence[Action]) -> None: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated, the trace aside."""

    router: RouterPolicy
    engine: EnginePolicy | None  # None: Headway's
    profiles: tuple[Profile, ...]  # one a worker
    limits: Limits = field(default_factory=Limits)
    seed: int = 1
    duration_s: float = 60.0  # nothing is offered later
    grace_s: float = 30.0  # what is open then is unfinished
    load: float = 1.0  # divides the times at which sessions start, never the gaps inside them
    stripped_share: float = 0.2
    is_oracle: bool = False
    is_fused: bool = True
    is_aggregate: bool = False  # workers are rates instead of steps: for large fleets, and labelled
    failures: tuple[Failure, ...] = ()


@dataclass(slots=True, eq=False)
class _Turn:
    """One request of one client, until its record is closed."""

    record: Record
    ids: Ids
    request_id: RequestId
    attempt: Attempt | None = None
    handle: int = 0
    on: int = -1
    is_closed: bool = False


def _worker(setting: Setting, number: WorkerId) -> SimWorker | AggregateWorker:
    profile = setting.profiles[number]
    if setting.is_aggregate:
        return AggregateWorker(number, profile)
    return SimWorker(number, profile, setting.engine, 1000 * setting.seed + number, is_fused=setting.is_fused)


class World:
    """One run. `run` returns the records; `recorder` sees every call of the dispatcher."""

    def __init__(self, trace: Trace, setting: Setting, recorder: Recorder | None = None) -> None:
        self.records: list[Record] = []
        self.now = 0.0
        self.events = 0
        self._trace = trace
        self._setting = setting
        self._recorder = recorder
        self._dispatcher = Dispatcher(setting.router, setting.limits, np.random.default_rng(setting.seed))
        self.workers = [_worker(setting, WorkerId(n)) for n in range(len(setting.profiles))]
        self._block_tokens = setting.profiles[0].block_tokens
        self._guises = Guises(trace, MODEL, setting.seed, setting.stripped_share, setting.is_oracle)
        self._names = Names(trace)
        self._ideal = ideal_cached(trace)
        self._order = Turns(trace)
        self._turns: dict[RequestId, _Turn] = {}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._handles = itertools.count(1)
        self._due = [math.inf] * len(self.workers)  # when each one's step ends
        self._is_down = [False] * len(self.workers)
        self._wake_at = math.inf
        self._inbox: deque[Event] = deque()
        self._is_handling = False

    def run(self) -> list[Record]:
        """Offer everything, and wait for what is open as long as the grace lasts."""
        self._handle(Started("", "", self._setting.seed, ""))
        for worker in self.workers:
            self._handle(worker.up())
        for start_s, index in self._order.roots(self._setting.load):
            if start_s <= self._setting.duration_s:
                self._at(start_s, self._offer, index, start_s)
        for failure in self._setting.failures:
            self._at(failure.at_s, self._fail, failure)
        heap, until = self._heap, self._setting.duration_s + self._setting.grace_s
        while heap and heap[0][0] <= until:
            self.now, _, act, arguments = heapq.heappop(heap)
            self.events += 1
            act(*arguments)
        for turn in self._turns.values():
            self._write(turn, "refused" if turn.record.outcome == "refused" else "unfinished")
        return self.records

    @property
    def not_reached(self) -> int:
        """Rows that were not offered: their time came after the offered time."""
        return len(self._trace.rows) - len(self.records)

    @property
    def reservations(self) -> Counts:
        """Rooms that refusals kept, and how that ended."""
        return self._dispatcher.reservations

    def _at(self, at_s: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (at_s, next(self._numbers), act, arguments))

    # Clients ---------------------------------------------------------------------------------------------------------

    def _offer(self, index: int, intended_s: float) -> None:
        row, record = self._trace.rows[index], self._record(index, intended_s)
        record.sent_s = self.now
        turn = _Turn(record, self._names.ids(index), RequestId(""))
        patience_s = row.timeout_s or PATIENCE_S[row.request_class]
        self._at(intended_s + patience_s, self._lose_patience, turn)
        self._send(turn)

    def _send(self, turn: _Turn) -> None:
        if turn.is_closed:
            return
        turn.record.attempts += 1
        turn.record.outcome = "unfinished"
        turn.request_id = RequestId(f"r{turn.record.row}.{turn.record.attempts}")
        self._turns[turn.request_id] = turn
        self._handle(Offered(self._guises.request(turn.request_id, turn.record.row, turn.record.turn, self.now)))

    def _record(self, index: int, intended_s: float | None) -> Record:
        row = self._trace.rows[index]
        slo = row.slo if isinstance(row.slo, Slo) or row.slo is None else self._trace.header.slos[row.slo]
        record = Record(
            row=index,
            session=row.session_id,
            parent=row.parent,
            turn=self._order.number[index],
            user=row.user,
            request_class=row.request_class,
            gap=row.gap,
            stripped=self._guises.is_stripped(row),
            slo=slo,
            input_tokens=row.input_length,
            output_tokens=row.output_length,
            ideal_cached=self._ideal[index],
            intended_s=intended_s,
            outcome="unfinished" if intended_s is not None else "abandoned",
        )
        self.records.append(record)
        return record

    def _lose_patience(self, turn: _Turn) -> None:
        is_read = turn.attempt is not None and turn.attempt.stamps and turn.record.request_class != "data-processor"
        if turn.is_closed or is_read:  # who reads a stream stays
            return
        was_refused = turn.record.outcome == "refused"
        self._close(turn, "refused" if was_refused else "left")
        if turn.attempt is not None:
            self.workers[turn.on].abort(turn.handle, self.now)
            self._poke(turn.on)
        self._handle(Gone(turn.request_id))
        self._abandon(turn)

    def _close(self, turn: _Turn, outcome: str) -> None:
        self._turns.pop(turn.request_id, None)
        turn.is_closed = True
        self._write(turn, outcome)

    def _write(self, turn: _Turn, outcome: Any) -> None:
        record = turn.record
        record.outcome, record.end_s = outcome, self.now
        if turn.attempt is not None:
            record.token_s = turn.attempt.stamps
            record.completion_tokens = len(record.token_s)

    def _abandon(self, turn: _Turn) -> None:
        """The turns that a failure cost: those that an ideal server would have been asked within the time."""
        for index in self._order.lost(turn.record.row, self.now, self._setting.duration_s):
            self._record(index, None)

    def _finish(self, turn: _Turn) -> None:
        self._close(turn, "done")
        for index in self._order.ended(turn.record.row):
            at_s = self.now + self._order.delay_s(index)
            if at_s <= self._setting.duration_s:
                self._at(at_s, self._offer, index, at_s)

    # The mind --------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        """One event at a time, in order, as the live mind does."""
        self._inbox.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        while self._inbox:
            event = self._inbox.popleft()
            actions = self._dispatcher.handle(event, self.now)
            if self._recorder is not None:
                self._recorder.write(self.now, event, actions)
            for action in actions:
                self._carry_out(action)
        self._is_handling = False

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, WakeAt):
            if action.at < self._wake_at:
                self._wake_at = action.at
                self._at(max(action.at, self.now), self._tick, action.at)
            return
        turn = self._turns.get(action.request_id)
        if turn is None or isinstance(action, Cancel):  # who leaves has aborted its attempt already
            return
        if isinstance(action, Dispatch):
            self._dispatch(turn, action)
        elif isinstance(action, Tokenise):
            chain = keys.chain(ROOT, turn.ids, self._block_tokens)
            self._inbox.append(Arrived(turn.request_id, len(turn.ids), chain))
            turn.record.assigned_class, turn.record.class_reason = action.request_class.label, action.reason
        else:
            self._refuse(turn, action)

    def _tick(self, at_s: float) -> None:
        if at_s == self._wake_at:  # else an earlier one was asked for meanwhile
            self._wake_at = math.inf
            self._handle(Tick())

    def _refuse(self, turn: _Turn, action: Reject) -> None:
        """An obedient client comes back as told, twice at most."""
        record = turn.record
        record.status, record.reason = action.status, action.reason
        record.assigned_class = action.request_class.label
        wait_s = action.retry_after_s
        if wait_s is None or wait_s > RETRY_AFTER_MAX_S or record.attempts > RETRIES_MAX:
            self._close(turn, "refused")
            self._abandon(turn)
            return
        del self._turns[turn.request_id]
        record.outcome = "refused"
        self._at(self.now + wait_s, self._send, turn)

    def _dispatch(self, turn: _Turn, action: Dispatch) -> None:
        turn.on, turn.handle = int(action.worker), next(self._handles)
        row = self._trace.rows[turn.record.row]
        stamps = turn.attempt.stamps if turn.attempt is not None else []
        token = self._names.answer(turn.record.row)
        turn.attempt = Attempt(turn.request_id, token, stamps)
        turn.record.worker = f"w{turn.on}"
        order = Submit(
            handle=turn.handle,
            ids=np.concatenate((turn.ids, np.full(len(stamps), token, dtype=np.int32))).tobytes(),
            prompt_len=len(turn.ids),
            salt=b"",
            public_blocks=0,
            request_class=int(action.request_class),
            first_left_s=action.first_left_s,
            tpot_s=action.budget.tpot_s,
            deadline_left_s=action.deadline_left_s,
            session=row.session_id,
            sampling=Sampling(temperature=0.0, max_tokens=row.output_length, ignore_eos=True),
            call_ids=[token] if self._order.calls_tool[turn.record.row] else [],
        )
        self.workers[turn.on].submit(order, turn.attempt, self.now)
        self._poke(turn.on)

    # Workers ---------------------------------------------------------------------------------------------------------

    def _poke(self, number: int) -> None:
        """An order waits: a run under way is cut short, an idle worker begins."""
        worker = self.workers[number]
        at_s = worker.interrupt(self.now) if worker.is_busy else None
        if at_s is not None:
            self._due[number] = at_s
            self._at(at_s, self._settle, number, at_s)
        elif not worker.is_busy and self._due[number] > self.now:
            self._due[number] = self.now
            self._at(self.now, self._begin, number)

    def _begin(self, number: int) -> None:
        worker = self.workers[number]
        if worker.is_busy or self._is_down[number]:
            return
        at_s = worker.turn(self.now)
        if at_s is not None:
            self._due[number] = at_s
            self._at(at_s, self._settle, number, at_s)
            return
        self._due[number] = math.inf
        self._deliver(worker.tell(self.now))
        if not worker.is_idle:
            self._at(worker.blocked_until(self.now), self._begin, number)

    def _settle(self, number: int, at_s: float) -> None:
        if at_s != self._due[number] or not self.workers[number].is_busy:
            return  # it was cut short, or died
        news = self.workers[number].settle()
        self._begin(number)  # before the router hears of this step: its answer finds the next one under way
        self._deliver(news)

    def _deliver(self, news: News | None) -> None:
        if news is None:
            return
        self._handle(news.report)
        for request_id, cached_tokens in news.report.first_tokens:
            if turn := self._turns.get(request_id):
                turn.record.cached_tokens = cached_tokens
        for request_id, _ in news.report.finished:
            if turn := self._turns.get(request_id):
                turn.record.status = 200
                self._finish(turn)
        for request_id, reason in news.refused:
            self._handle(Failed(request_id, news.report.worker, reason))

    def _fail(self, failure: Failure) -> None:
        number = failure.worker
        worker = self.workers[number]
        if failure.kind == "stall":
            worker.stalled_s += failure.for_s
            self._poke(number)
        elif not self._is_down[number]:
            self._is_down[number], self._due[number] = True, math.inf
            lost = worker.die()
            self._handle(WorkerLost(worker.worker, "killed by the script"))
            for attempt in lost:
                if attempt.request_id in self._turns:
                    self._handle(Failed(attempt.request_id, worker.worker, "worker lost"))
            self._at(self.now + failure.for_s, self._return, number)

    def _return(self, number: int) -> None:
        self._is_down[number] = False
        self._handle(self.workers[number].up())
