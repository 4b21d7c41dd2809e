"""The live mind: order of events, whom actions reach, and what a fault costs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import pytest

from policies.actions import Action, Dispatch, Reject, Tokenise, WakeAt
from policies.events import Arrived, Event, Failed, Gone, Offered, PolicyFault, Tick, WorkerLoad, WorkerReport
from policies.request import Budget, Facts, Request, RequestClass, RequestId, Tenant, WorkerId
from router.control.mind import Mind
from tests.router.desk import DEADLINE_S

A, B, W0 = RequestId("a"), RequestId("b"), WorkerId(0)
CHAT = RequestClass.CHATBOT
LOAD = WorkerLoad(0, 0, 0, 0, 0, 0, 0.0)


def request(request_id: RequestId) -> Request:
    return Request(request_id, Tenant(), "", "tiny", Facts(), 0.0, body_bytes=10, estimated_tokens=3)


def tokenise(request_id: RequestId) -> Tokenise:
    return Tokenise(request_id, CHAT, "declared")


def dispatch(request_id: RequestId) -> Dispatch:
    return Dispatch(request_id, W0, CHAT, Budget(1.0, 0.04), 1.0, 1.0, 0.1, 0, "cheapest")


def reject(request_id: RequestId) -> Reject:
    return Reject(request_id, CHAT, 503, "patience", "no", 1.0)


class Script:
    """A reducer that answers each kind of event as it was told, and keeps what it was asked."""

    def __init__(self, answers: dict[type, Sequence[Action]] | None = None) -> None:
        self.answers = answers or {}
        self.asked: list[Event] = []
        self.on_event: Callable[[Event], None] = lambda _: None

    def handle(self, event: Event, _now: float) -> Sequence[Action]:
        self.asked.append(event)
        self.on_event(event)
        return self.answers.get(type(event), ())


class Caller:
    """A Client that keeps what it heard and may answer at once."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.heard: list[Action] = []
        self.is_broken = False
        self._then = then

    def hear(self, action: Action) -> None:
        self.heard.append(action)
        self._then()

    tokenise = dispatch = reject = cancel = hear

    def broke(self) -> None:
        self.is_broken = True


def test_what_a_client_answers_from_within_an_action_waits_its_turn() -> None:
    async def scene() -> None:
        script = Script({Offered: [tokenise(A), WakeAt(1e9)], Arrived: [dispatch(A)]})
        mind = Mind(script, deque())
        caller = Caller(then=lambda: mind.arrived(A, 3, b"") if len(script.asked) == 1 else None)

        mind.offer(request(A), caller)

        assert [type(event) for event in script.asked] == [Offered, Arrived]
        assert caller.heard == [tokenise(A), dispatch(A)]
        mind.close()

    asyncio.run(scene())


def test_a_request_that_is_gone_hears_nothing_more_and_is_gone_once() -> None:
    async def scene() -> None:
        script = Script({Gone: [dispatch(A)]})
        mind, caller = Mind(script, deque()), Caller()
        mind.offer(request(A), caller)

        mind.gone(A)
        mind.gone(A)
        mind.failed(A, W0, "late")

        assert [type(event) for event in script.asked] == [Offered, Gone]
        assert caller.heard == []
        assert mind.live_count == 0

    asyncio.run(scene())


def test_a_refused_request_is_forgotten() -> None:
    async def scene() -> None:
        script = Script({Offered: [reject(A)]})
        mind, caller = Mind(script, deque()), Caller()

        mind.offer(request(A), caller)

        assert caller.heard == [reject(A)]
        assert mind.live_count == 0

    asyncio.run(scene())


def test_a_finished_request_is_forgotten_so_that_its_relay_may_say_gone() -> None:
    async def scene() -> None:
        script = Script()
        mind = Mind(script, deque())
        mind.offer(request(A), Caller())

        mind.worker_report(WorkerReport(W0, LOAD, finished=((A, 5),)))
        mind.gone(A)

        assert [type(event) for event in script.asked] == [Offered, WorkerReport]
        assert mind.live_count == 0

    asyncio.run(scene())


def test_a_failed_attempt_is_told_to_the_reducer() -> None:
    async def scene() -> None:
        script = Script({Failed: [dispatch(A)]})
        mind, caller = Mind(script, deque()), Caller()
        mind.offer(request(A), caller)

        mind.failed(A, W0, "killed")

        assert script.asked[1] == Failed(A, W0, "killed")
        assert caller.heard == [dispatch(A)]

    asyncio.run(scene())


def test_the_alarm_rings_once_at_the_earliest_time_asked_for() -> None:
    async def scene() -> None:
        rung = asyncio.Event()
        script = Script({Offered: [WakeAt(100.0), WakeAt(10.02), WakeAt(50.0)]})
        script.on_event = lambda event: rung.set() if isinstance(event, Tick) else None
        mind = Mind(script, deque(), clock=lambda: 10.0)

        mind.offer(request(A), Caller())
        async with asyncio.timeout(DEADLINE_S):
            await rung.wait()

        assert [type(event) for event in script.asked] == [Offered, Tick]
        mind.close()

    asyncio.run(scene())


def test_what_the_guard_saw_becomes_an_event() -> None:
    async def scene() -> None:
        faults: deque[PolicyFault] = deque()
        fault = PolicyFault("place", "raised ValueError")
        script = Script()
        script.on_event = lambda event: faults.append(fault) if isinstance(event, Offered) else None
        mind = Mind(script, faults)

        mind.offer(request(A), Caller())

        assert script.asked[1:] == [fault]

    asyncio.run(scene())


def test_a_client_that_raises_ends_its_own_request_and_no_other() -> None:
    def fail() -> None:
        raise RuntimeError("relay bug")

    async def scene() -> None:
        script = Script({WorkerReport: [dispatch(A), dispatch(B)]})
        mind, healthy, ill = Mind(script, deque()), Caller(), Caller(then=fail)
        mind.offer(request(A), ill)
        mind.offer(request(B), healthy)

        mind.worker_report(WorkerReport(W0, LOAD))

        assert script.asked[-1] == Gone(A)
        assert healthy.heard == [dispatch(B)]
        assert mind.client_faults == 1
        assert (ill.is_broken, healthy.is_broken) == (True, False)

    asyncio.run(scene())


def test_a_reducer_that_raises_breaks_the_mind_for_good() -> None:
    def fail(_: Event) -> None:
        raise AssertionError("a law is broken")

    async def scene() -> None:
        script = Script()
        script.on_event = fail
        mind = Mind(script, deque())

        with pytest.raises(AssertionError):
            mind.offer(request(A), Caller())

        assert isinstance(mind.broken.exception(), AssertionError)

    asyncio.run(scene())
