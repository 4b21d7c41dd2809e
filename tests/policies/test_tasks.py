"""What a background agent's turns leave of their deadlines is its next turn's: bounded, once, and only what is left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.actions import Dispatch
from policies.api import Promise
from policies.dispatcher import Dispatcher
from policies.events import Failed, Gone, WorkerLost
from policies.request import Budget, Request, RequestClass, RequestId, Tenant, WorkerId
from policies.sessions import REMEMBERED_S
from policies.tasks import Tasks
from tests.policies.scenes import LIMITS, dispatched, dispatcher, load, offer, rejected, report, request

CHATBOT, BACKGROUND, _ = RequestClass
PROMISE = Promise(Budget(15.0, 0.15, 20.0), 600.0)
MOST_S = 60.0


def turn(
    number: int, arrived: float, *, session: str = "task", cls: RequestClass = BACKGROUND, **facts: str
) -> Request:
    """Its answer is short for certain, so that what is learnt of lengths changes no promise."""
    return request(number, arrived=arrived, session=session, declared_class=cls, tool_count=3, max_output=10, **facts)


def answered(mind: Dispatcher, asked: Request, took_s: float) -> Dispatch:
    """The turn's placement on an idle worker, which answers it after so long."""
    (placed,) = dispatched(offer(mind, asked))
    ended = ((asked.id, 10),)
    mind.handle(report(int(placed.worker), first_tokens=((asked.id, 0),), finished=ended), asked.arrived + took_s)
    return placed


def test_what_a_turn_did_not_need_of_its_deadline_is_the_next_ones() -> None:
    mind = dispatcher(workers=1)
    first = answered(mind, turn(0, 0.0), took_s=5.0)
    second = answered(mind, turn(1, 10.0), took_s=5.0)

    saved_s = first.budget.deadline_s - 5.0
    assert first.saved_s == 0.0
    assert second.saved_s == pytest.approx(saved_s)
    assert second.budget.deadline_s == pytest.approx(first.budget.deadline_s + saved_s)
    assert second.budget.ttft_s == pytest.approx(first.budget.ttft_s + saved_s)
    assert second.budget.tpot_s == first.budget.tpot_s


def test_a_slow_turn_spends_it_and_a_late_one_owes_nothing() -> None:
    mind = dispatcher(workers=1)
    first = answered(mind, turn(0, 0.0), took_s=1.0)
    slow = answered(mind, turn(1, 10.0), took_s=first.budget.deadline_s)  # a turn's own budget, and not more
    late = answered(mind, turn(2, 100.0), took_s=1_000.0)
    last = answered(mind, turn(3, 2_000.0), took_s=1.0)

    assert late.saved_s == pytest.approx(slow.saved_s)
    assert last.saved_s == 0.0
    assert last.budget == first.budget


def test_the_purse_is_bounded_in_seconds_and_in_number() -> None:
    mind = dispatcher(workers=1)
    for number in range(12):
        placed = answered(mind, turn(number, 100.0 * number), took_s=1.0)
    assert placed.saved_s == LIMITS.task_slack_max_s

    tasks = Tasks(2, MOST_S)
    for number in range(3):
        tasks.ended(turn(number, 0.0, session=f"s{number}"), BACKGROUND, PROMISE, 1.0)
    assert len(tasks) == 2
    assert tasks.loosen(turn(3, 2.0, session="s0"), BACKGROUND, PROMISE, 2.0) == PROMISE


def test_two_turns_at_once_spend_it_once_and_do_not_save_twice() -> None:
    tasks = Tasks(8, MOST_S)
    tasks.ended(turn(0, 0.0), BACKGROUND, PROMISE, 5.0)
    one, other = (tasks.loosen(turn(number, 10.0), BACKGROUND, PROMISE, 10.0) for number in (1, 2))
    assert (one.saved_s, other.saved_s) == (15.0, 0.0)

    tasks.ended(turn(1, 10.0), BACKGROUND, one, 15.0)  # 30 left
    tasks.ended(turn(2, 10.0), BACKGROUND, other, 15.0)  # 15 left
    assert tasks.loosen(turn(3, 20.0), BACKGROUND, PROMISE, 20.0).saved_s == 30.0


