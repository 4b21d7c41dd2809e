"""Laws that every RouterPolicy must keep, checked by hypothesis: `check(make)` in a plug-in's own tests.

Owns the laws and the town they are checked in. Needs hypothesis; nothing that serves imports this module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.actions import Action, Dispatch, Reject, Tokenise, WakeAt
from policies.api import FleetView, Forecast, Job, Place, RouterPolicy
from policies.costs import StepModel
from policies.dispatcher import Dispatcher
from policies.events import Arrived, Event, Failed, Gone, Offered, Tick, WorkerLoad, WorkerLost, WorkerReport, WorkerUp
from policies.limits import Limits
from policies.request import Facts, Request, RequestClass, RequestId, Tenant, WorkerId

MODEL = "m"
BLOCK = 64
WORKERS = 3
STEP_MODEL = StepModel(0.006, 50e-6, 0.0005, 52e-9, 1.3e-9, 1e-5, q90=1.25, version=1)
LIMITS = Limits(index_every_block=1)
PATIENCE_MAX_S = 1000.0  # of any class
TICKS_MAX = 10_000  # more wakes for one idle stretch mean that the policy's keys never hold

Make = Callable[[], RouterPolicy]
Move = tuple[str, int, int, float]  # what, whom, how much, how long

MOVE = st.tuples(
    st.sampled_from(["offer", "offer", "offer", "work", "work", "lose", "return", "leave", "wait"]),
    st.integers(0, 11),
    st.sampled_from([10, 500, 5_000, 60_000]),
    st.sampled_from([0.0, 0.01, 0.5, 20.0]),
)
MOVES = st.one_of(st.lists(MOVE, max_size=10), st.lists(MOVE, min_size=25, max_size=40))  # else most stories are short


def check(make: Make, examples: int = 50) -> None:
    """Every law. An AssertionError names the law and hypothesis shows the smallest story that breaks it."""
    for law in (conservation, determinism, purity, budget):
        law(make, examples)


def conservation(make: Make, examples: int = 50) -> None:
    """Each request is placed on a live worker, or answered, exactly once; a lost worker's are placed again; who is held
    is decided before its patience ends."""

    @_settings(examples)
    @given(MOVES)
    def law(moves: list[Move]) -> None:
        Town(make()).play(moves).close()

    law()


def determinism(make: Make, examples: int = 50) -> None:
    """The same events give the same actions, byte for byte: else no recording replays."""

    @_settings(examples)
    @given(MOVES)
    def law(moves: list[Move]) -> None:
        one, other = (Town(make()).play(moves).said for _ in range(2))
        assert one == other, "determinism: two runs of the same events differ"

    law()


def purity(make: Make, examples: int = 50) -> None:
    """Only `learn` changes anything: a stage asked twice says the same, and leaves what it was shown alone."""

    @_settings(examples)
    @given(MOVES)
    def law(moves: list[Move]) -> None:
        policy = make()
        stages = {
            name: _twice(name, getattr(policy, name)) for name in ("classify", "promise", "admit", "order", "place")
        }
        Town(replace(policy, **stages)).play(moves)

    law()


def budget(make: Make, examples: int = 50) -> None:
    """With less of its budget left a request never goes to a worker that is slower for it."""

    @_settings(examples)
    @given(MOVES, st.floats(0.0, 30.0), st.floats(0.0, 30.0))
    def law(moves: list[Move], spent_s: float, more_s: float) -> None:
        policy = make()

        def place(job: Job, fleet: FleetView, now: float) -> Any:
            early, late = (_first(policy.place, job, fleet, now, spent) for spent in (spent_s, spent_s + more_s))
            if early and late and job.attempt == 1:
                assert late.ttft_s <= early.ttft_s + 1e-9, "budget: less of it took a slower worker"
            return policy.place(job, fleet, now)

        Town(replace(policy, place=place)).play(moves)

    law()


def _first(place: Place, job: Job, fleet: FleetView, now: float, spent_s: float) -> Forecast | None:
    """The choice for `job` if it had come so much earlier."""
    older = replace(job, request=replace(job.request, arrived=job.request.arrived - spent_s))
    forecasts = place(older, fleet, now)
    return forecasts[0] if forecasts else None


def _twice(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
    def ask(*arguments: Any) -> Any:
        before = [_shown(argument) for argument in arguments]
        answers = [stage(*arguments), stage(*arguments)]
        assert repr(answers[0]) == repr(answers[1]), f"purity: {name} asked twice says two things"
        assert before == [_shown(argument) for argument in arguments], f"purity: {name} changed what it was shown"
        return answers[0]

    return ask


def _shown(value: Any) -> Any:
    """A fleet by its arrays, anything else as it prints."""
    if hasattr(value, "ahead_s") and hasattr(value, "worker"):
        names = sorted(name for name in vars(value) if isinstance(getattr(value, name), np.ndarray))
        return [(name, getattr(value, name).tobytes()) for name in names]
    return repr(value) if not hasattr(value, "room") else None  # the flow is the dispatcher's own


def _settings(examples: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow, derandomize=True, database=None)


@dataclass(slots=True)
class Town:
    """A dispatcher with clients and workers that do as they are told, and a book of who is where."""

    policy: RouterPolicy
    now: float = 0.0
    said: list[str] = field(default_factory=list)
    placed: dict[RequestId, WorkerId] = field(default_factory=dict)
    open: dict[RequestId, float] = field(default_factory=dict)  # when it came
    alive: dict[int, None] = field(default_factory=dict)
    wake_at: float = float("inf")
    mind: Dispatcher = field(init=False)

    def __post_init__(self) -> None:
        self.mind = Dispatcher(self.policy, LIMITS, np.random.default_rng(0))
        for worker in range(WORKERS):
            self._return(worker)

    def play(self, moves: list[Move]) -> Town:
        """Make the moves in order."""
        for what, whom, much, long in moves:
            self._wait(long)
            act = {"offer": self._offer, "work": self._work, "leave": self._leave}.get(what)
            if act is not None:
                act(whom, much)
            elif what == "lose":
                self._lose(whom % WORKERS)
            elif what == "return":
                self._return(whom % WORKERS)
        return self

    def close(self) -> None:
        """Time passes until nobody can be patient any more: nothing may still wait."""
        self._wait(PATIENCE_MAX_S)
        waiting = [request_id for request_id in self.open if request_id not in self.placed]
        assert not waiting, f"starvation: {waiting} were neither placed nor answered within their patience"
        assert self.mind.live_count == len(self.placed), "conservation: a request is in no book"

    def _say(self, event: Event) -> None:
        if isinstance(event, Tick):
            self.wake_at = float("inf")
        actions = self.mind.handle(event, self.now)
        self.said.append(repr(actions))
        for action in actions:
            self._book(action)

    def _book(self, action: Action) -> None:
        if isinstance(action, WakeAt):
            self.wake_at = min(self.wake_at, action.at)
        elif isinstance(action, Dispatch):
            assert action.request_id in self.open, "conservation: placed, but it was answered already"
            assert action.request_id not in self.placed, "conservation: placed twice"
            assert int(action.worker) in self.alive, "worker loss: placed on a worker that is gone"
            self.placed[action.request_id] = action.worker
        elif isinstance(action, Reject):
            assert self.open.pop(action.request_id, None) is not None, "conservation: answered twice"
            assert action.request_id not in self.placed, "conservation: refused while a worker has it"
        elif isinstance(action, Tokenise):
            tokens = int(action.request_id.rpartition("-")[2])
            chain = b"".join(f"{tokens}/{number:010d}".encode()[-16:].rjust(16) for number in range(tokens // BLOCK))
            self._say(Arrived(action.request_id, tokens, chain))

    def _offer(self, whom: int, tokens: int) -> None:
        request_id = RequestId(f"r{len(self.said)}-{tokens}")
        cls = RequestClass(whom % 3)
        facts = Facts(declared_class=cls, stream=cls is not RequestClass.DATA_PROCESSOR, has_session=whom % 2 == 0)
        session, tenant = f"s{whom % 4}" if whom % 2 == 0 else "", Tenant(id=f"t{whom % 3}")
        self.open[request_id] = self.now
        self._say(Offered(Request(request_id, tenant, session, MODEL, facts, self.now, 4 * tokens, tokens)))

    def _work(self, whom: int, tokens: int) -> None:
        """A worker tells: the oldest of its requests ends, or begins."""
        worker = whom % WORKERS
        if worker not in self.alive:
            return
        mine = [request_id for request_id, at in self.placed.items() if at == worker]
        ended = tuple((request_id, 20) for request_id in mine[: 1 if tokens > BLOCK else 0])
        for request_id, _ in ended:
            del self.placed[request_id], self.open[request_id]
        load = WorkerLoad(len(mine) - len(ended), 0, 0, 4_000, 0, 500 * len(mine), 0.02)
        self._say(
            WorkerReport(WorkerId(worker), load, first_tokens=tuple((one, 0) for one, _ in ended), finished=ended)
        )

    def _leave(self, whom: int, tokens: int) -> None:
        del tokens
        if self.open:
            request_id = list(self.open)[whom % len(self.open)]
            del self.open[request_id]
            self.placed.pop(request_id, None)
            self._say(Gone(request_id))

    def _lose(self, worker: int) -> None:
        if worker in self.alive:
            del self.alive[worker]
            self._say(WorkerLost(WorkerId(worker), "law"))
            for request_id in [one for one, at in self.placed.items() if at == worker]:
                del self.placed[request_id]
                self._say(Failed(request_id, WorkerId(worker), "law"))

    def _return(self, worker: int) -> None:
        if worker not in self.alive:
            self.alive[worker] = None
            self._say(WorkerUp(WorkerId(worker), MODEL, BLOCK, 4_000, 131_072, STEP_MODEL))

    def _wait(self, seconds: float) -> None:
        until = self.now + seconds
        for _ in range(TICKS_MAX):
            if self.wake_at > until:
                self.now = until
                return
            self.now = max(self.now, self.wake_at)
            self._say(Tick())
        raise AssertionError("starvation: the policy asks to be woken for ever")
