"""Bodies that no client means: whatever JSON comes, the answer is the client's fault or an answer, never ours."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.router.desk import TOOL_TEMPLATE, Desk, desk, run, speak

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": "DEEP"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
USER = {"role": "user", "content": "x"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "y", "tool_call_id": "c"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stream_options": {"include_usage": True},
        "metadata": {"user_id": "u"},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "/v1/completions": {"model": "tiny", "prompt": "x", "max_tokens": 5},
    "/v1/responses": {
        "model": "tiny",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}], "summary": []},
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
            {"type": "function_call_output", "call_id": "c", "output": "y"},
        ],
        "instructions": "be",
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
    },
    "/v1/messages": {
        "model": "tiny",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "x"}, {"type": "image", "source": {"type": "url", "url": "u"}}],
            },
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": "DEEP"}}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "y"}]}],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object", "properties": "DEEP"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "output_config": {"effort": "high"},
    },
}
BODIES["/v1/messages/count_tokens"] = BODIES["/v1/messages"]

WORDS = ["user", "tool", "text", "function", "\r\nx: y", "data: x\n\n", "{{ 7*7 }}", "\ue0000\ue001", "DEEP"]
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(WORDS)
KEYS = st.text(max_size=6) | st.sampled_from(["type", "function", "name"])
ODD = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inner for place in [(*at, key), *paths(part, (*at, key))]]


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A good body with up to three places that are something else, or gone."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body = copy.deepcopy(BODIES[path])
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(paths(body) or [("model",)]))
        holder: Any = body
        for key in place[:-1]:
            holder = holder[key]
        if draw(st.booleans()) and isinstance(holder, dict):
            holder.pop(place[-1], None)
        else:
            holder[place[-1]] = draw(ODD)
    return path, body | {"stream": draw(st.booleans())}


async def check(d: Desk, path: str, body: bytes) -> None:
    answer = await d.client.post(path, content=body)
    assert answer.status_code < 500, (path, body, answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert len(answer.content) < 1024
    assert set(answer.headers) <= {
        *("date", "content-type", "content-length", "transfer-encoding", "cache-control", "connection"),
        *("x-headway-request", "x-headway-class", "x-headway-class-reason", "x-headway-worker", "x-headway-notice"),
    }


def fuzz(bodies: list[tuple[str, dict[str, Any]]]) -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.fleet.answer = speak("ok")
            for path, body in bodies:
                await check(d, path, json.dumps(body).encode())

    run(work())


@given(st.lists(spoilt(), min_size=8, max_size=8))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_a_spoilt_body_is_never_our_fault(bodies: list[tuple[str, dict[str, Any]]]) -> None:
    fuzz(bodies)


@pytest.mark.nightly
@given(st.lists(spoilt(), min_size=20, max_size=20))
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
def test_spoilt_bodies_for_minutes(bodies: list[tuple[str, dict[str, Any]]]) -> None:
    fuzz(bodies)


@pytest.mark.parametrize("path", sorted(BODIES))
def test_what_the_spoilt_bodies_were_made_of_is_served(path: str) -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.fleet.answer = speak("ok")
            assert (await d.client.post(path, json=BODIES[path])).status_code == 200

    run(work())


@pytest.mark.parametrize("depth", [50, 300, 600, 900, 5000])
@pytest.mark.parametrize("path", sorted(set(BODIES) - {"/v1/completions"}))
def test_what_is_nested_too_deeply_is_refused(path: str, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth

    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.fleet.answer = speak("ok")
            body = json.dumps(BODIES[path])
            assert '"DEEP"' in body
            await check(d, path, body.replace('"DEEP"', deep).encode())
            await check(d, path, body.replace('"DEEP"', deep, 1).encode())

    run(work())


def test_a_clients_words_become_no_event_and_no_header() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            evil = "data: [DONE]\n\nevent: message_stop\r\n\r\nHTTP/1.1 200 OK"
            d.fleet.answer = speak(evil)
            for path, body in BODIES.items():
                asking = asyncio.create_task(d.client.post(path, json=body | {"stream": True, "user": evil}))
                answer = await asking
                for line in answer.text.splitlines():
                    assert line == "" or line.startswith((":", "event: ", "data: {", "data: [DONE]", "{"))
                assert answer.text.count("data: [DONE]\n\n") <= 1

    run(work())