def test_only_a_background_agents_own_turns_have_a_purse() -> None:
    tasks = Tasks(8, MOST_S)
    strangers = {
        "no session": (turn(1, 0.0, session=""), BACKGROUND),
        "a chat": (turn(2, 0.0), CHATBOT),
        "a subagent": (turn(3, 0.0, agent_id="a"), BACKGROUND),
        "a window of its own": (turn(4, 0.0, completion_window="1h"), BACKGROUND),
        "another salt domain": (replace(turn(5, 0.0), tenant=Tenant("other", "other")), BACKGROUND),
    }
    for who, (asked, cls) in strangers.items():
        tasks.ended(asked, cls, PROMISE, 1.0)
        assert len(tasks) == (who == "another salt domain"), who

    tasks.ended(turn(6, 0.0), BACKGROUND, PROMISE, 1.0)
    for who, (asked, cls) in strangers.items():
        if who != "another salt domain":
            assert tasks.loosen(asked, cls, PROMISE, 2.0) == PROMISE, who
    assert tasks.loosen(turn(7, 2.0), BACKGROUND, PROMISE, 2.0).saved_s == 19.0


def test_an_hour_later_nothing_is_left() -> None:
    tasks = Tasks(8, MOST_S)
    tasks.ended(turn(0, 0.0), BACKGROUND, PROMISE, 1.0)
    assert tasks.loosen(turn(1, 1.0), BACKGROUND, PROMISE, 2.0 + REMEMBERED_S).saved_s == 0.0


def test_after_a_failover_it_is_what_is_left_of_both_not_what_was_given() -> None:
    mind = dispatcher(workers=2)
    answered(mind, turn(0, 0.0), took_s=5.0)
    (first,) = dispatched(offer(mind, turn(1, 10.0)))
    mind.handle(WorkerLost(first.worker, "killed"), 14.0)
    (second,) = dispatched(mind.handle(Failed(RequestId("r1"), first.worker, "worker lost"), 14.0))

    assert second.saved_s == first.saved_s
    assert second.first_left_s == pytest.approx(first.first_left_s - 4.0)
    assert second.deadline_left_s == pytest.approx(first.deadline_left_s - 4.0)


def test_a_turn_that_is_given_up_keeps_what_its_wait_has_not_used_and_saves_nothing() -> None:
    mind = dispatcher(workers=1)
    first = answered(mind, turn(0, 0.0), took_s=5.0)
    saved_s = first.budget.deadline_s - 5.0
    offer(mind, turn(1, 10.0))
    mind.handle(Gone(RequestId("r1")), 13.0)  # a worker had it for 3 s
    second = answered(mind, turn(2, 14.0), took_s=1.0)
    assert second.saved_s == pytest.approx(saved_s - 3.0)


def test_a_refused_turn_takes_what_is_left_to_its_retry() -> None:
    mind = dispatcher(workers=1)
    saved_s = answered(mind, turn(0, 0.0), took_s=5.0).budget.deadline_s - 5.0
    full = report(load=load(running=4, blocks_free=0))
    mind.handle(full, 9.0)
    assert dispatched(offer(mind, replace(turn(1, 10.0), declared_timeout_s=10.0))) == []
    assert rejected(mind.handle(full, 20.0))
    mind.handle(report(), 21.0)
    assert answered(mind, turn(2, 22.0), took_s=1.0).saved_s == pytest.approx(saved_s - 10.0)


def test_without_a_bound_worth_having_promises_are_as_before() -> None:
    mind = dispatcher(workers=1, limits=replace(LIMITS, task_slack_max_s=0.0))
    first, second = (answered(mind, turn(number, 100.0 * number), took_s=1.0) for number in range(2))
    assert (second.budget, second.saved_s) == (first.budget, 0.0)
    assert second.worker == WorkerId(0)
