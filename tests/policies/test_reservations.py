"""A refusal keeps room for its client: from the time that it was told, for ten seconds, and for nobody else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.actions import Action, Reject
from policies.dispatcher import Dispatcher
from policies.events import Tick
from policies.limits import Limits
from policies.ordering import WaitingRoom, least_laxity
from policies.request import Request, RequestClass, Tenant
from policies.reservations import Reservations
from tests.policies.scenes import LIMITS, MODEL, dispatched, dispatcher, job, load, offer, rejected, report, request

CHATBOT, BACKGROUND, BATCH = RequestClass
LANE = (MODEL, CHATBOT)
TIGHT = replace(LIMITS, room_s=(30.0, 0.5, 900.0), reservation_share=1.0)
FULL = report(load=load(running=4, blocks_free=0))
ROOM_S = 100.0


def agent(number: int, arrived: float, session: str = "") -> Request:
    return request(
        number, arrived=arrived, session=session or f"s{number}", declared_class=BACKGROUND, body_hash=7, max_output=10
    )


def crowded(limits: Limits = TIGHT) -> Dispatcher:
    """Nothing can be placed, and the agents' waiting room is full."""
    mind = dispatcher(workers=1, limits=limits)
    mind.handle(FULL, 0.0)
    for number in range(100, 120):
        if rejected(offer(mind, agent(number, 0.0), tokens=3_000)):
            return mind
    raise AssertionError("the room never fills")


def refused(mind: Dispatcher, asked: Request) -> Reject:
    mind.handle(FULL, asked.arrived)
    (said,) = rejected(offer(mind, asked, tokens=3_000))
    return said


def told_s(refusal: Reject) -> float:
    assert refusal.is_reserved
    assert refusal.retry_after_s is not None
    return refusal.retry_after_s


def is_held(actions: list[Action]) -> bool:
    return not rejected(actions)


def test_who_comes_back_in_time_finds_room_where_newcomers_find_none() -> None:
    mind = crowded()
    back_at = 1.0 + told_s(refused(mind, agent(0, 1.0)))
    mind.handle(FULL, back_at)
    assert rejected(offer(mind, agent(1, back_at), tokens=3_000))
    assert is_held(offer(mind, agent(2, back_at, "s0"), tokens=3_000))
    assert mind.reservations.kept == 1


def test_it_goes_before_newcomers_who_have_waited_for_longer() -> None:
    mind = dispatcher(workers=1, limits=replace(TIGHT, room_s=(30.0, 1.0, 900.0), reexamine_s=0.0, pump_max=1))
    mind.handle(FULL, 0.0)
    numbers = iter(range(100, 200))
    while is_held(offer(mind, agent(next(numbers), 0.0), tokens=3_000)):
        pass
    back_at = 1.0 + told_s(refused(mind, agent(0, 1.0)))
    mind.handle(FULL, back_at)
    offer(mind, agent(1, back_at, "s0"), tokens=3_000)
    (first,) = dispatched(mind.handle(report(), back_at + 0.1))
    assert first.request_id == "r1"
    assert first.is_reserved
    (second,) = dispatched(mind.handle(report(), back_at + 0.2))
    assert not second.is_reserved


@pytest.mark.parametrize(("is_reserved", "first"), [(True, "mine"), (False, "other")])
def test_what_its_tenant_had_before_does_not_hold_it_back(is_reserved: bool, first: str) -> None:
    room = WaitingRoom(least_laxity, LIMITS)
    mine, other = (job(number, tenant=Tenant(id=name)) for number, name in enumerate(("mine", "other")))
    room.given(mine, 10 * LIMITS.fair_quantum_s)
    room.push(other, 1.0, 0.0)
    room.push(replace(mine, is_reserved=is_reserved), 1.0, 0.0)
    head = room.head(MODEL, CHATBOT, 0.0)
    assert head is not None
    assert head.job.request.tenant.id == first


def test_no_room_is_kept_for_who_comes_too_early_too_late_or_not_at_all() -> None:
    mind = crowded()
    back_at = 1.0 + told_s(refused(mind, agent(0, 1.0)))
    assert refused(mind, agent(1, back_at - 0.5, "s0"))
    back_at = back_at - 0.5 + LIMITS.reservation_s + 30.0
    mind.handle(Tick(), back_at)
    assert refused(mind, agent(2, back_at, "s0"))
    assert (mind.reservations.moved, mind.reservations.kept) == (1, 0)
    assert mind.reservations.missed >= 1


