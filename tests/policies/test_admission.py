"""Admission: now, later or no, and what a refused client is told."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admission import admit, admit_always, retry_after_s
from policies.api import Admit, Forecast, Hold, Job, Refuse
from policies.limits import Limits
from policies.request import RequestClass, WorkerId
from tests.policies.scenes import LIMITS, job

BATCH = RequestClass.DATA_PROCESSOR
FULL = Forecast(
    worker=WorkerId(0),
    hit_tokens=0,
    own_s=0.1,
    ahead_s=3.0,
    ttft_s=4.0,
    tpot_s=0.03,
    cost_s=0.2,
    probability=0.1,
    is_feasible=False,
    is_steady=True,
    is_alone=False,
    has_room=True,
)
FINE = FULL._replace(is_feasible=True, ahead_s=0.1)


@dataclass(frozen=True)
class Queue:
    """A flow that says what it is told to."""

    limits: Limits = LIMITS
    is_next: bool = True
    start_s: float = 3.0
    room_s: float = 100.0
    passes: bool = False

    def may_pass(self, *_: object) -> bool:
        return self.passes

    def predicted_start_s(self, *_: object) -> float:
        return self.start_s

    def has_space(self, _: Job, cost_s: float) -> bool:
        return cost_s <= self.room_s


def test_within_budget_it_goes_now() -> None:
    assert admit(job(), [FINE], Queue(), 0.0) == Admit("within budget")


def test_alone_on_an_idle_worker_it_always_goes() -> None:
    """Late, impatient, out of KV by our estimate: an idle worker is still the best answer."""
    idle = FULL._replace(is_alone=True, has_room=False, is_steady=False)
    verdict = admit(job(ttft_s=0.001, patience_s=0.1), [idle], Queue(is_next=False, start_s=99.0), 5.0)
    assert isinstance(verdict, Admit)


def test_who_is_late_goes_as_soon_as_a_worker_is_about_to_run_dry() -> None:
    late = job(ttft_s=0.1)
    assert isinstance(admit(late, [FULL], Queue(), 9.0), Hold)
    assert admit(late, [FULL._replace(ahead_s=0.2)], Queue(), 9.0) == Admit("next in line")


@pytest.mark.parametrize("short", [{"has_room": False}, {"is_steady": False}])
def test_residents_are_not_hurt_for_who_is_late(short: dict[str, bool]) -> None:
    assert isinstance(admit(job(), [FULL._replace(ahead_s=0.0, **short)], Queue(), 9.0), Hold)


def test_behind_others_it_waits() -> None:
    assert isinstance(admit(job(), [FINE], Queue(is_next=False), 0.0), Hold)


def test_before_others_it_goes_only_where_it_is_in_time() -> None:
    passing = Queue(is_next=False, passes=True)
    assert admit(job(), [FINE], passing, 0.0) == Admit("within budget")
    assert isinstance(admit(job(), [FULL._replace(ahead_s=0.0)], passing, 0.0), Hold)


def test_batch_work_is_staged_a_few_at_a_time() -> None:
    batch = job(cls=BATCH, ttft_s=math.inf, patience_s=900.0)
    assert isinstance(admit(batch, [FINE._replace(staged=3)], Queue(), 0.0), Admit)
    assert isinstance(admit(batch, [FINE._replace(staged=4)], Queue(), 0.0), Hold)


def test_refused_only_when_its_start_is_beyond_its_patience() -> None:
    assert isinstance(admit(job(patience_s=30.0), [FULL], Queue(start_s=29.0), 0.0), Hold)
    verdict = admit(job(patience_s=30.0), [FULL], Queue(start_s=29.0), 2.0)
    assert verdict == Refuse(503, "patience", "No worker would start this request before its client leaves.", 29.0)


def test_refused_when_the_room_is_full() -> None:
    verdict = admit(job(), [FULL], Queue(room_s=0.1), 0.0)
    assert isinstance(verdict, Refuse)
    assert verdict.reason == "waiting-room-full"


def test_without_a_worker_it_waits_for_one() -> None:
    assert isinstance(admit(job(), [], Queue(start_s=0.0), 0.0), Hold)


def test_baselines_queue_in_the_engine() -> None:
    assert admit_always(job(), [FULL], Queue(is_next=False), 0.0) == Admit("placed")
    assert isinstance(admit_always(job(), [FULL._replace(has_room=False)], Queue(), 0.0), Hold)
    assert isinstance(admit_always(job(), [], Queue(start_s=0.0), 0.0), Hold)


@given(start_s=st.floats(0.0, 1e6), jitter=st.floats(0.0, 1.0))
def test_retry_after_is_the_start_with_a_spread_in_whole_seconds_up_to_a_minute(start_s: float, jitter: float) -> None:
    """Law: never earlier than the drain says, at most 20 % later, 1 to 60 s."""
    told_s = retry_after_s(start_s, jitter, Limits())
    assert told_s == int(told_s)
    assert 1 <= told_s <= 60
    assert told_s >= min(start_s, 60)
    assert told_s <= max(1, math.ceil(start_s * 1.2))
