"""Placement: a forecast in seconds, feasible first, then cheapest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.api import Forecast, Job
from policies.formula import Weights, in_time
from policies.ledger import DOUBT_AFTER_S, DOUBT_FACTOR
from policies.limits import Limits
from policies.placement import FEW, budget_place, lmetric_place
from policies.request import RequestClass, WorkerId
from policies.scene import Scene
from policies.worker import Fleet
from tests.policies.scenes import STEP_MODEL, chain, job, load, up

BATCH = RequestClass.DATA_PROCESSOR


def fleet_of(*models: object, **changes: object) -> Fleet:
    fleet = Fleet(Limits(index_every_block=1))
    for worker, model in enumerate(models or (STEP_MODEL, STEP_MODEL)):
        fleet.up(up(worker, step_model=model, **changes), 0.0)
    return fleet


def busy(fleet: Fleet, worker: int, **said: object) -> None:
    fleet.report(WorkerId(worker), load(**said), None, 0.0)
    fleet.publish(0.0)


def best(fleet: Fleet, asked: Job, now: float = 0.0) -> Forecast:
    fleet.publish(now)
    (forecast,) = budget_place()(asked, fleet, now)
    return forecast


def test_an_idle_worker_needs_its_unloaded_time_and_hardly_more() -> None:
    forecast = best(fleet_of(STEP_MODEL), job(tokens=4_000))
    assert STEP_MODEL.unloaded_ttft_s(4_000) <= forecast.ttft_s < 1.5 * STEP_MODEL.unloaded_ttft_s(4_000)
    assert forecast.is_alone
    assert forecast.is_feasible


def test_a_prefix_pulls_a_request_to_its_holder() -> None:
    fleet, keys = fleet_of(), chain("a", 100)
    for worker in (0, 1):
        fleet.up(up(1 - worker, cached=keys), 0.0)
        fleet.up(up(worker), 0.0)
        forecast = best(fleet, job(tokens=6_500, keys=keys))
        assert (forecast.worker, forecast.hit_tokens) == (1 - worker, 6_400)


def test_a_holder_that_would_be_late_loses_to_an_idle_stranger() -> None:
    fleet, keys = fleet_of(), chain("a", 100)
    fleet.up(up(0, cached=keys), 0.0)
    busy(fleet, 0, running=2, waiting_uncached_tokens=60_000)
    assert best(fleet, job(tokens=6_500, keys=keys)).worker == 1


def test_a_holder_with_a_short_queue_keeps_its_request_while_the_budget_holds() -> None:
    fleet, keys = fleet_of(), chain("a", 100)
    fleet.up(up(0, cached=keys), 0.0)
    busy(fleet, 0, running=2, waiting_uncached_tokens=1_000)
    assert best(fleet, job(tokens=6_500, keys=keys)).worker == 0


def placed(fleet: Fleet, worker: int, number: int, ttft_s: float) -> None:
    """A chat prompt of 1.7 s that has not begun."""
    asked = job(number, tokens=30_000, ttft_s=ttft_s)
    only = best(fleet_of(STEP_MODEL), asked)._replace(worker=WorkerId(worker))
    fleet.charge(asked, only, 0.0)


def test_a_short_prompt_goes_to_its_holder_before_a_longer_one_whose_line_is_later() -> None:
    keys = chain("a", 100)
    for line_s, is_in_time in ((9.0, True), (2.5, False)):
        fleet = fleet_of(STEP_MODEL)
        fleet.up(up(0, cached=keys), 0.0)
        placed(fleet, 0, 1, line_s)
        forecast = best(fleet, job(tokens=6_500, keys=keys, ttft_s=1.2))
        assert forecast.is_feasible is is_in_time
        assert (forecast.ahead_s < 0.1) is is_in_time
        assert (forecast.ttft_s < 0.2) is is_in_time


def test_who_is_late_already_is_not_before_a_short_prompt() -> None:
    fleet = fleet_of(STEP_MODEL)
    placed(fleet, 0, 1, 2.5)
    assert not best(fleet, job(arrived=0.0, ttft_s=1.2)).is_feasible
    assert best(fleet, job(arrived=1.0, ttft_s=1.2), now=1.0).is_feasible


@pytest.mark.parametrize(("tight", "is_found"), [(3, True), (4, False)])
def test_no_more_workers_are_looked_at_again_than_the_bound(tight: int, *, is_found: bool) -> None:
    """Holders come first, since they are cheaper; all are behind a prompt that is more urgent."""
    fleet, keys = fleet_of(*(STEP_MODEL,) * (tight + 1)), chain("a", 100)
    for worker in range(tight):
        fleet.up(up(worker, cached=keys), 0.0)
        placed(fleet, worker, worker, 2.5)
    placed(fleet, tight, 99, 30.0)
    assert best(fleet, job(tokens=6_500, keys=keys, ttft_s=1.2)).is_feasible is is_found


def test_remaining_budget_counts_not_the_promise() -> None:
    """The same request, later: what was feasible on the loaded holder is not any more."""
    fleet, keys = fleet_of(), chain("a", 100)
    fleet.up(up(0, cached=keys), 0.0)
    busy(fleet, 0, running=2, waiting_uncached_tokens=8_000)
    asked = job(tokens=6_500, keys=keys, ttft_s=2.0)
    assert best(fleet, asked, now=0.0).worker == 0
    assert best(fleet, asked, now=0.1).worker == 0
    assert best(fleet, asked, now=1.2).worker == 1


def test_residents_keep_their_pace() -> None:
    fleet = fleet_of()
    busy(fleet, 0, running=20, decode_context=700_000)  # 6.5 + 36 ms a step
    assert best(fleet, job()).worker == 1
    assert not best(fleet_loaded(700_000), job()).is_steady


def fleet_loaded(decode_context: int) -> Fleet:
    fleet = fleet_of(STEP_MODEL)
    busy(fleet, 0, running=20, decode_context=decode_context)
    return fleet


def test_batch_work_does_not_stand_in_the_way_of_a_person() -> None:
    """The step planner pauses less urgent decodes, so only residents as urgent or more bind."""
    fleet = fleet_of(STEP_MODEL)
    for number in range(40):
        asked = job(number, cls=BATCH, tokens=20_000, ttft_s=math.inf, tpot_s=math.inf)
        fleet.charge(asked, best(fleet, asked), 0.0)
    assert best(fleet, job(99)).is_steady
    assert fleet.step_s[2, 0] > 0.04
    assert best(fleet, job(99)).ahead_s == 0.0


def test_kv_that_does_not_fit_is_not_feasible() -> None:
    fleet = fleet_of(STEP_MODEL)
    busy(fleet, 0, running=1, blocks_free=3, blocks_cached=5)
    forecast = best(fleet, job(tokens=1_000))
    assert not forecast.has_room
    assert not forecast.is_feasible
    assert best(fleet, job(tokens=100, output=50.0)).has_room


def test_who_is_late_everywhere_goes_where_there_is_room_not_where_it_would_be_soonest() -> None:
    fleet = fleet_of()
    busy(fleet, 0, running=2, blocks_free=10)
    busy(fleet, 1, running=2, waiting_uncached_tokens=20_000)
    forecast = best(fleet, job(tokens=4_000, ttft_s=0.01))
    assert (forecast.worker, forecast.has_room, forecast.is_feasible) == (1, True, False)


def test_unequal_workers_are_judged_by_their_own_models() -> None:
    slow = replace(STEP_MODEL, row_s=20 * STEP_MODEL.row_s, floor_s=10 * STEP_MODEL.floor_s)
    assert best(fleet_of(slow, STEP_MODEL), job(tokens=4_000)).worker == 1


def test_a_failed_worker_is_avoided_unless_it_is_the_only_one() -> None:
    assert best(fleet_of(), job(avoid=WorkerId(0))).worker == 1
    assert best(fleet_of(), job(avoid=WorkerId(1))).worker == 0
    assert best(fleet_of(STEP_MODEL), job(avoid=WorkerId(0))).worker == 0


def test_only_workers_of_the_model_with_room_in_their_context_serve() -> None:
    fleet = fleet_of()
    fleet.up(up(1, model="other", context_max=500), 0.0)
    assert best(fleet, job(tokens=1_000)).worker == 0
    asked = job(tokens=1_000)
    assert budget_place()(replace(asked, request=replace(asked.request, model="other")), fleet, 0.0) == ()
    assert budget_place()(asked, Fleet(Limits()), 0.0) == ()


def test_equal_workers_share_sessions_and_keep_each_of_them() -> None:
    fleet = fleet_of(*[STEP_MODEL] * 8)
    chosen = [best(fleet, job(number)).worker for number in range(64)]
    assert set(chosen) == set(range(8))
    assert [best(fleet, job(number)).worker for number in range(64)] == chosen


def test_an_unmeasured_worker_brings_the_simple_rule() -> None:
    fleet = fleet_of(STEP_MODEL, replace(STEP_MODEL, version=0))
    busy(fleet, 0, running=4, waiting_uncached_tokens=1_000)
    asked = job()
    assert budget_place()(asked, fleet, 0.0) == lmetric_place(asked, fleet, 0.0)
    assert best(fleet, asked).worker == 1


@pytest.mark.parametrize("workers", [1, FEW + 1])
def test_a_pace_of_zero_is_a_promise_that_nobody_keeps_and_no_fault(workers: int) -> None:
    fleet, asked = fleet_of(*[STEP_MODEL] * workers), job(tpot_s=0.0)
    first = best(fleet, asked)
    assert not first.is_steady
    fleet.charge(asked, first, 0.0)
    assert not best(fleet, asked).is_steady


def slow_start(now: float) -> tuple[Fleet, Forecast]:
    """Worker 0 was measured beside a busy neighbour and said that it is half as fast; worker 1 has work."""
    slow = replace(STEP_MODEL, bias=2.0)
    fleet = fleet_of(slow, STEP_MODEL)
    fleet.report(WorkerId(1), load(running=1, decode_context=2_000, waiting_uncached_tokens=200), None, now)
    return fleet, best(fleet, job(tokens=4_000, arrived=now), now)


def test_who_looks_slow_is_asked_again_once_it_has_been_idle_for_long() -> None:
    assert slow_start(DOUBT_AFTER_S - 1.0)[1].worker == 1
    _, trial = slow_start(DOUBT_AFTER_S)
    assert (trial.worker, trial.is_feasible) == (0, True)
    assert trial.own_s == pytest.approx(STEP_MODEL.prefill_s(4_000))


def test_one_request_is_the_trial_and_what_the_worker_says_counts_again() -> None:
    fleet, trial = slow_start(DOUBT_AFTER_S)
    fleet.charge(job(tokens=4_000), trial, DOUBT_AFTER_S)
    assert best(fleet, job(1, tokens=4_000, arrived=DOUBT_AFTER_S), DOUBT_AFTER_S).worker == 1
    fleet.publish(2 * DOUBT_AFTER_S)  # the trial still runs
    assert fleet.view(0).row_s == pytest.approx(2 * STEP_MODEL.row_s)


def test_a_much_slower_machine_is_not_taken_for_a_fast_one() -> None:
    fleet = fleet_of(replace(STEP_MODEL, bias=50.0), STEP_MODEL)
    fleet.publish(DOUBT_AFTER_S)
    assert fleet.view(0).row_s == pytest.approx(50 / DOUBT_FACTOR * STEP_MODEL.row_s)
    assert fleet.view(1).row_s == STEP_MODEL.row_s


def test_work_of_another_router_ends_the_doubt() -> None:
    fleet, _ = slow_start(DOUBT_AFTER_S)
    fleet.report(WorkerId(0), load(running=1), None, DOUBT_AFTER_S)
    fleet.publish(DOUBT_AFTER_S)
    assert fleet.view(0).row_s == pytest.approx(2 * STEP_MODEL.row_s)


@given(
    backlogs=st.lists(st.integers(0, 40_000), min_size=2, max_size=6),
    budgets_s=st.tuples(st.floats(0.05, 20.0), st.floats(0.05, 20.0)),
    holder=st.integers(0, 5),
)
def test_less_budget_never_takes_a_slower_worker(
    backlogs: list[int], budgets_s: tuple[float, float], holder: int
) -> None:
    """Law: monotonicity. A tighter promise is kept, or gets a worker no slower than a looser one would."""
    fleet, keys = fleet_of(*[STEP_MODEL] * len(backlogs)), chain("a", 100)
    fleet.up(up(holder % len(backlogs), cached=keys), 0.0)
    for worker, tokens in enumerate(backlogs):
        busy(fleet, worker, running=1, waiting_uncached_tokens=tokens)
    tight, loose = (best(fleet, job(tokens=6_500, keys=keys, ttft_s=budget_s)) for budget_s in sorted(budgets_s))
    assert tight.is_feasible or tight.ttft_s <= loose.ttft_s
    assert loose.is_feasible or not tight.is_feasible


def test_the_probability_of_being_in_time_fits_the_90th_percentile() -> None:
    assert in_time(1.0, 1.25, 1.0) == pytest.approx(0.5)
    assert in_time(1.0, 1.25, 1.25) == pytest.approx(0.9, abs=1e-3)
    assert in_time(1.0, 1.25, -1.0) == 0.0
    assert in_time(1.0, 1.25, math.inf) == 1.0


A_WORKER = st.fixed_dictionaries(
    {
        "running": st.integers(0, 30),
        "waiting": st.integers(0, 3),
        "waiting_uncached_tokens": st.sampled_from([0, 500, 8_000, 60_000]),
        "blocks_free": st.sampled_from([0, 20, 4_000]),
        "decode_context": st.sampled_from([0, 50_000, 600_000]),
    }
)


@given(
    workers=st.lists(
        st.tuples(A_WORKER, st.sampled_from([1.0, 1.0, 1.3]), st.integers(0, 100)), min_size=1, max_size=FEW
    ),
    cls=st.sampled_from(RequestClass),
    ttft_s=st.sampled_from([0.01, 0.4, 2.0, 15.0]),
    resident_line_s=st.sampled_from([2.5, 30.0]),
    now=st.sampled_from([0.0, 0.1, 5.0]),
)
def test_one_by_one_and_all_at_once_make_the_same_choice_to_the_last_bit(
    workers: list[tuple[dict[str, int], float, int]],
    cls: RequestClass,
    ttft_s: float,
    resident_line_s: float,
    now: float,
) -> None:
    """Law: how many workers there are chooses how they are looked at, never which is taken."""
    fleet, keys = Fleet(Limits(index_every_block=1)), chain("a", 100)
    for number, (said, slowness, held) in enumerate(workers):
        model = replace(STEP_MODEL, row_s=slowness * STEP_MODEL.row_s)
        fleet.up(up(number, step_model=model, cached=keys[: 16 * held]), 0.0)
        busy(fleet, number, **said)
    placed(fleet, 0, 1, resident_line_s)
    fleet.publish(0.0)
    asked = job(7, cls=cls, tokens=6_500, keys=keys, ttft_s=ttft_s, avoid=WorkerId(0) if len(workers) == 3 else None)
    assert budget_place()(asked, fleet, now) == Scene.of(asked, fleet, now, Weights()).best()