def test_a_no_show_gives_the_room_back_to_newcomers() -> None:
    kept = Reservations(LIMITS)
    assert kept.make(agent(0, 0.0), LANE, 2.0, 5.0, ROOM_S)
    assert (kept.told_s(LANE), kept.open_s(LANE)) == (2.0, 0.0)
    kept.advance(4.9)
    assert kept.open_s(LANE) == 0.0
    kept.advance(5.0)
    assert kept.open_s(LANE) == 2.0
    kept.advance(15.0)
    assert (kept.told_s(LANE), kept.open_s(LANE), len(kept), kept.counts.missed) == (0.0, 0.0, 0, 1)


def test_a_second_refusal_moves_it_and_does_not_stack() -> None:
    kept = Reservations(LIMITS)
    for number, opens_at in enumerate((5.0, 20.0)):
        assert kept.make(agent(number, 0.0, "s"), LANE, 2.0, opens_at, ROOM_S)
    kept.advance(6.0)
    assert (len(kept), kept.told_s(LANE), kept.open_s(LANE)) == (1, 2.0, 0.0)
    kept.advance(20.0)
    assert kept.open_s(LANE) == 2.0
    assert (kept.counts.made, kept.counts.moved) == (2, 1)


@pytest.mark.parametrize(
    "stranger",
    [
        {"session": "other"},
        {"tenant": Tenant(id="other")},
        {"model": "another"},
    ],
)
def test_a_stranger_does_not_get_it(stranger: dict[str, object]) -> None:
    kept = Reservations(LIMITS)
    mine = agent(0, 0.0, "mine")
    kept.make(mine, LANE, 2.0, 5.0, ROOM_S)
    assert not kept.claim(replace(mine, **stranger), CHATBOT, 6.0)  # type: ignore[arg-type]
    assert not kept.claim(mine, BACKGROUND, 6.0)
    assert kept.claim(mine, CHATBOT, 6.0)
    assert not kept.claim(mine, CHATBOT, 6.0)  # once


def test_without_a_session_the_same_body_is_known_and_nothing_else() -> None:
    kept = Reservations(LIMITS)
    asked = request(0, body_hash=7)
    assert kept.make(asked, LANE, 2.0, 5.0, ROOM_S)
    assert not kept.claim(request(1, body_hash=8), CHATBOT, 6.0)
    assert kept.claim(request(2, body_hash=7), CHATBOT, 6.0)
    assert not kept.make(request(3), LANE, 2.0, 5.0, ROOM_S)


def test_a_tenant_holds_no_more_than_its_share_and_nobody_more_than_the_bound() -> None:
    kept = Reservations(LIMITS)
    share_s = LIMITS.reservation_share * ROOM_S
    made = [kept.make(agent(number, 0.0), LANE, 1.0, 5.0, ROOM_S) for number in range(8)]
    assert sum(made) == share_s == 5
    assert kept.make(replace(agent(9, 0.0), tenant=Tenant(id="other")), LANE, 1.0, 5.0, ROOM_S)

    few = Reservations(replace(LIMITS, reservations_max=2))
    assert [few.make(agent(number, 0.0), LANE, 0.1, 5.0, ROOM_S) for number in range(3)] == [True, True, False]


def test_who_got_in_before_its_time_has_no_second_place() -> None:
    mind = crowded()
    back_at = 1.0 + told_s(refused(mind, agent(0, 1.0)))
    mind.handle(report(), 1.5)  # the worker has room again: everybody goes
    for tenth in range(30):
        mind.handle(report(), 1.6 + tenth / 10)
    early = back_at - 0.1
    assert dispatched(offer(mind, agent(1, early, "s0")))
    assert mind.reservations.early == 1
    assert not dispatched(offer(mind, agent(2, back_at + 1.0, "s0")))[0].is_reserved


def test_who_is_refused_later_is_told_to_come_behind_those_who_were_told_before() -> None:
    mind = crowded(replace(TIGHT, reservation_share=1_000.0))
    said = [told_s(refused(mind, agent(number, 1.0))) for number in range(60)]
    assert said[-1] > 3 * said[0]


def test_what_was_claimed_is_swept_from_the_calendar() -> None:
    kept = Reservations(LIMITS)
    for number in range(1_000):
        asked = agent(number, 0.0)
        assert kept.make(asked, LANE, 1.0, 5.0, ROOM_S)
        assert kept.claim(asked, CHATBOT, 6.0)
    assert len(kept._turns) <= 65
