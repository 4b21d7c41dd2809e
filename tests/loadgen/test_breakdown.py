"""The second page's tables, by the same twenty hand-worked requests."""

from __future__ import annotations

import msgspec
import pytest

from loadgen.breakdown import MOMENTS_MAX
from loadgen.judge import judge
from loadgen.ranks import Quantiles
from loadgen.report_html import page
from tests.loadgen.fixture import BUDGETS, RUN, TWENTY

FOUND = judge(RUN, TWENTY, BUDGETS)
SECOND = FOUND.breakdown


def test_refusals_are_told_three_ways() -> None:
    chat = SECOND.refusals["chatbot+"]
    assert (chat.offered, chat.refused, chat.came_back) == (12, 1, 1)
    assert chat.met_of_offered == pytest.approx(5 / 12)
    assert chat.met_of_admitted == pytest.approx(5 / 11)
    # 11 of the third, 11 of the fourth, 3 of the tenth, 1 of the eleventh
    assert chat.wasted_tokens == 26
    assert SECOND.refusals["data-processor"].met_of_admitted == pytest.approx(3 / 4)


def test_hits_stand_beside_the_ideal_by_class_and_gap() -> None:
    chat = next(one for one in SECOND.hits if one.request_class == "chatbot+")
    assert (chat.gap, chat.requests, chat.input_tokens, chat.ideal) == ("none", 7, 7 * 500, 7 * 400)
    assert chat.real == 4 * 384  # four of them on w0


def test_own_targets_stand_beside_flat_ones_by_new_tokens() -> None:
    (only,) = SECOND.bins  # each has 100 new tokens
    assert (only.below, only.requests, only.met) == (256, 12, 5)
    assert only.flat == [pytest.approx(share) for share in (3 / 12, 4 / 12, 7 / 12, 7 / 12)]
    assert only.ttft_s == Quantiles(1.0, 1.2, 1.2)


def test_a_session_is_finished_when_every_turn_was_answered() -> None:
    chat = SECOND.sessions["chatbot+"]
    assert (chat.begun, chat.finished, chat.all_met) == (5, 2, 0)
    assert chat.length_s.p50 == pytest.approx(1.0)


def test_the_worst_user_has_a_time_line_by_name() -> None:
    assert FOUND.worst_user is not None
    assert FOUND.worst_user.name == "u2"
    assert [moment.outcome for moment in SECOND.worst_user] == ["done", "refused", "done", "failed"]
    drawn = page(FOUND, TWENTY, BUDGETS)
    assert "u2, request by request" in drawn
    assert "1 never had a first token" in drawn


def test_what_the_server_counted_stands_beside_what_was_meant() -> None:
    more = [msgspec.structs.replace(record, prompt_tokens=record.input_tokens + 50) for record in TWENTY[:2]]
    assert judge(RUN, more, BUDGETS).breakdown.prompt_realised == 1.1
    assert judge(RUN, more, BUDGETS).breakdown.imbalance == 1.0


def test_of_a_user_who_asks_very_often_some_requests_are_shown() -> None:
    often = judge(RUN, [TWENTY[0]] * (2 * MOMENTS_MAX + 1), BUDGETS)
    assert MOMENTS_MAX // 2 < len(often.breakdown.worst_user) <= MOMENTS_MAX
