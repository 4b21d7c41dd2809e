"""Facts: what real clients declare in headers and bodies reaches the mind under one name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from policies.request import RequestClass
from router.control.features import SESSION_CHARS_MAX
from tests.router.desk import chat, desk, run, speak

CODEX = {"turn_trigger": "exec", "thread_source": "user", "request_kind": "turn"}


def offered(headers: dict[str, str], body: dict[str, Any]) -> Any:
    seen: list[Any] = []

    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            await d.client.post("/v1/chat/completions", json=body, headers=headers)
            seen.extend(d.mind.offered)

    run(work())
    return seen[0]


@pytest.mark.parametrize(
    ("headers", "fields", "session"),
    [
        ({"x-claude-code-session-id": "c1", "session-id": "x"}, {}, "c1"),
        ({"session-id": "k1", "thread-id": "t1"}, {}, "k1"),
        ({"x-session-affinity": "o1"}, {}, "o1"),
        ({}, {"metadata": {"user_id": json.dumps({"session_id": "m1"})}}, "m1"),
        ({}, {"metadata": {"user_id": "plain"}}, "plain"),
        ({}, {"prompt_cache_key": "p1", "user": "u1"}, "p1"),
        ({}, {"user": "u1"}, "u1"),
    ],
)
def test_a_session_is_known_by_the_clients_own_name(
    headers: dict[str, str], fields: dict[str, Any], session: str
) -> None:
    request = offered(headers, chat(**fields))
    assert request.session == session
    assert request.facts.has_session


@pytest.mark.parametrize("user_id", ["x" * 100_000, json.dumps({"session_id": ["x"] * 1000})])
def test_a_name_longer_than_the_bound_is_known_by_its_digest(user_id: str) -> None:
    first, again, other = (
        offered({}, chat(metadata={"user_id": said})).session for said in (user_id, user_id, user_id.replace("x", "y"))
    )
    assert first == again != other
    assert len(first) <= SESSION_CHARS_MAX
    assert offered({}, chat(metadata={"user_id": "x" * SESSION_CHARS_MAX})).session == "x" * SESSION_CHARS_MAX


def test_a_conversation_without_a_name_keeps_its_lineage() -> None:
    opening = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    later = [*opening, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]
    first, second = (offered({}, {"model": "tiny", "messages": messages}) for messages in (opening, later))
    other = offered({}, {"model": "tiny", "messages": [opening[0], {"role": "user", "content": "else"}]})
    assert first.session == second.session != other.session
    assert not first.facts.has_session
    assert offered({}, chat("alone")).session == ""


def test_a_question_without_a_session_is_known_again_by_its_body() -> None:
    alone, again, other = (offered({}, chat(text)) for text in ("alone", "alone", "another"))
    assert alone.body_hash == again.body_hash != other.body_hash
    assert alone.body_hash
    assert offered({"session-id": "k1"}, chat("alone")).body_hash == 0


def test_codex_says_who_waits() -> None:
    headers = {"x-codex-turn-metadata": json.dumps(CODEX), "originator": "codex_exec"}
    facts = offered(headers, chat()).facts
    assert (facts.turn_trigger, facts.originator, facts.is_side_call) == ("exec", "codex_exec", False)
    title = json.dumps(CODEX | {"thread_source": "thread_title"})
    assert offered({"x-codex-turn-metadata": title}, chat()).facts.is_side_call


def test_a_completion_window_is_a_batch_job_with_so_much_time() -> None:
    assert offered({}, chat(completion_window="24h")).facts.completion_window == "24h"

    async def work() -> None:
        async with desk() as d:
            for wrong in ("0h", "soon", "24"):
                answer = await d.client.post("/v1/chat/completions", json=chat(completion_window=wrong))
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == "completion_window"

    run(work())


@pytest.mark.parametrize("metadata", ["{", "[]", '"x"', "{" * 5000])
def test_broken_metadata_says_nothing(metadata: str) -> None:
    assert offered({"x-codex-turn-metadata": metadata}, chat()).facts.turn_trigger == ""


def test_a_declared_class_and_timeout_reach_the_mind() -> None:
    headers = {"x-headway-class": "Agent", "x-stainless-read-timeout": "300"}
    request = offered(headers, chat())
    assert request.facts.declared_class is RequestClass.BACKGROUND_AGENT
    assert request.declared_timeout_s == 300


@pytest.mark.parametrize("timeout", ["NaN", "inf", "-1", "0", "soon"])
def test_a_timeout_that_is_none_is_ignored(timeout: str) -> None:
    assert offered({"x-stainless-timeout": timeout}, chat()).declared_timeout_s is None


def test_tools_and_roles_are_counted() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("Bash", "AskUserQuestion")]
    messages = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y", "tool_call_id": "1"}]
    facts = offered({}, {"model": "tiny", "messages": messages, "tools": tools}).facts
    assert (facts.tool_count, facts.has_interactive_tools, facts.last_role) == (2, True, "tool")


def test_siblings_of_one_template_share_its_hash() -> None:
    template = "Extract all names from the following text. " * 60
    first, second, other = (offered({}, chat(text)).facts for text in (template + "a", template + "b", "else"))
    assert first.template_hash == second.template_hash != other.template_hash


def test_siblings_of_a_short_template_with_suffixes_of_any_length_share_its_hash() -> None:
    template = "Summarise this text in one word: "
    hashes = {offered({}, chat(template + "word " * count)).facts.template_hash for count in (2, 3, 4, 5)}
    assert len(hashes) == 1
