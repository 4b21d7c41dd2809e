"""The example policies keep every law, and each does what its page says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from examples.night_batch import night_batch
from examples.short_first import short_first
from examples.sticky import sticky
from policies import conformance, plugins
from policies.api import Hold, PolicySpec, RouterPolicy
from policies.builtin import headway
from policies.dispatcher import Dispatcher
from policies.events import Offered, Reconfigured, Started, WorkerLost, WorkerReport
from policies.limits import Limits
from policies.request import RequestClass, RequestId, WorkerId
from policies.worker import Fleet
from tests.policies.scenes import LIMITS, dispatched, job, load, offer, report, request, up

Factory = Callable[[Mapping[str, Any]], RouterPolicy]
NAMES = ("examples.night_batch:night_batch", "examples.short_first:short_first", "examples.sticky:sticky")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_found_by_its_name_and_keeps_the_laws(name: str) -> None:
    conformance.check(lambda: plugins.load(PolicySpec(name)), examples=25)


class Quiet:
    """A queue with room where nobody waits."""

    limits, is_next = Limits(), True

    def may_pass(self, *_: object) -> bool:
        return False

    def predicted_start_s(self, *_: Any) -> float:
        return 0.0

    def has_space(self, *_: Any) -> bool:
        return True


@pytest.mark.parametrize(("hour", "is_held"), [(3, False), (12, True), (21, False)])
def test_batch_waits_for_the_night_and_chat_does_not(hour: int, is_held: bool) -> None:
    policy, fleet, now = night_batch({}), fleet_of_three(), 3600.0 * hour
    batch = job(cls=RequestClass.DATA_PROCESSOR, patience_s=86_400.0, arrived=now)
    for asked, held in ((batch, is_held), (job(arrived=now), False)):
        verdict = policy.admit(asked, policy.place(asked, fleet, now), Quiet(), now)
        assert isinstance(verdict, Hold) == held


def test_a_day_of_batch_work_starts_in_the_evening_of_the_wall_clock() -> None:
    mind = Dispatcher(night_batch({"utc_offset_h": 2}), LIMITS, np.random.default_rng(0))
    booted = 5_000.0  # the clock that `now` is of began long before
    mind.handle(Started("", "", 0, "", clock_zero_s=unix_s("2026-06-01T10:00+02:00") - booted), booted)
    mind.handle(up(), booted)

    day = request(1, arrived=booted, declared_class=RequestClass.DATA_PROCESSOR, completion_window="24h")
    soon = replace(day, id=RequestId("r2"), facts=replace(day.facts, completion_window="2h"))
    assert [placed.request_id for placed in dispatched(offer(mind, day) + offer(mind, soon))] == [soon.id]
    assert dispatched(mind.handle(report(finished=((soon.id, 5),)), booted + 9.9 * 3600)) == []
    evening = mind.handle(report(), booted + 10.0 * 3600 + 0.5)  # frames come twice a second
    assert [placed.request_id for placed in dispatched(evening)] == [day.id]


def test_a_policy_that_comes_later_is_told_the_time_too() -> None:
    made = [night_batch({})]
    mind = Dispatcher(headway({}), LIMITS, np.random.default_rng(0), lambda _: made[0])
    mind.handle(up(), 0.0)
    mind.handle(Reconfigured("", "", clock_zero_s=unix_s("2026-06-01T12:00+00:00")), 0.0)

    batch = request(1, declared_class=RequestClass.DATA_PROCESSOR, completion_window="24h")

    assert dispatched(offer(mind, batch)) == []


@pytest.mark.parametrize("policy", [night_batch, short_first])
def test_an_example_refuses_parameters_that_it_does_not_know(policy: Factory) -> None:
    with pytest.raises(ValueError, match="there is no 'opens'"):
        policy({"opens": 20})


def unix_s(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def test_a_session_stays_where_it_was_answered_until_that_worker_is_lost() -> None:
    policy, fleet = sticky({}), fleet_of_three()
    asked = job(request=request(0, session="s"))
    (best,) = policy.place(asked, fleet, 0.0)
    other = WorkerId((int(best.worker) + 1) % 3)
    policy.learn(Offered(request(7, session="s")))
    policy.learn(WorkerReport(other, load(), first_tokens=((RequestId("r7"), 0),)))
    assert policy.place(asked, fleet, 0.0)[0].worker == other
    assert (
        policy.place(job(request=request(0, session="t")), fleet, 0.0)[0].worker
        == policy.place(job(request=request(0, session="t")), fleet, 0.0)[0].worker
    )
    policy.learn(WorkerLost(other, "test"))
    assert policy.place(asked, fleet, 0.0)[0].worker == best.worker


def test_short_work_goes_first_until_the_long_has_waited() -> None:
    order = short_first({"aging": 0.1}).order
    long_early, short_late = order(job(arrived=0.0), 2.0, 0.0), order(job(arrived=10.0), 1.5, 10.0)
    assert short_late[0] > long_early[0] > order(job(arrived=1.0), 0.1, 1.0)[0]
    with pytest.raises(ValueError, match="aging"):
        short_first({"aging": 0})


def fleet_of_three() -> Fleet:
    fleet = Fleet(LIMITS)
    for worker in range(3):
        fleet.up(up(worker), 0.0)
    return fleet
