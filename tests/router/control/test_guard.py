"""The guard: a stranger's policy can be wrong in every way without stopping anything."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from policies.actions import Tokenise
from policies.api import Job, Output, Promise, Prompt
from policies.chain import NO_CHAIN
from policies.dispatcher import Dispatcher
from policies.events import Offered, PolicyFault, WorkerLost
from policies.request import Budget, Facts, Request, RequestClass, RequestId, Tenant, WorkerId
from policies.trust import BUILT_IN
from router.control.guard import FAULTS_MAX, guard
from router.control.mind import Mind
from router.control.reducer import build, load_policy
from router.settings.config import Config, Policy
from tests.router.bad_policies import nan_at_order, raises_at_learn


def offered() -> Offered:
    facts = Facts(declared_class=RequestClass.CHATBOT)
    return Offered(Request(RequestId("a"), Tenant(), "", "tiny", facts, 0.0, 10, 3))


def reducer_of(name: str, faults: deque[PolicyFault], *, is_timed: bool) -> Dispatcher:
    config = Config(policy=Policy(ref=f"tests.router.bad_policies:{name}"))
    return build(config, load_policy(config, faults, is_timed=is_timed), seed=1)


class Clock:
    """Moved on by who sleeps alone: a busy machine may stop between any two lines for longer than a policy may take."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("router.control.guard.time", made)
    monkeypatch.setattr("tests.router.bad_policies.time", made)
    return made


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("name", "stage", "reason"),
    [
        ("nonsense_at_classify", "classify", "answered a str that makes no sense"),
        ("raises_at_learn", "learn", "raised KeyError: 'event'"),
    ],
)
def test_a_faulty_stage_is_answered_by_the_built_in_one(name: str, stage: str, reason: str) -> None:
    faults: deque[PolicyFault] = deque()
    reducer = reducer_of(name, faults, is_timed=True)

    actions = reducer.handle(offered(), 0.0)

    assert isinstance(actions[0], Tokenise)
    assert list(faults) == [PolicyFault(stage, reason)]


@pytest.mark.usefixtures("clock")
def test_a_slow_answer_counts_and_is_a_fault_of_the_live_router_alone() -> None:
    live: deque[PolicyFault] = deque()
    replayed: deque[PolicyFault] = deque()

    first = reducer_of("slow_at_classify", live, is_timed=True).handle(offered(), 0.0)
    second = reducer_of("slow_at_classify", replayed, is_timed=False).handle(offered(), 0.0)

    assert first == second
    assert [fault.stage for fault in live] == ["classify"]
    assert live[0].reason == "took 6.0 ms"
    assert not replayed


def test_a_key_that_is_no_number_never_reaches_a_heap() -> None:
    faults: deque[PolicyFault] = deque()
    policy = guard(nan_at_order({}), BUILT_IN, faults, is_timed=False)
    promise = Promise(Budget(1.0, 0.04), 30.0)
    job = Job(offered().request, RequestClass.CHATBOT, "", Prompt(3, 3, NO_CHAIN), Output(8.0, 8.0, 8.0), promise)

    key, _ = policy.order(job, 0.1, 0.0)

    assert key == BUILT_IN.order(job, 0.1, 0.0)[0]
    assert [fault.stage for fault in faults] == ["order"]


def test_a_policy_that_fails_without_end_fills_no_memory() -> None:
    faults: deque[PolicyFault] = deque()
    policy = guard(raises_at_learn({}), BUILT_IN, faults, is_timed=False)

    for _ in range(FAULTS_MAX + 10):
        policy.learn(offered())

    assert len(faults) == FAULTS_MAX


def test_a_policy_that_cannot_learn_is_told_no_more_and_the_router_goes_on() -> None:
    """A fault is an event, which the policy would be told of, too."""

    async def scene() -> None:
        faults: deque[PolicyFault] = deque()
        mind = Mind(reducer_of("raises_at_learn", faults, is_timed=False), faults)
        for _ in range(5):
            mind.worker_lost(WorkerLost(WorkerId(0), "test"))
        assert not faults
        mind.close()

    asyncio.run(scene())
