"""The waiting room: classes, fair shares, least laxity, aging."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from policies.api import Job, Key
from policies.limits import Limits
from policies.ordering import LATE, ON_TIME, Accounts, WaitingRoom, least_laxity
from policies.request import RequestClass, RequestId, Tenant
from tests.policies.scenes import MODEL, job

CHATBOT, BACKGROUND, BATCH = RequestClass
WORK_S = 0.1


def room_of(*jobs: Job, work_s: float = WORK_S, limits: Limits = Limits()) -> WaitingRoom:  # noqa: B008 -- frozen
    room = WaitingRoom(least_laxity, limits)
    for asked in jobs:
        room.push(asked, work_s, asked.request.arrived)
    return room


def drain(room: WaitingRoom, now: float, cls: RequestClass = CHATBOT) -> list[str]:
    """Who comes out in which order when nothing else happens; each is booked to its tenant."""
    order = []
    while (head := room.head(MODEL, cls, now)) is not None:
        room.remove(head.job.request.id)
        room.given(head.job, head.work_s)
        order.append(str(head.job.request.id))
    return order


def test_the_latest_start_goes_first_not_the_first_arrival() -> None:
    room = room_of(job(0, ttft_s=9.0), job(1, ttft_s=3.0), job(2, ttft_s=6.0))
    assert drain(room, now=0.0) == ["r1", "r2", "r0"]


def test_predicted_work_counts_against_the_deadline() -> None:
    room = WaitingRoom(least_laxity, Limits())
    room.push(job(0, ttft_s=3.0), 0.1, 0.0)
    room.push(job(1, ttft_s=4.0), 2.0, 0.0)
    assert drain(room, now=0.0) == ["r1", "r0"]


def test_who_can_still_make_it_goes_before_who_is_late() -> None:
    room = room_of(job(0, ttft_s=1.0, patience_s=60.0), job(1, ttft_s=9.0))
    assert drain(room, now=5.0) == ["r1", "r0"]


def test_the_late_are_served_shortest_first_but_age() -> None:
    room = WaitingRoom(least_laxity, Limits())
    for number, (arrived, work_s) in enumerate(((0.0, 2.0), (0.5, 0.1), (7.5, 0.1))):
        room.push(job(number, ttft_s=0.5, patience_s=60.0, arrived=arrived), work_s, arrived)
    assert drain(room, now=8.5) == ["r1", "r2", "r0"]  # keys: 0 + 4*2.0, 0.5 + 4*0.1, 7.5 + 4*0.1
    room = WaitingRoom(least_laxity, Limits())
    for number, (arrived, work_s) in enumerate(((0.0, 2.0), (9.0, 0.1))):
        room.push(job(number, ttft_s=0.5, patience_s=60.0, arrived=arrived), work_s, arrived)
    assert drain(room, now=10.0) == ["r0", "r1"]  # nine seconds older beats two seconds longer


def test_half_its_patience_gone_a_late_request_goes_before_all_others() -> None:
    old = job(0, ttft_s=0.5, patience_s=30.0)
    assert least_laxity(old, WORK_S, 5.0)[0][0] == LATE
    assert least_laxity(old, WORK_S, 15.0)[0] == (ON_TIME, 0.0)
    room = room_of(old, *(job(number, arrived=14.0, ttft_s=2.0) for number in range(1, 4)))
    assert drain(room, now=15.0)[0] == "r0"


@given(
    ttft_s=st.floats(0.01, 100.0),
    patience_s=st.floats(0.01, 1_000.0),
    work_s=st.floats(0.0, 50.0),
    waited_s=st.floats(0.0, 1_000.0),
)
def test_a_key_holds_until_it_says(ttft_s: float, patience_s: float, work_s: float, waited_s: float) -> None:
    """Law: keys do not change with time before their end, and their end is ahead."""
    asked = job(ttft_s=ttft_s, patience_s=patience_s)
    key, valid_until = least_laxity(asked, work_s, waited_s)
    assert valid_until > waited_s
    between = waited_s + (min(valid_until, waited_s + 1.0) - waited_s) / 2
    assert least_laxity(asked, work_s, between) == (key, valid_until)


def test_a_tenant_with_a_thousand_requests_does_not_delay_one_with_a_single() -> None:
    crowd = [job(number, tenant=Tenant(id="crowd"), ttft_s=1.0) for number in range(1_000)]
    room = room_of(*crowd, job(1_000, tenant=Tenant(id="alone"), ttft_s=9.0))
    assert drain(room, now=0.0).index("r1000") <= 6  # a quantum of half a GPU-second, a tenth each


def test_shares_follow_weights() -> None:
    heavy, light = Tenant(id="heavy", weight=3.0), Tenant(id="light")
    jobs = [job(number, tenant=heavy if number % 2 else light, ttft_s=5.0) for number in range(400)]
    served = drain(room_of(*jobs), now=0.0)[:200]
    share = sum(int(name[1:]) % 2 for name in served) / len(served)
    assert 0.7 < share < 0.8


def test_nobody_saves_up_while_away() -> None:
    accounts = Accounts(8)
    accounts.charge("busy", 100.0)
    accounts.raise_floor(90.0)
    assert accounts.given_s("back again") == 90.0


def test_accounts_are_bounded() -> None:
    accounts = Accounts(tenants_max=4)
    for number in range(100):
        accounts.charge(f"t{number}", 1.0)
    assert len(accounts._given_s) == 4


def test_a_class_that_had_less_than_its_reserve_may_pass() -> None:
    room = room_of(job(0), job(1, cls=BACKGROUND))
    for _ in range(30):
        room.given(job(2), 1.0)
    assert room.is_anyone_before(MODEL, CHATBOT)
    assert room.is_reserve_due(BACKGROUND)
    room.given(job(3, cls=BACKGROUND), 5.0)
    assert not room.is_reserve_due(BACKGROUND)


def test_each_model_has_its_own_queue() -> None:
    other = job(1)
    room = room_of(job(0), replace(other, request=replace(other.request, model="other")))
    assert room.models() == [MODEL, "other"]
    assert drain(room, now=0.0) == ["r0"]
    assert room.models() == ["other"]


@given(st.lists(st.tuples(st.sampled_from(RequestClass), st.floats(0.0, 5.0), st.booleans()), max_size=40))
def test_work_is_what_waits(pushed: list[tuple[RequestClass, float, bool]]) -> None:
    """Law: counts and GPU-seconds are those of the requests that wait, whoever left in between."""
    room = WaitingRoom(least_laxity, Limits())
    for number, (cls, work_s, _) in enumerate(pushed):
        room.push(job(number, cls=cls), work_s, 0.0)
    for number, (_, _, leaves) in enumerate(pushed):
        if leaves:
            room.remove(RequestId(f"r{number}"))
    left = [(cls, work_s) for cls, work_s, leaves in pushed if not leaves]
    assert len(room) == len(left)
    for cls in RequestClass:
        assert room.count(MODEL, cls) == sum(other <= cls for other, _ in left)
        assert abs(room.work_s(MODEL, cls) - sum(work_s for other, work_s in left if other <= cls)) < 1e-9


def test_entries_of_the_gone_are_swept() -> None:
    room = WaitingRoom(least_laxity, Limits())
    for number in range(5_000):
        room.push(job(number, tenant=Tenant(id=f"t{number % 50}"), ttft_s=1.0 + number), WORK_S, 0.0)
        room.remove(RequestId(f"r{number}"))
    (lane,) = room._lanes.values()
    assert sum(len(heap) for heap in lane.heaps.values()) <= 65


def _stale_order(_: Job, __: float, now: float) -> tuple[Key, float]:
    return (0, 0.0), now - 1.0


def test_an_order_that_never_holds_is_asked_once() -> None:
    """A plug-in's key that is out of date at once must not keep the head turning for ever."""
    room = WaitingRoom(_stale_order, Limits())
    room.push(job(0), WORK_S, 0.0)
    assert drain(room, now=5.0) == ["r0"]


