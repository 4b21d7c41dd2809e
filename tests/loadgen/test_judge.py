"""The verdict equals what twenty requests give by hand, and forgives nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.judge import Quantiles, judge, quantiles
from loadgen.judged import judge_one
from loadgen.records import Outcome, Record, Run
from loadgen.report import honesty
from loadgen.targets import Target, target_of
from tests.loadgen.fixture import BUDGETS, RUN, TWENTY, chat, even

TARGET = Target(ttft_s=1.1, tpot_s=0.04)


def with_run(**changes: object) -> Run:
    return msgspec.structs.replace(RUN, **changes)


def test_attainment_is_what_was_worked_out_by_hand() -> None:
    verdict = judge(RUN, TWENTY, BUDGETS)
    assert (verdict.offered, verdict.met) == (20, 10)
    assert {name: (found.cell.met, found.cell.offered) for name, found in verdict.classes.items()} == {
        "chatbot+": (5, 12),
        "background-agent": (2, 4),
        "data-processor": (3, 4),
    }
    assert [one.row for one in TWENTY if judge_one(one, target_of(one, BUDGETS)).is_met] == [
        *(1, 2, 5, 6, 9),
        *(13, 15),
        *(17, 19, 20),
    ]


def test_goodput_counts_met_requests_and_their_tokens_and_wasted_tokens_are_the_rest() -> None:
    verdict = judge(RUN, TWENTY, BUDGETS)
    assert verdict.goodput_per_s == pytest.approx(10 / 100)
    # Met: four chats of 11 tokens and one of 5, two agents and three jobs of 10. Missed: 11 + 11 + 3 + 1 + 2*10 + 10.
    assert verdict.good_tokens_per_s == pytest.approx((49 + 20 + 30) / 100)
    assert verdict.wasted_tokens == 56


def test_waiting_is_the_most_at_one_moment_of_each_second() -> None:
    """Three come in second 0: one is answered within it, two wait on, the last of them until second 2."""
    times = [(0.1, 0.2), (0.3, 1.5), (0.4, 2.2), (1.8, 1.9)]
    asked = [
        msgspec.structs.replace(TWENTY[0], row=n, intended_s=begin, sent_s=begin, token_s=[first], end_s=first)
        for n, (begin, first) in enumerate(times)
    ]
    run = with_run(duration_s=4.0)
    assert [second.waiting_max for second in judge(run, asked, BUDGETS).seconds] == [2, 2, 1, 0]
    silent = msgspec.structs.replace(asked[3], token_s=[], end_s=None, outcome="unfinished")
    assert [second.waiting_max for second in judge(run, [silent], BUDGETS).seconds] == [0, 1, 1, 1]


def test_the_worst_user_is_one_of_fifty_requests_where_somebody_has_so_many() -> None:
    good, bad = TWENTY[0], TWENTY[2]
    few = [msgspec.structs.replace(bad, user="few")] * 10
    many = [msgspec.structs.replace(good, user="many")] * 49 + [msgspec.structs.replace(bad, user="many")]
    alone, both = judge(RUN, few, BUDGETS), judge(RUN, few + many, BUDGETS)
    assert alone.worst_user is not None
    assert both.worst_user is not None
    assert (alone.worst_user.name, alone.fair_offered_min) == ("few", 5)
    assert (both.worst_user.name, both.fair_offered_min, both.users_p5) == ("many", 50, 0.98)
    assert both.users[0].name == "few"  # shown all the same


def test_line_mean_and_largest_gap_are_three_questions() -> None:
    cell = judge(RUN, TWENTY, BUDGETS).classes["chatbot+"].cell
    assert (cell.met, cell.on_line, cell.smooth) == (5, 5, 6)
    on_line = {one.row for one in TWENTY[:12] if judge_one(one, target_of(one, BUDGETS)).is_on_line}
    smooth = {one.row for one in TWENTY[:12] if judge_one(one, target_of(one, BUDGETS)).is_smooth}
    assert on_line == {1, 2, 4, 5, 6}
    assert smooth == {1, 2, 3, 4, 6, 9}


def test_percentiles_are_measured_values_by_nearest_rank() -> None:
    cell = judge(RUN, TWENTY, BUDGETS).classes["chatbot+"].cell
    assert cell.ttft_s == Quantiles(0.6, 1.2, 1.2)  # of 0.4 0.5 0.5 0.5 0.6 1.0 1.05 1.1 1.2
    assert quantiles(float(value) for value in range(1, 101)) == Quantiles(50.0, 90.0, 99.0)
    assert quantiles([None]) == Quantiles()


def test_each_outcome_is_counted_as_what_it_is() -> None:
    outcomes = judge(RUN, TWENTY, BUDGETS).classes["chatbot+"].cell.outcomes
    assert outcomes == {"done": 7, "refused": 1, "failed": 1, "left": 1, "abandoned": 1, "unfinished": 1}


def test_a_refused_request_counts_as_met_only_by_its_obedient_return() -> None:
    assert judge(RUN, TWENTY, BUDGETS).classes["chatbot+"].retried_met == 1


def test_a_class_is_broken_down_by_the_worker_that_answered() -> None:
    workers = judge(RUN, TWENTY, BUDGETS).workers["chatbot+"]
    assert {name: (cell.met, cell.offered) for name, cell in workers.items()} == {
        "w0": (4, 5),
        "w1": (1, 5),
        "none": (0, 2),
    }


def test_workers_add_up_to_their_class_and_a_server_that_names_none_has_none() -> None:
    verdict = judge(RUN, TWENTY, BUDGETS)
    for name, found in verdict.classes.items():
        assert sum(cell.offered for cell in verdict.workers[name].values()) == found.cell.offered
    silent = judge(RUN, [msgspec.structs.replace(record, worker="") for record in TWENTY], BUDGETS)
    assert set(map(len, silent.workers.values())) == {0}


def test_a_miss_that_may_be_chance_is_unsure_and_one_that_cannot_is_not() -> None:
    late = TWENTY[2]
    good = [msgspec.structs.replace(TWENTY[0], row=n, session=f"s{n}") for n in range(100, 124)]
    few = judge(RUN, [*good, late], BUDGETS).classes["chatbot+"]
    assert (few.is_pass, few.attainment_high, few.is_unsure(0.99)) == (False, 1.0, True)
    assert judge(RUN, good, BUDGETS).classes["chatbot+"].is_unsure(0.99) is False
    assert judge(RUN, [late] * 3, BUDGETS).classes["chatbot+"].is_unsure(0.99) is False


def test_ideal_and_realised_hits_stand_side_by_side() -> None:
    cell = judge(RUN, TWENTY, BUDGETS).classes["chatbot+"].cell
    assert (cell.input_tokens, cell.cached_ideal, cell.cached_real) == (3500, 2800, 4 * 384)


def test_the_worst_user_is_named_from_those_with_enough_requests() -> None:
    verdict = judge(RUN, TWENTY, BUDGETS)
    assert [(user.name, user.met, user.offered) for user in verdict.users] == [
        ("u3", 0, 2),
        ("u2", 2, 5),
        ("u1", 3, 5),
    ]
    assert verdict.worst_user is not None
    assert (verdict.worst_user.name, verdict.users_p5) == ("u2", 0.4)
    assert verdict.jain == pytest.approx(1.0 / 1.04)


def test_the_classifiers_table_counts_what_was_asked_and_says_where_it_does_not_know() -> None:
    verdict = judge(RUN, TWENTY, BUDGETS)
    assert verdict.confusion["chatbot+"] == {"chatbot+": 8, "unknown": 2, "background-agent": 1}
    assert verdict.confusion["data-processor"] == {"data-processor": 4}


def test_no_run_counts_with_over_one_percent_of_chat_refused() -> None:
    verdict = judge(RUN, TWENTY, BUDGETS)
    assert verdict.invalid == ["1 of 12 chatbot+ requests were refused; over 1 % no run counts"]
    assert not verdict.is_pass


def test_a_client_that_lags_has_measured_itself() -> None:
    answer = chat(1, "u", "A", "w0", even(0.5, 0.02))
    in_time, late = (msgspec.structs.replace(answer, sent_s=sent_s) for sent_s in (0.054, 0.056))
    assert judge(RUN, [in_time], BUDGETS).invalid == []  # the bound is 5 % of 1.1 s
    (reason,) = judge(RUN, [late], BUDGETS).invalid
    assert "the client lagged: p99 56.0 ms" in reason


def test_an_interrupted_run_is_invalid_and_still_judged() -> None:
    verdict = judge(with_run(is_interrupted=True), TWENTY[:1], BUDGETS)
    assert (verdict.invalid, verdict.met) == (["the run was interrupted"], 1)


def test_a_run_passes_when_every_class_offered_has_its_share() -> None:
    assert judge(RUN, TWENTY[:2], BUDGETS).is_pass
    assert not judge(RUN, [*TWENTY[:2], TWENTY[17]], BUDGETS).is_pass


def test_a_run_without_a_request_is_judged_without_a_number() -> None:
    verdict = judge(RUN, [], BUDGETS)
    assert (verdict.offered, verdict.classes, verdict.users_p5, verdict.worst_user) == (0, {}, None, None)


def test_seconds_hold_every_request_that_had_a_time() -> None:
    verdict = judge(RUN, TWENTY, BUDGETS)
    assert len(verdict.seconds) == 100
    first = verdict.seconds[0]
    assert (first.offered, first.met, first.refused, first.lost) == (19, 10, 1, 3)
    assert first.ttft_max_s == 1.2


def test_a_warm_up_is_offered_but_not_judged() -> None:
    """Its misses do not count, nor does its time; an abandoned turn has no time of its own and is never forgiven."""
    warm, late = TWENTY[2], TWENTY[7]
    met = msgspec.structs.replace(TWENTY[0], intended_s=20.0, sent_s=20.0, token_s=even(20.5, 0.02), end_s=20.7)
    verdict = judge(with_run(warmup_s=20.0), [warm, met, late], BUDGETS)
    assert (verdict.offered, verdict.met, verdict.warmup_requests) == (2, 1, 1)
    assert verdict.goodput_per_s == 1 / 80
    assert [second.at_s for second in verdict.seconds] == list(range(20, 100))
    assert "(the first 20 s, 1 requests, not judged)" in honesty(verdict)
    assert "not judged" not in honesty(judge(RUN, [met], BUDGETS))


def test_the_interval_is_drawn_by_session_and_is_the_same_each_time() -> None:
    once, again = (judge(RUN, TWENTY, BUDGETS).classes["chatbot+"] for _ in range(2))
    assert (once.attainment_low, once.attainment_high) == (again.attainment_low, again.attainment_high)
    assert once.attainment_low < 5 / 12 < once.attainment_high
    certain = judge(RUN, TWENTY[:2], BUDGETS).classes["chatbot+"]
    assert (certain.attainment_low, certain.attainment_high) == (1.0, 1.0)


def test_the_same_records_give_the_same_verdict() -> None:
    assert msgspec.json.encode(judge(RUN, TWENTY, BUDGETS)) == msgspec.json.encode(judge(RUN, TWENTY, BUDGETS))


@given(outcome=st.sampled_from(get_args(Outcome)), first_s=st.floats(0, 0.5))
def test_only_a_finished_answer_can_be_met(outcome: Outcome, first_s: float) -> None:
    """However early its tokens came, an answer that did not end well is a miss."""
    record = chat(1, "u", "A", "w0", even(first_s, 0.01), outcome)
    assert judge_one(record, TARGET).is_met == (outcome == "done")


@given(
    first_s=st.floats(0, 3),
    gaps=st.lists(st.floats(0, 0.3), min_size=1, max_size=40),
    ttft_s=st.floats(0.1, 2),
    tpot_s=st.floats(0.01, 0.2),
)
def test_an_answer_on_its_line_meets_its_mean_but_for_what_it_was_ahead(
    first_s: float, gaps: list[float], ttft_s: float, tpot_s: float
) -> None:
    """Line and mean differ only by the slack that an early first token earned."""
    stamps = [first_s]
    for gap in gaps:
        stamps.append(stamps[-1] + gap)
    one = judge_one(chat(1, "u", "A", "w0", stamps), Target(ttft_s, tpot_s))
    if one.is_on_line:
        assert stamps[-1] <= ttft_s + len(gaps) * tpot_s + 1e-9
        assert first_s <= ttft_s


def test_a_token_event_that_carries_several_is_spread_over_the_line() -> None:
    """Events of four tokens each: the third event begins with token 9, due at 1.1 + 8 * 0.04 = 1.42 s."""

    def answer(third_s: float) -> Record:
        record = chat(1, "u", "A", "w0", [1.0, 1.2, third_s])
        return msgspec.structs.replace(record, completion_tokens=12)

    assert judge_one(answer(1.41), TARGET).is_on_line
    assert not judge_one(answer(1.43), TARGET).is_on_line


def test_a_whole_answer_shows_its_end_as_its_first_token() -> None:
    record = msgspec.structs.replace(chat(1, "u", "A", "w0", []), end_s=1.05, completion_tokens=11)
    assert judge_one(record, TARGET).is_met
    assert not judge_one(record, replace(TARGET, ttft_s=1.0)).is_met
    assert judge_one(record, Target()).ttft_s is None


def test_no_promise_is_always_kept_by_an_answer_that_ends() -> None:
    assert judge_one(TWENTY[2], Target(math.inf, math.inf, math.inf)).is_met
