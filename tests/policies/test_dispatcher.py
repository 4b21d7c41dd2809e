"""What the dispatcher does in the cases that matter, told one by one; its laws are in test_dispatcher_laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from policies.actions import Action, Cancel, Dispatch, Reject, Tokenise, WakeAt
from policies.builtin import BUILTINS
from policies.dispatcher import Dispatcher, State
from policies.events import (
    Arrived,
    Event,
    Failed,
    Gone,
    Offered,
    PolicyFault,
    Started,
    Stopped,
    Tick,
    WorkerLost,
    WorkerReport,
)
from policies.limits import Limits
from policies.request import RequestClass, RequestId, Tenant, WorkerId
from policies.trust import FAULTS_WITHIN_S
from tests.policies.scenes import (
    BLOCK,
    LIMITS,
    STEP_MODEL,
    chain,
    dispatched,
    dispatcher,
    load,
    offer,
    rejected,
    report,
    request,
    up,
)

CHATBOT, BACKGROUND, BATCH = RequestClass
FULL = load(running=4, blocks_free=0)  # no KV to be had
FREE = load(running=4)
ONE_AT_A_TIME = replace(LIMITS, room_s=(1e6, 1e6, 1e6), reexamine_s=0.0, pump_max=1)
PATIENT = {name: {"patience_s": 1e6} for name in ("chat", "agent")}


def saturate(mind: Dispatcher, now: float = 0.0) -> None:
    """No worker has room for anything."""
    for worker in mind.fleet.worker.tolist():
        mind.handle(report(worker, load=FULL), now)


def streams(mind: Dispatcher) -> float:
    """What the first worker serves, as placement sees it."""
    mind.fleet.publish(0.0)
    return float(mind.fleet.streams[0])


def test_an_offer_is_told_to_tokenise_with_class_and_reason_before_anything_costly() -> None:
    actions = dispatcher(workers=1).handle(Offered(request(declared_class=BATCH)), 0.0)
    assert actions[0] == Tokenise(RequestId("r0"), BATCH, "declared")


def test_tokens_on_an_idle_fleet_go_to_a_worker_with_the_promise() -> None:
    actions = offer(dispatcher(workers=2), request(), tokens=2_000)
    (placed,) = dispatched(actions)
    assert placed.first_left_s == placed.budget.ttft_s > 1.0
    assert placed.predicted_ttft_s < 0.2
    assert placed.reason == "alone on an idle worker"


def test_time_spent_tokenising_is_charged_to_the_budget() -> None:
    mind = dispatcher(workers=1)
    mind.handle(Offered(request()), 0.0)
    (placed,) = dispatched(mind.handle(Arrived(RequestId("r0"), 1_000, b""), 0.75))
    assert placed.first_left_s == pytest.approx(placed.budget.ttft_s - 0.75)


def test_a_resent_history_is_placed_on_its_holder_and_earns_no_time() -> None:
    mind, keys = dispatcher(workers=2), chain("a", 100)
    (first,) = dispatched(offer(mind, request(0), tokens=6_400, keys=keys))
    mind.handle(report(first.worker, finished=((RequestId("r0"), 5),)), 1.0)
    (second,) = dispatched(offer(mind, request(1, arrived=2.0), tokens=6_500, keys=keys))
    assert second.worker == first.worker
    assert second.predicted_hit_tokens == 6_400
    assert second.budget.ttft_s < 1.1 < first.budget.ttft_s


def test_what_waits_goes_when_a_worker_has_room_again() -> None:
    mind = dispatcher(workers=1)
    saturate(mind)
    assert dispatched(offer(mind, request(arrived=0.1))) == []
    assert mind.state(RequestId("r0")) is State.HELD
    (placed,) = dispatched(mind.handle(report(load=FREE), 0.3))
    assert placed.first_left_s == pytest.approx(placed.budget.ttft_s - 0.2)


def test_the_late_are_served_not_refused() -> None:
    mind = dispatcher(workers=1)
    saturate(mind)
    offer(mind, request(arrived=0.0))
    (placed,) = dispatched(mind.handle(report(load=FREE), 20.0))
    assert placed.first_left_s < 0.0


def test_a_person_goes_before_batch_work_that_came_earlier() -> None:
    mind = dispatcher(workers=1)
    saturate(mind)
    offer(mind, request(0, declared_class=BATCH))
    offer(mind, request(1, arrived=0.1))
    placed = dispatched(mind.handle(report(load=FREE), 0.5))
    assert [str(action.request_id) for action in placed] == ["r1", "r0"]


def test_patience_ends_in_a_refusal_at_its_time() -> None:
    mind = dispatcher(workers=1)
    saturate(mind)
    actions = mind.handle(Offered(request()), 0.0)
    mind.handle(Arrived(RequestId("r0"), 1_000, b""), 0.0)
    (wake,) = [action for action in actions if isinstance(action, WakeAt)]
    assert wake.at == 30.0
    (refusal,) = rejected(mind.handle(Tick(), 30.0))
    assert (refusal.status, refusal.reason) == (503, "patience")
    assert mind.live_count == 0


def test_a_tokeniser_that_never_answers_costs_its_client_its_patience_and_no_more() -> None:
    mind = dispatcher(workers=1)
    mind.handle(Offered(request(declared_timeout_s=10.0)), 0.0)
    (refusal,) = rejected(mind.handle(Tick(), 9.5))
    assert refusal.reason == "patience"
    assert mind.handle(Arrived(RequestId("r0"), 10, b""), 9.6) == []


def test_a_request_that_cannot_start_in_time_is_refused_at_once_with_an_honest_return() -> None:
    """Told to come back when the queue will be drained: then the same request is admitted."""
    mind = dispatcher(workers=1, limits=replace(LIMITS, room_s=(1e6, 1e6, 1e6)))
    mind.handle(report(load=load(running=4, waiting=8, waiting_uncached_tokens=400_000, blocks_free=40_000)), 0.0)
    (refusal,) = rejected(offer(mind, request(declared_timeout_s=12.0)))
    assert refusal.reason == "patience"
    assert refusal.retry_after_s is not None
    drained_s = 400_000 * STEP_MODEL.row_s  # 20 s of prefill
    assert drained_s - LIMITS.stage_s <= refusal.retry_after_s <= 1.2 * drained_s + 1
    mind.handle(report(load=load(running=4, blocks_free=40_000)), refusal.retry_after_s)
    assert dispatched(offer(mind, request(1, arrived=refusal.retry_after_s, declared_timeout_s=12.0)))


def test_refusals_of_one_burst_do_not_return_as_one() -> None:
    mind = dispatcher(workers=1)
    mind.handle(report(load=load(running=4, waiting=8, waiting_uncached_tokens=700_000)), 0.0)
    refusals = [rejected(offer(mind, request(number, declared_timeout_s=12.0)))[0] for number in range(20)]
    assert len({refusal.retry_after_s for refusal in refusals}) > 3


def test_a_full_waiting_room_refuses_before_tokenising_and_new_sessions_first() -> None:
    mind = dispatcher(workers=1, limits=replace(LIMITS, room_s=(1.0, 1.0, 1.0)))
    known = request(0, session="a")
    offer(mind, known)
    mind.handle(report(finished=((known.id, 5),)), 0.5)
    saturate(mind, 1.0)
    offer(mind, request(1, arrived=1.0, session="a", max_output=1), tokens=16_000)  # 0.97 GPU-seconds
    (refusal,) = mind.handle(Offered(request(2, arrived=1.1)), 1.1)
    assert isinstance(refusal, Reject)
    assert refusal.reason == "waiting-room-full"
    assert isinstance(mind.handle(Offered(request(3, arrived=1.1, session="a")), 1.1)[0], Tokenise)


def test_flex_without_room_is_429() -> None:
    mind = dispatcher(workers=1, limits=replace(LIMITS, room_s=(0.0, 0.0, 0.0), requests_max=0))
    (refusal,) = rejected(mind.handle(Offered(request(service_tier="flex")), 0.0))
    assert (refusal.status, refusal.request_class) == (429, BATCH)


def test_too_many_requests_are_refused_with_their_class() -> None:
    mind = dispatcher(workers=1, limits=replace(LIMITS, requests_max=2))
    refusals = [rejected(mind.handle(Offered(request(number)), 0.0)) for number in range(3)]
    assert refusals[:2] == [[], []]
    assert (refusals[2][0].reason, refusals[2][0].request_class) == ("too-many-requests", CHATBOT)


def test_a_full_tokenise_queue_is_the_tenants_own_limit() -> None:
    mind = dispatcher(workers=1, limits=replace(LIMITS, tokenising_per_tenant=1, tokenise_queue_max=1))
    said = [mind.handle(Offered(request(number)), 0.0) for number in range(3)]
    (refusal,) = rejected(said[2])
    assert (refusal.status, refusal.reason) == (429, "tokenise-queue-full")
    freed = mind.handle(Gone(RequestId("r0")), 0.1)
    assert [action.request_id for action in freed if isinstance(action, Tokenise)] == ["r1"]


def test_a_prompt_beyond_every_context_is_refused_for_ever() -> None:
    (refusal,) = rejected(offer(dispatcher(workers=1), request(), tokens=200_000))
    assert (refusal.status, refusal.reason, refusal.retry_after_s) == (400, "context-length", None)
    assert "maximum context length is 131072 tokens" in refusal.message
    assert "resulted in 200000 tokens" in refusal.message


def test_an_outage_longer_than_a_clients_patience_is_told_at_once() -> None:
    mind = dispatcher(workers=1)
    mind.handle(WorkerLost(WorkerId(0), "killed"), 10.0)

    early = mind.handle(Offered(request(1, arrived=20.0)), 20.0)
    late = mind.handle(Offered(request(2, arrived=45.0)), 45.0)
    patient = mind.handle(Offered(request(3, arrived=45.0, service_tier="batch")), 45.0)

    assert rejected(early) == rejected(patient) == []
    (refusal,) = rejected(late)
    assert (refusal.status, refusal.reason) == (503, "no-worker")
    assert refusal.retry_after_s is not None
    assert refusal.retry_after_s >= 1.0


def test_a_client_that_leaves_has_its_attempt_cancelled() -> None:
    mind = dispatcher(workers=1)
    offer(mind, request())
    (cancel,) = [action for action in mind.handle(Gone(RequestId("r0")), 0.1) if isinstance(action, Cancel)]
    assert cancel.worker == 0
    assert mind.handle(Gone(RequestId("r0")), 0.2) == []
    assert streams(mind) == 0


def test_an_answer_that_ends_at_a_stop_string_counts_as_one_that_ended_by_itself() -> None:
    def seen(end: Event) -> tuple[list[Action], float, bool]:
        mind = dispatcher(workers=1)
        session = replace(request(), session="s")
        offer(mind, session)
        mind.handle(report(first_tokens=((session.id, 0),)), 0.1)
        return mind.handle(end, 1.0), streams(mind), mind._sessions.is_continuing(session, 1.0)

    assert seen(Stopped(RequestId("r0"), 7)) == ([], 0, True)
    assert seen(report(finished=((RequestId("r0"), 7),))) == ([], 0, True)


def test_a_failed_attempt_goes_elsewhere_with_what_is_left_of_its_budget() -> None:
    mind = dispatcher(workers=2)
    (first,) = dispatched(offer(mind, request()))
    mind.handle(WorkerLost(first.worker, "killed"), 0.5)
    (second,) = dispatched(mind.handle(Failed(RequestId("r0"), first.worker, "worker lost"), 0.5))
    assert second.worker != first.worker
    assert second.first_left_s == pytest.approx(first.first_left_s - 0.5)


def test_news_of_an_earlier_attempt_is_ignored() -> None:
    mind = dispatcher(workers=2)
    (first,) = dispatched(offer(mind, request()))
    (second,) = dispatched(mind.handle(Failed(first.request_id, first.worker, "refused"), 0.1))
    assert mind.handle(Failed(first.request_id, first.worker, "refused"), 0.2) == []
    assert mind.fleet.ledger(second.worker).streams == [1, 0, 0]


def test_a_stream_cut_after_its_patience_still_waits_for_another_worker() -> None:
    """Patience is for the first token; who has been reading for a minute has not left."""
    mind = dispatcher(workers=1)
    (placed,) = dispatched(offer(mind, request()))
    mind.handle(report(first_tokens=((placed.request_id, 0),)), 0.5)
    mind.handle(WorkerLost(placed.worker, "killed"), 60.0)
    assert rejected(mind.handle(Failed(placed.request_id, placed.worker, "worker lost"), 60.0)) == []
    assert rejected(mind.handle(Tick(), 89.0)) == []
    assert rejected(mind.handle(Tick(), 90.0))


def test_without_any_worker_left_it_waits_for_one_to_come_back() -> None:
    mind = dispatcher(workers=1)
    (first,) = dispatched(offer(mind, request()))
    mind.handle(WorkerLost(first.worker, "killed"), 0.5)
    assert dispatched(mind.handle(Failed(RequestId("r0"), first.worker, "worker lost"), 0.5)) == []
    (second,) = dispatched(mind.handle(up(0), 3.0))
    assert second.worker == 0


def test_attempts_are_bounded() -> None:
    mind = dispatcher(workers=3)
    (placed,) = dispatched(offer(mind, request()))
    for _ in range(LIMITS.attempts_max - 1):
        (placed,) = dispatched(mind.handle(Failed(placed.request_id, placed.worker, "refused"), 0.1))
    (refusal,) = rejected(mind.handle(Failed(placed.request_id, placed.worker, "refused"), 0.1))
    assert refusal.reason == "attempts"
    assert "failed on 3 workers" in refusal.message


def test_retries_of_a_failing_fleet_are_a_tenth_of_its_requests() -> None:
    mind = dispatcher(workers=2, limits=replace(LIMITS, retry_burst=1))
    attempts = 0
    for number in range(100):
        placed = dispatched(offer(mind, request(number)))
        while placed:
            attempts += 1
            placed = dispatched(mind.handle(Failed(placed[0].request_id, placed[0].worker, "refused"), 0.0))
    assert 100 <= attempts <= 112


def test_batch_work_waits_in_the_router_not_on_the_worker() -> None:
    mind = dispatcher(workers=1)
    placed = [offer(mind, request(number, declared_class=BATCH)) for number in range(20)]
    assert sum(bool(dispatched(actions)) for actions in placed) == LIMITS.staged_batch_max
    started = tuple((RequestId(f"r{number}"), 0) for number in range(4))
    mind.handle(report(load=load(running=4), first_tokens=started), 1.0)
    assert mind.waiting_count == 20 - 2 * LIMITS.staged_batch_max


def test_background_agents_get_their_reserve_while_people_queue() -> None:
    """No starvation by class: a twentieth of the GPU-seconds, however many people wait."""
    mind = dispatcher(workers=1, limits=ONE_AT_A_TIME, promises=PATIENT)
    saturate(mind)
    for number in range(300):
        offer(mind, request(number, declared_class=BACKGROUND if number % 2 else CHATBOT), tokens=4_000)
    served: list[RequestClass] = []
    for step in range(1, 121):
        placed = dispatched(mind.handle(report(load=FREE), step * 0.05))
        mind.handle(report(load=FULL, finished=tuple((action.request_id, 9) for action in placed)), step * 0.05 + 0.01)
        served += [action.request_class for action in placed]
    assert len(served) >= 100
    assert 0.03 < served.count(BACKGROUND) / len(served) < 0.08


def test_one_tenants_flood_does_not_delay_another() -> None:
    mind = dispatcher(workers=1, limits=ONE_AT_A_TIME, promises=PATIENT)
    saturate(mind)
    for number in range(200):
        offer(mind, request(number, tenant=Tenant(id="flood")), tokens=4_000)
    offer(mind, request(999, arrived=0.2, tenant=Tenant(id="guest")), tokens=4_000)
    order: list[str] = []
    for step in range(1, 20):
        placed = dispatched(mind.handle(report(load=FREE), 0.2 + step * 0.05))
        mind.handle(report(load=FULL, finished=tuple((action.request_id, 9) for action in placed)), 0.21 + step * 0.05)
        order += [str(action.request_id) for action in placed]
    assert order.index("r999") <= 4


SOME = load(running=4, blocks_free=60)  # KV for 3,840 tokens


def test_a_short_prompt_goes_before_a_long_one_that_fits_nowhere_yet() -> None:
    mind = dispatcher(workers=1)
    mind.handle(report(load=SOME), 0.0)
    assert dispatched(offer(mind, request(0), tokens=20_000)) == []
    (placed,) = dispatched(offer(mind, request(1, arrived=0.1)))
    assert (str(placed.request_id), placed.reason) == ("r1", "within budget")
    (placed,) = dispatched(mind.handle(report(load=FREE), 0.5))
    assert str(placed.request_id) == "r0"


def test_nobody_is_passed_who_has_waited_for_half_its_patience() -> None:
    mind = dispatcher(workers=1)
    mind.handle(report(load=SOME), 0.0)
    offer(mind, request(0), tokens=20_000)
    mind.handle(report(load=SOME), 15.0)
    assert dispatched(offer(mind, request(1, arrived=15.0))) == []


def test_no_class_passes_a_more_urgent_one() -> None:
    mind = dispatcher(workers=1)
    mind.handle(report(load=SOME), 0.0)
    offer(mind, request(0), tokens=20_000)
    assert dispatched(offer(mind, request(1, arrived=0.1, declared_class=BACKGROUND))) == []


def test_a_tenant_that_had_its_share_passes_only_to_a_worker_that_would_run_dry() -> None:
    mind = dispatcher(workers=1)
    for number in range(3):  # a GPU-second
        offer(mind, request(number, tenant=Tenant(id="flood")), tokens=8_000)
        mind.handle(report(load=FREE, finished=((RequestId(f"r{number}"), 9),)), 0.0)
    occupied = load(running=4, blocks_free=200, waiting_uncached_tokens=6_000)  # of others: 0.3 s
    mind.handle(report(load=occupied), 0.1)
    offer(mind, request(8, arrived=0.1, tenant=Tenant(id="guest")), tokens=20_000)
    assert dispatched(offer(mind, request(9, arrived=0.2, tenant=Tenant(id="flood")))) == []
    assert dispatched(offer(mind, request(10, arrived=0.2, tenant=Tenant(id="other"))))
    mind.handle(report(load=SOME), 0.3)
    assert dispatched(offer(mind, request(11, arrived=0.3, tenant=Tenant(id="flood"))))


def test_who_waits_behind_a_head_that_stays_is_asked_too_but_not_all_and_not_each_time() -> None:
    mind = dispatcher(workers=1)
    saturate(mind)
    offer(mind, request(0), tokens=20_000)
    for number in range(1, 9):
        offer(mind, request(number, arrived=1.0), tokens=200)
    first = dispatched(mind.handle(report(load=SOME), 1.1))
    assert len(first) == LIMITS.pass_max
    assert dispatched(mind.handle(report(load=SOME), 1.1 + LIMITS.pass_every_s / 2)) == []
    assert dispatched(mind.handle(report(load=SOME), 1.1 + LIMITS.pass_every_s))
    assert mind.state(RequestId("r0")) is State.HELD


def test_heads_are_not_asked_more_often_than_the_bound() -> None:
    mind = dispatcher(workers=1)
    saturate(mind, 0.0)
    offer(mind, request(arrived=0.01))
    mind.handle(report(load=FULL), 0.1)
    early = mind.handle(report(load=FREE), 0.1 + LIMITS.reexamine_s / 2)
    assert dispatched(early) == []
    (wake,) = [action for action in early if isinstance(action, WakeAt)]
    assert wake.at == pytest.approx(0.1 + LIMITS.reexamine_s)
    assert dispatched(mind.handle(Tick(), wake.at))


def test_one_event_places_no_more_than_its_bound_and_goes_on_by_itself() -> None:
    mind = dispatcher(workers=1)
    saturate(mind)
    for number in range(10):
        offer(mind, request(number, arrived=0.1), tokens=100)
    first = mind.handle(report(load=FREE), 0.2)
    assert len(dispatched(first)) == LIMITS.pump_max
    (wake,) = [action for action in first if isinstance(action, WakeAt)]
    assert len(dispatched(mind.handle(Tick(), wake.at))) == LIMITS.pump_max


def test_a_faulty_stage_is_replaced_for_a_while() -> None:
    mind = Dispatcher(replace(BUILTINS["headway"]({}), place=lambda *_: ()), LIMITS, np.random.default_rng(0))
    mind.handle(up(), 0.0)
    assert dispatched(offer(mind, request(0))) == []
    mind.handle(PolicyFault("place", "took 7 ms"), 0.1)
    assert dispatched(offer(mind, request(1, arrived=0.2)))
    assert dispatched(offer(mind, request(2, arrived=60.0))) == []


def test_a_stage_that_fails_three_times_is_replaced_for_good() -> None:
    mind = Dispatcher(replace(BUILTINS["headway"]({}), place=lambda *_: ()), LIMITS, np.random.default_rng(0))
    mind.handle(up(), 0.0)
    for number in range(2):
        mind.handle(PolicyFault("place", "raised"), 100.0 * number)
        assert dispatched(offer(mind, request(number, arrived=100.0 * number + 50.0))) == []
    mind.handle(PolicyFault("place", "raised"), 200.0)
    assert dispatched(offer(mind, request(2, arrived=9_000.0)))


def test_three_faults_far_apart_are_a_busy_machine_and_no_bad_policy() -> None:
    mind = Dispatcher(replace(BUILTINS["headway"]({}), place=lambda *_: ()), LIMITS, np.random.default_rng(0))
    mind.handle(up(), 0.0)
    for number in range(4):
        mind.handle(PolicyFault("place", "took 7 ms"), FAULTS_WITHIN_S * number)
    assert dispatched(offer(mind, request(0, arrived=FAULTS_WITHIN_S * 3 + 60.0))) == []


def test_news_of_strangers_and_starts_are_no_trouble() -> None:
    mind = dispatcher(workers=1)
    assert mind.handle(Started("digest", "0.1.0", 7, "{}"), 0.0) == []
    assert mind.handle(report(9), 0.0) == []
    assert mind.handle(Failed(RequestId("who"), WorkerId(0), "x"), 0.0) == []
    assert mind.handle(report(first_tokens=((RequestId("who"), 0),), finished=((RequestId("who"), 1),)), 0.0) == []


def conversation(policy: str) -> list[tuple[Event, float, list[Action]]]:
    """A busy minute under `policy`: 400 requests of 20 sessions on 3 workers, one of which dies."""
    rng = np.random.default_rng(11)
    mind = Dispatcher(BUILTINS[policy]({}), LIMITS, np.random.default_rng(3))
    said: list[tuple[Event, float, list[Action]]] = []

    def say(event: Event, now: float) -> list[Action]:
        said.append((event, now, mind.handle(event, now)))
        return said[-1][2]

    for worker in range(3):
        say(up(worker), 0.0)
    running: list[Dispatch] = []
    for number in range(400):
        now, blocks = number * 0.15, int(rng.integers(1, 300))
        asked = request(number, arrived=now, session=f"s{rng.integers(20)}", stream=bool(rng.integers(2)), tool_count=1)
        say(Offered(asked), now)
        running += dispatched(say(Arrived(asked.id, blocks * BLOCK + 5, chain(asked.session, blocks)), now))
        if number == 200:
            say(WorkerLost(WorkerId(1), "killed"), now)
            for lost in [action for action in running if action.worker == 1]:
                running += dispatched(say(Failed(lost.request_id, lost.worker, "worker lost"), now))
            running = [action for action in running if action.worker != 1]
        for _ in range(min(2, len(running))):
            done = running.pop(int(rng.integers(len(running))))
            ended = ((done.request_id, int(rng.integers(1, 400))),)
            frame = WorkerReport(done.worker, load(running=len(running) // 3), ((done.request_id, 0),), ended)
            running += dispatched(say(frame, now + 0.05))
    return said


@pytest.mark.parametrize("policy", list(BUILTINS))
def test_a_recording_replays_byte_for_byte(policy: str) -> None:
    recording = conversation(policy)
    again = Dispatcher(BUILTINS[policy]({}), LIMITS, np.random.default_rng(3))
    assert sum(len(dispatched(actions)) for _, _, actions in recording) >= 390
    assert [repr(again.handle(event, now)) for event, now, _ in recording] == [repr(acts) for _, _, acts in recording]


def test_round_robin_takes_turns_and_least_loaded_takes_the_emptiest() -> None:
    turns = Dispatcher(BUILTINS["round_robin"]({}), LIMITS, np.random.default_rng(0))
    emptiest = Dispatcher(BUILTINS["least_loaded"]({}), LIMITS, np.random.default_rng(0))
    for mind in (turns, emptiest):
        for worker in range(3):
            mind.handle(up(worker), 0.0)
        mind.handle(report(0, load=load(running=2)), 0.0)
    assert [int(dispatched(offer(turns, request(number)))[0].worker) for number in range(4)] == [0, 1, 2, 0]
    assert [int(dispatched(offer(emptiest, request(number)))[0].worker) for number in range(4)] == [1, 2, 1, 2]


def test_defaults_are_generous_enough_for_an_ordinary_burst() -> None:
    """64 requests at once of one tenant on two idle workers: all tokenised, all placed or waiting, none refused."""
    mind = dispatcher(workers=2, limits=Limits())
    offered = [mind.handle(Offered(request(number)), 0.0) for number in range(64)]
    waiting = [RequestId(f"r{number}") for number in range(64)]
    assert not any(rejected(actions) for actions in offered)
    ready = [a.request_id for actions in offered for a in actions if isinstance(a, Tokenise)]
    while ready:
        actions = mind.handle(Arrived(ready.pop(0), 1_000, b""), 0.01)
        assert not rejected(actions)
        ready += [action.request_id for action in actions if isinstance(action, Tokenise)]
    assert {mind.state(request_id) for request_id in waiting} <= {State.PLACED, State.HELD}
