"""Tokenising is a bounded queue per class and tenant."""

from __future__ import annotations

from policies.intake import Intake, Place
from policies.limits import Limits
from policies.request import Request, RequestClass, Tenant
from tests.policies.scenes import request

CHATBOT, BACKGROUND, BATCH = RequestClass
LIMITS = Limits(tokenising_max=3, tokenising_per_tenant=2, tokenise_queue_max=2)


def asked(number: int, tenant: str = "a") -> Request:
    return request(number, tenant=Tenant(id=tenant))


def test_a_tenant_has_its_places_then_its_queue_then_none() -> None:
    intake = Intake(LIMITS)
    said = [intake.offer(asked(number), CHATBOT) for number in range(5)]
    assert said == [Place.NOW, Place.NOW, Place.QUEUED, Place.QUEUED, Place.NONE]


def test_another_tenant_still_finds_a_place() -> None:
    intake = Intake(LIMITS)
    for number in range(4):
        intake.offer(asked(number), CHATBOT)
    assert intake.offer(asked(9, "b"), CHATBOT) is Place.NOW


def test_freed_places_go_to_the_most_urgent_then_to_the_tenant_with_least() -> None:
    intake = Intake(Limits(tokenising_max=2, tokenising_per_tenant=2))
    intake.offer(asked(0, "a"), CHATBOT)
    intake.offer(asked(1, "c"), CHATBOT)
    for number, (tenant, cls) in enumerate((("b", BATCH), ("a", CHATBOT), ("b", CHATBOT)), start=2):
        assert intake.offer(asked(number, tenant), cls) is Place.QUEUED
    started = []
    for leaver in (asked(1, "c"), asked(0, "a"), asked(4, "b")):
        intake.leave(leaver, CHATBOT)
        started.append(intake.start_next())
    assert started == ["r4", "r3", "r2"]


def test_who_leaves_the_queue_makes_room_in_it() -> None:
    intake = Intake(LIMITS)
    for number in range(4):
        intake.offer(asked(number), CHATBOT)
    intake.leave(asked(2), CHATBOT)
    assert intake.start_next() is None
    assert intake.offer(asked(5), CHATBOT) is Place.QUEUED


def test_nothing_is_left_behind() -> None:
    intake = Intake(LIMITS)
    for number in range(4):
        intake.offer(asked(number, f"t{number}"), CHATBOT)
    for number in range(4):
        intake.leave(asked(number, f"t{number}"), CHATBOT)
        intake.start_next()
    assert (intake._running, intake._in_flight, intake._queues) == ({}, {}, {})
