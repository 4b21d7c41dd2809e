"""Targets come from class and new tokens, and from what the server says it promises."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping

import msgspec
import pytest

from loadgen.targets import PUBLISHED, Served, Target, ask, new_tokens, parse_budgets, target_of, to_plain
from loadgen.traces import Slo
from tests.loadgen.fixture import BUDGETS, TWENTY
from tests.loadgen.server import Asked, scripted

CHAT, AGENT, JOB = TWENTY[0], TWENTY[12], TWENTY[16]


def test_chat_is_promised_a_first_token_by_new_tokens_and_a_pace() -> None:
    target = target_of(CHAT, BUDGETS)
    assert target.ttft_s == pytest.approx(1.1)
    assert (target.tpot_s, target.deadline_s) == (0.04, math.inf)


def test_a_pace_may_grow_with_the_prompt() -> None:
    line = msgspec.structs.replace(BUDGETS["chatbot+"], tpot_s_per_prompt_token=1e-5)
    target = target_of(CHAT, {**BUDGETS, "chatbot+": line})
    assert target.tpot_s == pytest.approx(0.04 + 1e-5 * CHAT.input_tokens)


def test_agents_and_jobs_are_promised_their_end() -> None:
    assert target_of(AGENT, BUDGETS).deadline_s == pytest.approx(17.0)
    assert target_of(AGENT, BUDGETS).ttft_s == math.inf
    assert target_of(JOB, BUDGETS) == Target(deadline_s=900.0)


def test_what_a_server_happened_to_hit_never_moves_a_target() -> None:
    missed = msgspec.structs.replace(CHAT, cached_tokens=0)
    assert target_of(missed, BUDGETS) == target_of(CHAT, BUDGETS)


def test_a_prompt_that_an_ideal_cache_holds_still_computes_one_token() -> None:
    assert new_tokens(msgspec.structs.replace(CHAT, ideal_cached=500)) == 1


def test_a_rows_own_target_comes_first_and_the_tighter_end_holds() -> None:
    own = msgspec.structs.replace(CHAT, slo=Slo(ttft_ms=250, e2e_s=9.0, deadline_s=4.0))
    assert target_of(own, BUDGETS) == Target(ttft_s=0.25, tpot_s=0.04, deadline_s=4.0)


def test_budgets_are_read_back_as_they_are_told() -> None:
    assert parse_budgets(to_plain(BUDGETS)) == BUDGETS


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"chatbot+": {}}, "no budget for background-agent"),
        ({"vip": {}}, "vip"),
        ({"chatbot+": {"ttft_s": "fast"}}, "ttft_s"),
        ([], "object"),
    ],
)
def test_budgets_of_another_shape_are_refused_by_name(data: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_budgets(data)


def asked_of(answers: Mapping[str, tuple[int, object]]) -> Served:
    async def script(asked: Asked) -> None:
        status, body = answers.get(asked.path, (404, {}))
        asked.json(status, body, connection="close")
        asked.transport.close()

    async def scene() -> Served:
        async with scripted(script) as server:
            return await asyncio.to_thread(ask, server.url)

    return asyncio.run(scene())


MODELS = (200, {"data": [{"id": "some-model"}]})


def test_a_server_says_what_it_serves_and_promises() -> None:
    state = {
        "ready": True,
        "model": "m",
        "budgets": {
            **to_plain(BUDGETS),
        },
    }
    assert asked_of({"/readyz": (200, state)}) == Served("m", BUDGETS)


def test_a_server_with_more_to_say_than_we_read_is_understood() -> None:
    budgets = {name: {**line, "patience_s": 30.0} for name, line in to_plain(BUDGETS).items()}
    assert asked_of({"/readyz": (200, {"model": "m", "budgets": budgets})}) == Served("m", BUDGETS)


@pytest.mark.parametrize("ready", [(404, {}), (200, {}), (200, [1]), (200, {"model": "m", "budgets": {}})])
def test_a_server_that_promises_nothing_is_judged_by_the_published_budgets(ready: tuple[int, object]) -> None:
    assert asked_of({"/readyz": ready, "/v1/models": MODELS}).budgets is None
    assert set(PUBLISHED) == set(BUDGETS)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({"/readyz": (503, {})}, "not ready"),
        ({"/readyz": (404, {}), "/v1/models": (200, {"data": []})}, "names no model"),
        ({"/readyz": (404, {})}, "names no model"),
    ],
)
def test_a_server_that_cannot_be_judged_is_said_so(answers: Mapping[str, tuple[int, object]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        asked_of(answers)


def test_an_address_where_nobody_answers_is_an_error_and_not_a_trace() -> None:
    with pytest.raises(ValueError, match="does not answer"):
        ask("http://127.0.0.1:9")
