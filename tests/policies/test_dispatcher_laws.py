"""Laws of the dispatcher under any order of events: a world of clients and workers that do whatever they please."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from policies.actions import Action, Cancel, Dispatch, Reject, Tokenise, WakeAt
from policies.builtin import BUILTINS
from policies.dispatcher import Dispatcher, State
from policies.events import Arrived, Event, Failed, Gone, Offered, PolicyFault, Stopped, Tick, WorkerLost
from policies.limits import Limits
from policies.request import RequestClass, RequestId, Tenant, WorkerId
from tests.policies.scenes import chain, load, report, request, up

# Small enough that every bound is met.
LIMITS = Limits(
    requests_max=12,
    tokenising_max=4,
    tokenising_per_tenant=2,
    tokenise_queue_max=2,
    room_s=(1.0, 1.0, 1.0),
    workers_max=3,
    index_nodes_per_worker=16,
    index_every_block=1,
    seen_keys_max=16,
    sessions_max=4,
    templates_max=4,
    tenants_max=2,
    retry_burst=3,
)
TICK_S = 0.01


class World(RuleBasedStateMachine):
    """Keeps its own book of what was said about each request, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.make: Callable[[], Dispatcher] = lambda: Dispatcher(
            BUILTINS["headway"]({}), LIMITS, np.random.default_rng(7)
        )
        self.mind = self.make()
        self.now = 0.0
        self.history: list[tuple[Event, float, str]] = []
        self.state: dict[RequestId, str] = {}  # tokenising | waiting | placed
        self.place: dict[RequestId, WorkerId] = {}
        self.arrived: dict[RequestId, float] = {}
        self.leaves_at: dict[RequestId, float] = {}
        self.up: set[int] = set()
        self.started: dict[RequestId, None] = {}  # its present attempt has a first token
        self.settled: dict[RequestId, None] = {}
        self.count = 0
        self.ids: list[RequestId] = []
        self.wake_at = float("inf")

    # The book ---------------------------------------------------------------------------------------------------------

    def say(self, event: Event) -> None:
        if isinstance(event, Tick):
            self.wake_at = float("inf")
        actions = self.mind.handle(event, self.now)
        self.history.append((event, self.now, repr(actions)))
        for action in actions:
            self.book(action)

    def book(self, action: Action) -> None:
        if isinstance(action, WakeAt):
            self.wake_at = min(self.wake_at, action.at)
            return
        request_id = action.request_id
        assert request_id not in self.settled, "an answered request is left alone"
        if isinstance(action, Tokenise):
            assert self.state[request_id] == "queued", "told to tokenise once"
            self.state[request_id] = "tokenising"
            cap_s = (30.0, 600.0, 900.0)[action.request_class]
            self.leaves_at[request_id] = min(self.leaves_at[request_id], self.arrived[request_id] + cap_s)
        elif isinstance(action, Dispatch):
            assert self.state[request_id] == "waiting", "placed once"
            assert int(action.worker) in self.up, "placed on a live worker"
            self.state[request_id], self.place[request_id] = "placed", action.worker
            self.started.pop(request_id, None)
        elif isinstance(action, Cancel):
            assert self.place[request_id] == action.worker
        elif isinstance(action, Reject):
            assert self.state[request_id] != "placed", "refused only before a worker has it"
            assert action.retry_after_s is None or 1 <= action.retry_after_s <= LIMITS.retry_after_max_s
            self.settle(request_id)

    def settle(self, request_id: RequestId) -> None:
        self.settled[request_id] = None
        for book in (self.state, self.place, self.arrived, self.leaves_at):
            book.pop(request_id, None)

    # What may happen --------------------------------------------------------------------------------------------------

    @initialize(workers=st.integers(0, 2))
    def start(self, workers: int) -> None:
        for worker in range(workers):
            self.worker_up(worker)

    @rule(
        cls=st.sampled_from([None, *RequestClass]),
        tenant=st.sampled_from(["a", "b", "c"]),
        session=st.sampled_from(["", "s1", "s2"]),
        timeout_s=st.sampled_from([None, None, 1.0, 600.0]),
        prompt=st.tuples(st.sampled_from([0, 10, 500, 20_000, 150_000]), st.sampled_from("xyz")),
    )
    def offer(
        self, cls: RequestClass | None, tenant: str, session: str, timeout_s: float | None, prompt: tuple[int, str]
    ) -> None:
        """A new request; with tokens it is tokenised in no time, if it may be at all."""
        self.count += 1
        asked = request(
            self.count,
            arrived=self.now,
            tenant=Tenant(id=tenant),
            session=session,
            declared_class=cls,
            declared_timeout_s=timeout_s,
        )
        self.ids.append(asked.id)
        self.state[asked.id] = "queued"
        self.arrived[asked.id] = self.now
        self.leaves_at[asked.id] = self.now + (0.95 if timeout_s == 1.0 else 900.0)
        self.say(Offered(asked))
        if prompt[0]:
            self.arrive(asked.id, *prompt)

    @precondition(lambda self: self.someone("tokenising"))
    @rule(pick=st.integers(0, 99), tokens=st.integers(1, 20_000), name=st.sampled_from("xyz"))
    def arrive_late(self, pick: int, tokens: int, name: str) -> None:
        self.arrive(self.chosen("tokenising", pick), tokens, name)

    def arrive(self, request_id: RequestId, tokens: int, name: str) -> None:
        if self.state.get(request_id) == "tokenising":
            self.state[request_id] = "waiting"
        self.say(Arrived(request_id, tokens, chain(name, min(20, tokens // 64))))

    @precondition(lambda self: self.ids)
    @rule(pick=st.integers(0, 99))
    def leave(self, pick: int) -> None:
        """Gone is legal in every state, also after the end."""
        request_id = self.ids[-1 - pick % len(self.ids)]
        was = self.state.get(request_id)
        self.say(Gone(request_id))
        if was is not None:
            self.settle(request_id)

    @precondition(lambda self: self.ids)
    @rule(pick=st.integers(0, 99), tokens=st.integers(0, 9))
    def stop(self, pick: int, tokens: int) -> None:
        """At a stop string: only a stream can, elsewhere it is late news."""
        request_id = self.ids[-1 - pick % len(self.ids)]
        is_stream = self.mind.state(request_id) is State.STREAMING
        self.say(Stopped(request_id, tokens))
        if is_stream:
            self.settle(request_id)

    @rule(worker=st.integers(0, 3))
    def worker_up(self, worker: int) -> None:
        if worker in self.up:
            self.lose(worker)
        if len(self.up) < LIMITS.workers_max:
            self.up.add(worker)
        self.say(up(worker, cached=chain("x", 3)))

    @precondition(lambda self: self.up)
    @rule(pick=st.integers(0, 99))
    def worker_lost(self, pick: int) -> None:
        self.lose(sorted(self.up)[pick % len(self.up)])

    def lose(self, worker: int) -> None:
        self.up.discard(worker)
        self.say(WorkerLost(WorkerId(worker), "killed"))
        for request_id in [name for name, place in self.place.items() if place == worker]:
            self.fail_on(request_id, "worker lost")

    @rule(
        worker=st.integers(0, 3),
        running=st.integers(0, 9),
        waiting_tokens=st.sampled_from([0, 50_000]),
        free=st.sampled_from([0, 4_000]),
        name=st.sampled_from("xyz"),
    )
    def frame(self, worker: int, running: int, waiting_tokens: int, free: int, name: str) -> None:
        """What a worker says need not fit what was sent to it: it has other routers too."""
        keys = chain(name, 5)
        said = load(running=running, waiting_uncached_tokens=waiting_tokens, blocks_free=free)
        self.say(report(worker, load=said, stored=keys[:48], evicted=keys[48:]))

    @precondition(lambda self: self.place)
    @rule(pick=st.integers(0, 99), cached=st.integers(0, 100))
    def first_token(self, pick: int, cached: int) -> None:
        request_id = self.chosen("placed", pick)
        self.started[request_id] = None
        self.say(report(int(self.place[request_id]), first_tokens=((request_id, cached),)))

    @precondition(lambda self: self.place)
    @rule(pick=st.integers(0, 99), tokens=st.integers(0, 500))
    def finish(self, pick: int, tokens: int) -> None:
        request_id = self.chosen("placed", pick)
        worker = self.place[request_id]
        self.settle(request_id)
        self.say(report(int(worker), finished=((request_id, tokens),)))

    @precondition(lambda self: self.place)
    @rule(pick=st.integers(0, 99))
    def fail(self, pick: int) -> None:
        self.fail_on(self.chosen("placed", pick), "refused")

    def fail_on(self, request_id: RequestId, reason: str) -> None:
        worker = self.place.pop(request_id)
        self.state[request_id] = "waiting"
        if request_id in self.started:  # who has been reading waits for the rest as long as for the start
            self.leaves_at[request_id] += self.now - self.arrived[request_id]
        self.say(Failed(request_id, worker, reason))

    @precondition(lambda self: self.settled)
    @rule(pick=st.integers(0, 99), worker=st.integers(0, 3))
    def late_news(self, pick: int, worker: int) -> None:
        """News of what is settled changes nothing."""
        request_id = sorted(self.settled)[pick % len(self.settled)]
        self.say(Arrived(request_id, 100, b""))
        self.say(Failed(request_id, WorkerId(worker), "late"))
        self.say(report(worker, first_tokens=((request_id, 0),), finished=((request_id, 3),)))

    @rule(stage=st.sampled_from(["place", "admit", "order", "classify", "promise"]))
    def fault(self, stage: str) -> None:
        self.say(PolicyFault(stage, "too slow"))

    @rule(seconds=st.sampled_from([0.001, 0.1, 0.1, 1.0, 20.0, 400.0]))
    def wait(self, seconds: float) -> None:
        """Time goes on; the router keeps its promise to tick."""
        until = self.now + seconds
        while self.wake_at <= until:
            self.now = max(self.now, self.wake_at)
            self.say(Tick())
        self.now = until

    def someone(self, state: str) -> list[RequestId]:
        return [request_id for request_id, now in self.state.items() if now == state]

    def chosen(self, state: str, pick: int) -> RequestId:
        found = self.someone(state)
        return found[pick % len(found)]

    # What must hold ---------------------------------------------------------------------------------------------------

    @invariant()
    def every_request_is_somewhere_exactly_once(self) -> None:
        assert self.mind.live_count == len(self.state)
        for request_id, state in self.state.items():
            found = self.mind.state(request_id)
            assert found is not None
            assert (
                found
                in {
                    "queued": (State.QUEUED,),
                    "tokenising": (State.TOKENISING,),
                    "waiting": (State.HELD,),
                    "placed": (State.PLACED, State.STREAMING),
                }[state]
            )
        assert self.mind.waiting_count == sum(state == "waiting" for state in self.state.values())

    @invariant()
    def nobody_waits_beyond_its_patience_and_a_tick(self) -> None:
        for request_id, state in self.state.items():
            assert state == "placed" or self.leaves_at[request_id] + TICK_S >= self.now

    @precondition(lambda self: not self.place)
    @invariant()
    def nothing_is_charged_for_nobody(self) -> None:
        fleet = self.mind.fleet
        for worker in sorted(self.up):
            if WorkerId(worker) in fleet:
                ledger = fleet.ledger(WorkerId(worker))
                assert ledger.streams == [0, 0, 0]
                assert ledger.pending_s == [0.0, 0.0, 0.0]
                assert ledger.own_tokens == 0
                assert ledger.staged == 0

    def teardown(self) -> None:
        again = self.make()
        for event, now, said in self.history:
            assert repr(again.handle(event, now)) == said, "the same events give the same actions"


World.TestCase.settings = settings(
    max_examples=80, stateful_step_count=80, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWorld = World.TestCase
