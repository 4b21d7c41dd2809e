"""The ledger: charged when decided, released on events, corrected by frames."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.api import Forecast, Job
from policies.events import WorkerLoad
from policies.ledger import Charge
from policies.limits import Limits
from policies.placement import budget_place
from policies.request import RequestClass, WorkerId
from policies.worker import ONCE, PER_CLASS, REST, Fleet
from tests.policies.scenes import MODEL, STEP_MODEL, chain, job, load, up

CHATBOT, BACKGROUND, BATCH = RequestClass
W0 = WorkerId(0)


def fleet_of(workers: int = 1, limits: Limits = Limits(index_every_block=1)) -> Fleet:  # noqa: B008 -- frozen
    fleet = Fleet(limits)
    for worker in range(workers):
        assert fleet.up(up(worker), 0.0)
    return fleet


def forecast(fleet: Fleet, asked: Job, now: float = 0.0) -> Forecast:
    fleet.publish(0.0)
    return budget_place()(asked, fleet, now)[0]


def charged(fleet: Fleet, asked: Job) -> Charge:
    charge = fleet.charge(asked, forecast(fleet, asked), 0.0)
    fleet.publish(0.0)
    return charge


def frame(fleet: Fleet, said: WorkerLoad, now: float = 1.0, worker: int = 0) -> None:
    fleet.report(WorkerId(worker), said, None, now)
    fleet.publish(0.0)


def test_the_next_request_in_the_same_millisecond_sees_the_charge() -> None:
    fleet, asked = fleet_of(), job(tokens=2_000)
    charged(fleet, asked)
    assert fleet.ahead_s[:, 0].tolist() == pytest.approx([STEP_MODEL.prefill_s(2_000)] * 3)
    assert fleet.streams[0] == 1


def test_less_urgent_prompts_are_not_ahead_of_more_urgent_ones() -> None:
    fleet, asked = fleet_of(), job(cls=BATCH, tokens=2_000, ttft_s=math.inf, tpot_s=math.inf)
    charged(fleet, asked)
    assert fleet.ahead_s[CHATBOT, 0] == fleet.ahead_s[BACKGROUND, 0] == 0.0
    assert fleet.ahead_s[BATCH, 0] > 0.09


@given(st.lists(st.tuples(st.sampled_from(RequestClass), st.integers(1, 9_000), st.booleans()), max_size=12))
def test_what_is_charged_is_released(placed: list[tuple[RequestClass, int, bool]]) -> None:
    """Law: after all ends the books are as before, to the last bit."""
    fleet = fleet_of()
    before = fleet.ledger(W0).column()
    jobs = [job(number, cls=cls, tokens=tokens) for number, (cls, tokens, _) in enumerate(placed)]
    charges = [charged(fleet, asked) for asked in jobs]
    for charge, (_, _, has_started) in zip(charges, placed, strict=True):
        if has_started:
            charge.ledger.start(charge, charge.predicted_ttft_s)
        fleet.release(charge, has_started)
    ledger = fleet.ledger(W0)
    ledger.residual = 1.0  # what was learned stays learned
    assert ledger.column() == before


def test_a_frame_tells_how_much_of_a_prompt_is_still_ahead() -> None:
    fleet, asked = fleet_of(), job(tokens=8_000)
    charged(fleet, asked)
    whole_s = float(fleet.ahead_s[0, 0])
    for _ in range(3):  # a charge counts beside two frames: they may have left before it came
        frame(fleet, load(running=1, waiting_uncached_tokens=2_000))
    assert fleet.ahead_s[0, 0] == whole_s / 4


def test_a_frame_that_left_before_our_dispatch_does_not_hide_it() -> None:
    fleet, asked = fleet_of(), job(tokens=8_000)
    charged(fleet, asked)
    frame(fleet, load())
    assert fleet.ahead_s[0, 0] == pytest.approx(STEP_MODEL.prefill_s(8_000))


def test_the_work_of_other_routers_counts() -> None:
    fleet = fleet_of()
    frame(fleet, load(running=3, waiting=1, waiting_uncached_tokens=4_000, decode_context=9_000))
    assert fleet.streams[0] == 4
    assert fleet.ahead_s[0, 0] == 4_000 * STEP_MODEL.row_s
    assert fleet.step_s[0, 0] > STEP_MODEL.decode_s(1, 0)


def test_the_tightest_pace_of_residents_as_urgent_or_more_is_kept() -> None:
    fleet = fleet_of()
    for number, (cls, tpot_s) in enumerate(((CHATBOT, 0.05), (CHATBOT, 0.04), (BATCH, 0.01))):
        asked = job(number, cls=cls, tpot_s=tpot_s)
        charged(fleet, asked)
    assert fleet.pace_s[:, 0].tolist() == [0.04, 0.04, 0.01]


def test_growth_of_residents_is_kept_free() -> None:
    fleet, asked = fleet_of(), job(tokens=1_000, output=2_000.0)
    free = fleet.room_tokens[:, 0].tolist()
    charge = charged(fleet, asked)
    for number in range(3):  # its prompt and half of its answer, and some for the spread
        assert fleet.room_tokens[number, 0] < free[number] - 1_000 - 1_000
    fleet.release(charge, has_started=False)
    fleet.publish(0.0)
    assert fleet.room_tokens[:, 0].tolist() == free


def test_a_worker_that_takes_so_many_requests_has_room_for_no_more_of_any_class() -> None:
    fleet, asked = Fleet(Limits()), job(tokens=10)
    fleet.up(up(requests_max=2), 0.0)
    charges = [fleet.charge(asked, forecast(fleet, asked), 0.0) for _ in range(2)]
    assert not any(forecast(fleet, job(cls=cls, tokens=10)).has_room for cls in RequestClass)
    fleet.release(charges[0], has_started=True)
    assert forecast(fleet, asked).has_room
    frame(fleet, load(running=1, waiting=1))  # one of them is another router's
    assert not forecast(fleet, asked).has_room


def test_what_less_urgent_residents_computed_is_room_for_a_person() -> None:
    fleet, asked = fleet_of(), job(tokens=1_000, output=2_000.0, cls=BACKGROUND)
    free = fleet.room_tokens[:, 0].tolist()
    charge = charged(fleet, asked)
    chat, agent, batch = fleet.room_tokens[:, 0].tolist()
    assert chat == free[0]
    assert agent == batch < free[1] - 2_000
    fleet.release(charge, has_started=False)
    fleet.publish(0.0)
    assert fleet.room_tokens[:, 0].tolist() == free


def test_predictions_that_are_always_too_short_are_corrected() -> None:
    fleet = fleet_of()
    for number in range(200):
        asked = job(number)
        charge = charged(fleet, asked)
        charge.ledger.start(charge, 1.5 * charge.predicted_ttft_s)
        fleet.release(charge, has_started=True)
    fleet.publish(0.0)
    assert 1.3 < fleet.residual[0] <= 2.0


def test_a_busy_worker_that_falls_silent_looks_later_and_later() -> None:
    fleet, asked = fleet_of(), job()
    charged(fleet, asked)
    assert forecast(fleet, job(1), now=10.0).ttft_s > 9.0
    assert forecast(fleet_of(), job(1), now=10.0).ttft_s < 1.0  # an idle one has nothing to say


def test_a_lost_worker_frees_its_slot_and_its_prefixes() -> None:
    fleet, keys = fleet_of(2), chain("a", 5)
    asked = job(keys=keys)
    charge = fleet.charge(asked, replace_worker(forecast(fleet, asked), 0), 0.0)
    fleet.lost(W0, 1.0)
    fleet.release(charge, has_started=False)  # late news of a lost worker changes nothing
    fleet.up(up(7), 1.0)
    fleet.publish(0.0)
    assert fleet.worker.tolist() == [7, 1]
    assert fleet.streams.tolist() == [0.0, 0.0]
    assert fleet.hit_tokens(asked.prompt.chain, "m").tolist() == [0.0, 0.0]


def replace_worker(made: Forecast, worker: int) -> Forecast:
    return made._replace(worker=WorkerId(worker))


def test_a_worker_comes_back_with_what_it_has_cached() -> None:
    fleet, keys = Fleet(Limits(index_every_block=1)), chain("a", 5)
    fleet.up(up(0, cached=keys), 0.0)
    assert fleet.hit_tokens(job(keys=keys).prompt.chain, "m").tolist() == [320.0]


def test_workers_beyond_the_bound_are_not_taken() -> None:
    fleet = fleet_of(2, Limits(workers_max=2))
    assert not fleet.up(up(2), 0.0)
    assert WorkerId(2) not in fleet


def test_promises_do_not_follow_a_worker_that_its_load_makes_slow() -> None:
    fleet = Fleet(Limits())
    fleet.up(up(0, step_model=replace(STEP_MODEL, version=0, row_s=9.0)), 0.0)
    fleet.report(W0, load(), STEP_MODEL, 1.0)  # a prior that nobody measured gives way to the first measurement
    assert fleet.profile("m") == STEP_MODEL
    fleet.report(W0, load(), replace(STEP_MODEL, row_s=1.0, version=2), 2.0)
    assert fleet.profile("m") == STEP_MODEL


def test_the_fastest_worker_is_the_profile_also_while_it_is_away() -> None:
    fleet, slow = fleet_of(1), replace(STEP_MODEL, row_s=1.0)
    fleet.up(up(1, step_model=slow), 0.0)
    assert fleet.profile("m") == STEP_MODEL
    fleet.lost(W0, 1.0)
    fleet.lost(WorkerId(1), 2.0)
    assert fleet.profile("m") is not None
    assert fleet.block_tokens("m") == 64
    assert fleet.count("m") == 0


def test_views_and_arrays_say_the_same() -> None:
    fleet = fleet_of(2)
    charged(fleet, job(tokens=2_000))
    for slot in range(2):
        view = fleet.view(slot)
        for name in (*ONCE, *REST):
            assert float(getattr(fleet, name)[slot]) == getattr(view, name), name
        for name in PER_CLASS:
            assert tuple(getattr(fleet, name)[:, slot].tolist()) == getattr(view, name), name
        assert fleet.worker[slot] == view.worker


def test_what_policies_are_shown_cannot_be_written_into() -> None:
    fleet = fleet_of(2)
    shown = [getattr(fleet, name) for name in ("worker", *ONCE, *PER_CLASS, *REST)]
    for array in (*shown, fleet.serves(MODEL, 10, None)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
