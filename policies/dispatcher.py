"""The control plane as one reducer: an event and the time go in, actions come out.

Owns every request that is queued, held or running, and the fleet's ledger. Never waits, sleeps, logs or draws chance
of its own: the same events give the same actions, byte for byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from policies.actions import Action, Cancel, Dispatch, Tokenise, WakeAt
from policies.admission import QueueFlow, too_long
from policies.api import Admit, Forecast, Job, Key, Output, Prompt, Refuse, RouterPolicy, Verdict
from policies.chain import NO_CHAIN, sample
from policies.events import (
    Arrived,
    Event,
    Failed,
    Gone,
    Offered,
    PolicyFault,
    Reconfigured,
    Started,
    Stopped,
    Tick,
    WorkerLost,
    WorkerReport,
    WorkerUp,
)
from policies.intake import Intake, Place
from policies.lengths import Lengths
from policies.limits import Limits
from policies.lives import Finished, FirstToken, Live, OutOfPatience, Patience, State
from policies.ordering import Waiting, WaitingRoom
from policies.prefix_index import SeenIndex
from policies.pump import Pump
from policies.refusals import Refusals
from policies.request import Request, RequestClass, RequestId
from policies.reservations import Counts
from policies.retry import RetryBudget
from policies.sessions import Sessions
from policies.tasks import Tasks
from policies.trust import Trust
from policies.worker import Fleet

# What becomes of a request. What is not listed is late news of something settled, and is ignored.
TRANSITIONS: dict[tuple[State, type], str] = {
    (State.QUEUED, Gone): "_leave",
    (State.QUEUED, OutOfPatience): "_refuse_impatient",
    (State.TOKENISING, Arrived): "_take_tokens",
    (State.TOKENISING, Gone): "_leave",
    (State.TOKENISING, OutOfPatience): "_refuse_impatient",
    (State.HELD, Gone): "_leave",
    (State.HELD, OutOfPatience): "_refuse_impatient",
    (State.PLACED, FirstToken): "_begin",
    (State.PLACED, Finished): "_finish",  # an answer without tokens
    (State.PLACED, Failed): "_place_again",
    (State.PLACED, Gone): "_abort",
    (State.STREAMING, Finished): "_finish",
    (State.STREAMING, Failed): "_place_again",
    (State.STREAMING, Stopped): "_finish",
    (State.STREAMING, Gone): "_abort",
}

NO_OUTPUT = Output(0.0, 0.0, 0.0)

Load = Callable[[str], RouterPolicy]  # from PolicySpec JSON, for policies that are changed while it runs
Step = Callable[[Live, Any, float, list[Action]], None]


class Dispatcher:
    """Feed it events in order, carry out what it says. `rng` only spreads Retry-After."""

    def __init__(
        self, policy: RouterPolicy, limits: Limits, rng: np.random.Generator, load: Load | None = None
    ) -> None:
        self._trust = Trust(policy)
        self._load = load
        self._limits = limits
        self._rng = rng
        self._live: dict[RequestId, Live] = {}
        self._intake = Intake(limits)
        self._room = WaitingRoom(self._order_key, limits)
        self._retries = RetryBudget(limits.retry_ratio, limits.retry_burst)
        self._sessions = Sessions(limits.sessions_max, limits.templates_max)
        self._tasks = Tasks(limits.sessions_max, limits.task_slack_max_s)
        self._lengths = Lengths(limits.lengths_max)
        self._seen = SeenIndex(limits.seen_keys_max)
        self.fleet = Fleet(limits)
        self._refusals = Refusals(limits, self._room, self.fleet, rng)
        self._patience = Patience(self._live)
        self._wake_at = math.inf
        self._pump = Pump(
            self._room, partial(self._try_held, is_next=True), partial(self._try_held, is_next=False), limits
        )
        self._steps: dict[tuple[State, type], Step] = {on: getattr(self, name) for on, name in TRANSITIONS.items()}
        self._handlers: dict[type, Callable[[Any, float, list[Action]], None]] = {
            Offered: self._on_offered,
            Arrived: self._on_request,
            Gone: self._on_request,
            Stopped: self._on_request,
            Failed: self._on_request,
            WorkerUp: self._on_worker_up,
            WorkerReport: self._on_report,
            WorkerLost: self._on_worker_lost,
            PolicyFault: self._on_fault,
            Started: self._on_nothing,
            Reconfigured: self._on_reconfigured,
            Tick: self._on_tick,
        }

    @property
    def waiting_count(self) -> int:
        """Requests held for a worker."""
        return len(self._room)

    @property
    def live_count(self) -> int:
        """Requests that are not settled, in whatever state."""
        return len(self._live)

    @property
    def reservations(self) -> Counts:
        """Rooms kept for refused clients so far, and how that ended."""
        return self._room.reservations.counts

    def state(self, request_id: RequestId) -> State | None:
        """Where a request is; None when it is settled or was never offered."""
        live = self._live.get(request_id)
        return live.state if live is not None else None

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do because of `event`. `now` never goes back."""
        actions: list[Action] = []
        self._trust.learn(event)
        if self._room.reservations.due_at <= now:
            self._room.reservations.advance(now)
        self._handlers[type(event)](event, now, actions)
        leaves_at = self._patience.next_at()
        if leaves_at <= now:
            self._expire(now, actions)
            leaves_at = self._patience.next_at()
        self._schedule(min(self._pump.wanted_at, leaves_at), actions)
        return actions

    # Events -----------------------------------------------------------------------------------------------------------

    def _on_offered(self, event: Offered, now: float, actions: list[Action]) -> None:
        request = event.request
        assert request.id not in self._live, "request ids are the router's and unique"
        classified = self._trust.policy("classify", now).classify(request, self._sessions.view(request, now), now)
        self._sessions.note(request, classified, now)
        cls = classified.request_class
        live = Live(request, classified, State.QUEUED, leaves_at=request.arrived + self._patience_s(request, cls, now))
        live.is_reserved = self._room.reservations.claim(request, cls, now)
        is_continuing = self._sessions.is_continuing(request, now)
        if refusal := self._refusals.at_door(live, len(self._live), now, is_continuing=is_continuing):
            self._reject(live, refusal, now, actions)
            return
        place = self._intake.offer(request, cls)
        if place is Place.NONE:
            message = "Too many requests of this class wait to be tokenised."
            self._reject(live, Refuse(429, "tokenise-queue-full", message, 1.0), now, actions)
            return
        self._live[request.id] = live
        self._patience.watch(live)
        if place is Place.NOW:
            self._tokenise(live, actions)

    def _on_request(self, event: Arrived | Gone | Stopped | Failed, now: float, actions: list[Action]) -> None:
        live = self._live.get(event.request_id)
        if live is not None:
            self._step(live, event, now, actions)
            if not isinstance(event, Arrived):  # who arrives frees nothing
                self._pump.run(now, actions)

    def _on_worker_up(self, event: WorkerUp, now: float, actions: list[Action]) -> None:
        self.fleet.up(event, now)
        self._pump.run(now, actions)

    def _on_report(self, event: WorkerReport, now: float, actions: list[Action]) -> None:
        # Hot: once per engine step of every worker. Budget 15 us; bench/dispatcher.py.
        if event.worker not in self.fleet:
            return
        self.fleet.report(event.worker, event.load, event.step_model, now)
        for request_id, cached_tokens in event.first_tokens:
            if live := self._live.get(request_id):
                self._step(live, FirstToken(cached_tokens), now, actions)
        for request_id, output_tokens in event.finished:
            if live := self._live.get(request_id):
                self._step(live, Finished(output_tokens), now, actions)
        if event.stored:
            stored = sample(event.stored, self._limits.index_every_block).sampled()
            self.fleet.stored(event.worker, stored)
            self._seen.note(stored, now)
        if event.evicted:
            self.fleet.evicted(event.worker, sample(event.evicted, self._limits.index_every_block).sampled())
        self._pump.run(now, actions)

    def _on_worker_lost(self, event: WorkerLost, now: float, actions: list[Action]) -> None:
        del actions  # its requests come as Failed or Gone, each by the router's judgement
        self.fleet.lost(event.worker, now)

    def _on_fault(self, event: PolicyFault, now: float, actions: list[Action]) -> None:
        del actions
        self._trust.fault(event.stage, now)

    def _on_reconfigured(self, event: Reconfigured, now: float, actions: list[Action]) -> None:
        assert self._load is not None, "who sends this says how policies are loaded"
        self._trust.change(self._load(event.policy))
        self._trust.learn(event)  # the new one, too
        self._pump.run(now, actions)

    def _on_nothing(self, event: Event, now: float, actions: list[Action]) -> None:
        del event, now, actions

    def _on_tick(self, event: Tick, now: float, actions: list[Action]) -> None:
        del event
        self._wake_at = math.inf
        self._pump.run(now, actions)

    # Steps of one request, named in TRANSITIONS -----------------------------------------------------------------------

    def _step(self, live: Live, event: Any, now: float, actions: list[Action]) -> None:
        step = self._steps.get((live.state, type(event)))
        if step is not None:
            step(live, event, now, actions)

    def _take_tokens(self, live: Live, event: Arrived, now: float, actions: list[Action]) -> None:
        request, cls = live.request, live.classified.request_class
        self._free_intake(live, actions)
        limit = self.fleet.context_limit(request.model)
        if 0 < limit < event.tokens:
            self._reject(live, too_long(event.tokens, limit), now, actions)
            return
        chain = sample(event.chain, self._limits.index_every_block)
        seen_tokens = self._seen.blocks_seen(chain, now) * self.fleet.block_tokens(request.model)
        # At least one token is new: computing it makes the first logits.
        prompt = Prompt(event.tokens, max(1, event.tokens - seen_tokens), chain)
        output = self._lengths.expect(request, cls)
        promise = self._trust.policy("promise", now).promise(
            request, cls, prompt, output, self.fleet.profile(request.model)
        )
        live.job = Job(
            request=request,
            request_class=cls,
            reason=live.classified.reason,
            prompt=prompt,
            output=output,
            promise=self._tasks.loosen(request, cls, promise, now),
            is_continuing=self._sessions.is_continuing(request, now),
            is_reserved=live.is_reserved,
        )
        self._decide(live, live.job, now, actions)

    def _leave(self, live: Live, event: Gone, now: float, actions: list[Action]) -> None:
        del event
        self._stop_waiting(live, actions)
        self._sessions.left_early(live.request, now)
        self._give_up(live, now)

    def _refuse_impatient(self, live: Live, event: OutOfPatience, now: float, actions: list[Action]) -> None:
        del event
        self._stop_waiting(live, actions)
        message = "No worker could start this request before its client leaves."
        self._reject(live, Refuse(503, "patience", message, self._refusals.drain_s(live)), now, actions)

    def _begin(self, live: Live, event: FirstToken, now: float, actions: list[Action]) -> None:
        del actions
        assert live.charge is not None
        live.state = State.STREAMING
        live.cached_tokens = event.cached_tokens
        live.charge.ledger.start(live.charge, now)

    def _finish(self, live: Live, event: Finished | Stopped, now: float, actions: list[Action]) -> None:
        del actions
        assert live.job is not None
        assert live.charge is not None
        self._lengths.learn(live.request, live.classified.request_class, event.output_tokens, now)
        self._sessions.answered(live.request, now)
        self._tasks.ended(live.request, live.classified.request_class, live.job.promise, now)
        paid_s = live.charge.ledger.cost_s(live.job.prompt.tokens, live.cached_tokens, event.output_tokens)
        self._room.given(live.job, paid_s - live.booked_s)
        self._release(live)
        self._forget(live)

    def _place_again(self, live: Live, event: Failed, now: float, actions: list[Action]) -> None:
        job = live.job
        assert job is not None
        assert live.charge is not None
        if event.worker != live.charge.ledger.worker:
            return  # of an attempt before this one
        if live.state is State.STREAMING:  # a client that has been reading waits for the rest as long as for the start
            waited_s = now - live.request.arrived
            job = replace(job, promise=replace(job.promise, patience_s=waited_s + job.promise.patience_s))
            live.leaves_at = live.request.arrived + job.promise.patience_s
        self._release(live)
        if job.attempt >= self._limits.attempts_max or not self._retries.spend():
            message = f"The request failed on {job.attempt} workers."
            self._reject(live, Refuse(503, "attempts", message, 1.0), now, actions)
            return
        live.job = replace(job, attempt=job.attempt + 1, avoid=event.worker)
        live.state = State.HELD  # nobody's, until it is decided
        self._patience.watch(live)
        self._decide(live, live.job, now, actions)

    def _abort(self, live: Live, event: Gone, now: float, actions: list[Action]) -> None:
        del event
        assert live.charge is not None
        if live.state is State.PLACED:
            self._sessions.left_early(live.request, now)
        actions.append(Cancel(live.request.id, live.charge.ledger.worker, "client left"))
        self._release(live)
        self._give_up(live, now)

    # Deciding ---------------------------------------------------------------------------------------------------------

    def _decide(self, live: Live, job: Job, now: float, actions: list[Action]) -> None:
        is_next = not self._room.is_anyone_before(job.request.model, job.request_class, is_reserved=job.is_reserved)
        verdict, forecast = self._ask(job, now, is_next=is_next)
        if isinstance(verdict, Admit) and forecast is not None:
            self._dispatch(live, forecast, verdict.reason, now, actions)
        elif isinstance(verdict, Refuse):
            self._reject(live, verdict, now, actions)
        else:
            live.state = State.HELD
            self._room.push(job, forecast.cost_s if forecast is not None else 0.0, now)

    def _ask(self, job: Job, now: float, *, is_next: bool) -> tuple[Verdict, Forecast | None]:
        self.fleet.publish(now)
        forecasts = self._trust.policy("place", now).place(job, self.fleet, now)
        flow = QueueFlow(self._limits, self._room, self.fleet, is_next)
        return self._trust.policy("admit", now).admit(job, forecasts, flow, now), forecasts[0] if forecasts else None

    def _try_held(self, held: Waiting, now: float, actions: list[Action], *, is_next: bool) -> bool:
        """Ask for somebody who waits. Whether it went."""
        request_id = held.job.request.id
        verdict, forecast = self._ask(held.job, now, is_next=is_next)
        if not isinstance(verdict, Admit) or forecast is None:
            return False
        self._room.remove(request_id)
        self._dispatch(self._live[request_id], forecast, verdict.reason, now, actions)
        return True

    def _dispatch(self, live: Live, forecast: Forecast, reason: str, now: float, actions: list[Action]) -> None:
        job = live.job
        assert job is not None
        live.state = State.PLACED
        live.charge = self.fleet.charge(job, forecast, now)
        live.booked_s = forecast.cost_s
        self._room.given(job, forecast.cost_s)
        self._room.reservations.served(job.request)
        if job.attempt == 1:
            self._retries.earn()
        budget = job.promise.budget
        actions.append(
            Dispatch(
                request_id=job.request.id,
                worker=forecast.worker,
                request_class=job.request_class,
                budget=budget,
                first_left_s=job.first_left_s(now),
                deadline_left_s=job.request.arrived + budget.deadline_s - now,
                predicted_ttft_s=forecast.ttft_s,
                predicted_hit_tokens=forecast.hit_tokens,
                reason=reason,
                saved_s=job.promise.saved_s,
                is_reserved=job.is_reserved,
            )
        )

    def _reject(self, live: Live, refusal: Refuse, now: float, actions: list[Action]) -> None:
        actions.append(self._refusals.answer(live, refusal, now))
        self._give_up(live, now)

    # Bookkeeping ------------------------------------------------------------------------------------------------------

    def _patience_s(self, request: Request, request_class: RequestClass, now: float) -> float:
        """How long its client waits, known before there are tokens."""
        tokens = request.estimated_tokens
        unknown = Prompt(tokens, tokens, NO_CHAIN)
        return self._trust.policy("promise", now).promise(request, request_class, unknown, NO_OUTPUT, None).patience_s

    def _order_key(self, job: Job, work_s: float, now: float) -> tuple[Key, float]:
        return self._trust.policy("order", now).order(job, work_s, now)

    def _tokenise(self, live: Live, actions: list[Action]) -> None:
        live.state = State.TOKENISING
        actions.append(Tokenise(live.request.id, live.classified.request_class, live.classified.reason))

    def _free_intake(self, live: Live, actions: list[Action]) -> None:
        self._intake.leave(live.request, live.classified.request_class)
        while (request_id := self._intake.start_next()) is not None:
            self._tokenise(self._live[request_id], actions)

    def _stop_waiting(self, live: Live, actions: list[Action]) -> None:
        if live.state is State.HELD:
            self._room.remove(live.request.id)
        else:
            self._free_intake(live, actions)

    def _release(self, live: Live) -> None:
        assert live.charge is not None
        self.fleet.release(live.charge, has_started=live.state is State.STREAMING)
        live.charge = None

    def _give_up(self, live: Live, now: float) -> None:
        """It has no answer, or not all of it."""
        if live.job is not None:
            self._tasks.given_up(live.request, live.job.promise, now)
        self._forget(live)

    def _forget(self, live: Live) -> None:
        self._live.pop(live.request.id, None)

    def _expire(self, now: float, actions: list[Action]) -> None:
        for live in self._patience.expired(now):
            self._step(live, OutOfPatience(), now, actions)

    def _schedule(self, due_at: float, actions: list[Action]) -> None:
        """Ask for a Tick at the next moment when something is due by itself."""
        if due_at < self._wake_at:
            self._wake_at = due_at
            actions.append(WakeAt(due_at))