def test_behind_the_head_come_the_next_by_key() -> None:
    room = room_of(*(job(number, ttft_s=1.0 + (7 * number) % 20) for number in range(20)))
    behind = [entry.job.promise.budget.ttft_s for entry in room.behind(MODEL, CHATBOT, 0.0, most=4)]
    assert behind == [2.0, 3.0, 4.0, 5.0]
    assert room.behind(MODEL, BATCH, 0.0, most=4) == []


@given(st.lists(st.tuples(st.floats(1.0, 9.0), st.integers(0, 3), st.booleans()), min_size=2, max_size=40))
def test_behind_the_head_comes_who_would_be_head_next(pushed: list[tuple[float, int, bool]]) -> None:
    """Law: with accounts untouched, the order is that in which heads come; who left is in none."""
    room = WaitingRoom(least_laxity, Limits())
    for number, (ttft_s, tenant, _) in enumerate(pushed):
        room.push(job(number, ttft_s=ttft_s, tenant=Tenant(id=f"t{tenant}")), WORK_S, 0.0)
    for number, (_, _, leaves) in enumerate(pushed):
        if leaves:
            room.remove(RequestId(f"r{number}"))
    behind = [str(entry.job.request.id) for entry in room.behind(MODEL, CHATBOT, 0.0, most=100)]
    heads = []
    while (head := room.head(MODEL, CHATBOT, 0.0)) is not None:
        heads.append(str(room.remove(head.job.request.id).job.request.id))
    assert behind == heads[1:]


def test_the_oldest_is_who_was_held_first_and_still_waits() -> None:
    room = room_of(job(0, ttft_s=9.0), job(1, ttft_s=1.0))
    assert room.oldest(MODEL, CHATBOT) is not None
    assert str(room.oldest(MODEL, CHATBOT).request.id) == "r0"  # type: ignore[union-attr]
    room.remove(RequestId("r0"))
    assert str(room.oldest(MODEL, CHATBOT).request.id) == "r1"  # type: ignore[union-attr]
    room.remove(RequestId("r1"))
    assert room.oldest(MODEL, CHATBOT) is None
