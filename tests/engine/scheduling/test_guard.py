"""The engine's guard: a stranger's step policy can be wrong in every way without ending the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.scheduling.guard import FAULTS_MAX, FAULTS_WITHIN_S, SLOW_S, guard, load
from policies.api import EnginePolicy
from policies.builtin import ENGINES, headway_engine
from policies.costs import StepModel
from policies.request import RequestClass
from policies.retention import Band, SpanView
from policies.step_plan import NOBODY, BatchView, Chunk, PlanLimits, StepPlan

MODEL = StepModel(0.006, 50e-6, 0.0005, 52e-9, 1.3e-9, 1e-5, version=1)
OURS = headway_engine(PlanLimits())
SPAN = SpanView(RequestClass.CHATBOT, is_shared=False, is_aborted=False)
NONE = np.array([np.inf, np.inf, np.inf])
# A decode, a prompt of 100 tokens, and one whose link is full.
BATCH = BatchView(
    request_class=np.zeros(3, dtype=np.int64),
    due=NONE,
    pace_s=NONE,
    context=np.array([50, 0, 50]),
    pending=np.array([1, 100, 1]),
    arrived=np.zeros(3),
    deadline=NONE,
    is_decoding=np.array([True, False, True]),
    is_blocked=np.array([False, False, True]),
)


def planned(decodes: list[int], *chunks: tuple[int, int]) -> StepPlan:
    rows = np.array(decodes, dtype=np.int64)
    return StepPlan(rows, tuple(Chunk(*chunk) for chunk in chunks), NOBODY, (), 0.01)


def guarded(answer: Callable[..., Any], clock: Callable[[], float] = lambda: 0.0) -> EnginePolicy:
    return guard(EnginePolicy(plan=answer, keep=answer), OURS, clock)


def asked(policy: EnginePolicy) -> str:
    return repr(policy.plan(BATCH, MODEL, 0.0))


def test_a_sane_plan_is_taken_as_it_is() -> None:
    for theirs in (planned([0], (1, 30)), planned([0]), planned([], (1, 100))):
        assert guarded(lambda *_, plan=theirs: plan).plan(BATCH, MODEL, 0.0) is theirs


@pytest.mark.parametrize(
    "theirs",
    [
        None,
        planned([]),
        planned([3]),
        planned([-1]),
        planned([0, 0]),
        planned([1]),
        planned([2]),
        planned([], (0, 1)),
        planned([], (1, 101)),
        planned([], (1, 0)),
        planned([0], (1, 10), (1, 10)),
    ],
    ids=repr,
)
def test_a_plan_that_cannot_be_computed_is_replaced_by_ours(theirs: StepPlan | None) -> None:
    assert asked(guarded(lambda *_: theirs)) == asked(OURS)


class Failing:
    """Raises whenever it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, *_: Any) -> Any:
        self.asked += 1
        raise KeyError("row")


def test_what_raises_is_replaced_and_after_three_times_not_asked_again() -> None:
    theirs = Failing()
    policy = guarded(theirs)
    for _ in range(FAULTS_MAX + 5):
        assert asked(policy) == asked(OURS)
    assert theirs.asked == FAULTS_MAX


def test_faults_far_apart_are_forgotten() -> None:
    now, theirs = [0.0], Failing()
    policy = guarded(theirs, lambda: now[0])
    for _ in range(FAULTS_MAX + 5):
        asked(policy)
        now[0] += FAULTS_WITHIN_S
    assert theirs.asked == FAULTS_MAX + 5


def test_a_slow_plan_counts_until_it_was_slow_three_times() -> None:
    now = [0.0]

    def slow(*_: Any) -> StepPlan:
        now[0] += 2 * SLOW_S
        return planned([0])

    policy = guarded(slow, lambda: now[0])
    said = [asked(policy) for _ in range(FAULTS_MAX + 1)]
    assert said == [repr(planned([0]))] * FAULTS_MAX + [asked(OURS)]


@pytest.mark.parametrize("answer", [None, (Band.CHATBOT, float("nan")), ("chat", 1.0)])
def test_a_band_that_is_none_is_replaced_by_ours(answer: Any) -> None:
    assert guarded(lambda *_: answer).keep(SPAN, 0.0) == OURS.keep(SPAN, 0.0)


def test_policies_that_come_with_headway_need_no_guard() -> None:
    assert load("niyama", PlanLimits()).keep is ENGINES["niyama"]().keep
    assert load("policies.baselines.engines:niyama", PlanLimits()).keep is not ENGINES["niyama"]().keep
