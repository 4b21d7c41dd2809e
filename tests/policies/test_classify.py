"""The decision table, held against what real clients were recorded to send."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from policies.api import SessionView
from policies.classify import KIN, ROWS, classify
from policies.request import RequestClass, Tenant
from policies.sessions import LONE_STEPS, Sessions
from tests.policies.scenes import request

CHATBOT, BACKGROUND, BATCH = RequestClass

CLAUDE_TUI = {"user_agent": "claude-cli/2.1.197 (external, cli)", "tool_count": 27, "has_interactive_tools": True}
CLAUDE_P = {"user_agent": "claude-cli/2.1.197 (external, sdk-cli)", "tool_count": 24}
CODEX_TUI = {"user_agent": "codex-tui/0.169.0", "originator": "codex-tui", "turn_trigger": "user", "tool_count": 13}
CODEX_EXEC = {"user_agent": "codex_exec/0.169.0 (Debian 12)", "originator": "codex_exec", "turn_trigger": "exec"}
OPENCODE = {"user_agent": "opencode/1.18.33 ai-sdk/provider-utils/4.0.23 runtime/bun/1.3.9", "tool_count": 10}
QWEN_CODE = {"user_agent": "QwenCode/0.15.10 (linux; x64)", "tool_count": 15}
AIDER = {"user_agent": "OpenAI/Python 2.20.0", "message_count": 8}
MINI_SWE = {"user_agent": "OpenAI/Python 3.54.0", "stream": False, "tool_count": 1, "message_count": 2}
SMOLAGENTS = {"user_agent": "OpenAI/Python 3.54.0", "stream": False, "message_count": 2}
LLM = {"user_agent": "OpenAI/Python 3.54.0"}

# name, facts, session, class, the row that says so
CORPUS: list[tuple[str, dict[str, Any], str, RequestClass, str]] = [
    ("claude code, typing", CLAUDE_TUI, "a", CHATBOT, "interactive-agent"),
    ("claude code, -p", CLAUDE_P, "a", BACKGROUND, "headless-agent"),
    ("codex, typing", CODEX_TUI, "a", CHATBOT, "interactive-agent"),
    ("codex exec", CODEX_EXEC, "a", BACKGROUND, "headless-agent"),
    ("opencode", OPENCODE, "a", CHATBOT, "default"),
    ("qwen-code", QWEN_CODE, "", CHATBOT, "default"),
    ("aider", AIDER, "", CHATBOT, "default"),
    ("mini-swe-agent", MINI_SWE, "", BACKGROUND, "tool-loop"),
    ("smolagents CodeAgent", SMOLAGENTS, "", BATCH, "one-shot-job"),
    ("llm", LLM, "", CHATBOT, "default"),
    ("a browser", {"user_agent": "Mozilla/5.0 (X11; Linux)"}, "", CHATBOT, "interactive-agent"),
    ("curl", {"user_agent": "curl/7.88.1", "stream": False}, "", BATCH, "one-shot-job"),
    ("declared batch from a browser", {"user_agent": "Mozilla/5.0", "declared_class": BATCH}, "", BATCH, "declared"),
    ("declared chat from curl", {"user_agent": "curl/8", "declared_class": CHATBOT}, "", CHATBOT, "declared"),
    ("flex", {"service_tier": "flex"}, "", BATCH, "batch-api"),
    ("many prompts", {"prompt_count": 64}, "", BATCH, "batch-api"),
    ("background: true", {"background": True}, "", BACKGROUND, "background-api"),
    ("8 h window", {"completion_window": "8h"}, "", BACKGROUND, "background-api"),
    ("24 h window", {"completion_window": "24h"}, "", BATCH, "batch-api"),
    ("priority tier, headless", {**CODEX_EXEC, "service_tier": "priority"}, "a", CHATBOT, "priority-tier"),
    ("extraction", {"stream": False, "has_json_schema": True}, "", CHATBOT, "default"),
]


@pytest.mark.parametrize(
    ("facts", "session", "expected", "row"), [case[1:] for case in CORPUS], ids=[c[0] for c in CORPUS]
)
def test_a_recorded_client_gets_its_class_and_the_reason(
    facts: dict[str, Any], session: str, expected: RequestClass, row: str
) -> None:
    classified = classify(request(session=session, **facts), SessionView(), 0.0)
    assert (classified.request_class, classified.reason) == (expected, row)


def test_every_row_has_a_name_of_its_own_and_the_last_one_always_matches() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert ROWS[-1].name == "default"


def test_a_small_schema_answer_nobody_watches_is_a_one_shot_job() -> None:
    asked = request(stream=False, has_json_schema=True, max_output=200)
    assert classify(asked, SessionView(), 0.0).reason == "one-shot-job"


def test_a_declared_class_is_clamped_to_the_tenant() -> None:
    asked = request(declared_class=CHATBOT, tenant=Tenant(most_urgent=BACKGROUND))
    classified = classify(asked, SessionView(), 0.0)
    assert classified.request_class is BACKGROUND
    assert classified.reason == "declared, clamped to tenant"


@pytest.mark.parametrize("root", list(RequestClass))
def test_subagents_and_side_calls_inherit_from_their_root(root: RequestClass) -> None:
    known = SessionView(request_class=root)
    subagent = request(session="a", agent_id="agent-7", **{**CLAUDE_TUI, "has_interactive_tools": False})
    title = request(session="a", is_side_call=True, stream=False, has_json_schema=True, max_output=100)
    assert classify(subagent, known, 0.0).request_class is root
    assert classify(title, known, 0.0).request_class is root


def test_a_side_call_of_an_unknown_session_is_served_fast() -> None:
    assert classify(request(session="new", is_side_call=True), SessionView(), 0.0).request_class is CHATBOT


def serve(sessions: Sessions, at_s: float, number: int = 0, **facts: Any) -> tuple[RequestClass, str]:
    """One request of session `a`, answered two seconds later."""
    asked = replace(request(number, arrived=at_s, **{"session": "a", **facts}))
    classified = classify(asked, sessions.view(asked, at_s), at_s)
    sessions.note(asked, classified, at_s)
    sessions.answered(asked, at_s + 2.0)
    return classified.request_class, classified.reason


def test_urgency_is_lost_after_three_agreeing_requests_and_won_back_at_once() -> None:
    sessions = Sessions(16, 16)
    loop = {"stream": False, "tool_count": 1, "last_role": "tool"}
    assert serve(sessions, 0.0)[0] is CHATBOT
    assert [serve(sessions, at_s, **loop)[0] for at_s in (1.0, 2.0, 3.0)] == [CHATBOT, CHATBOT, BACKGROUND]
    assert serve(sessions, 4.0) == (CHATBOT, "default")


def test_disagreeing_requests_demote_nobody() -> None:
    sessions = Sessions(16, 16)
    loop = {"stream": False, "tool_count": 1}
    serve(sessions, 0.0)
    said = [serve(sessions, at_s, **facts)[0] for at_s, facts in ((1.0, loop), (2.0, loop), (3.0, {}), (4.0, loop))]
    assert said == [CHATBOT] * 4


def test_a_session_left_alone_becomes_a_background_agent() -> None:
    """Fifty tool steps without a person who was there before; the agent's client says nothing of itself."""
    sessions = Sessions(16, 16)
    serve(sessions, 0.0, **OPENCODE)
    serve(sessions, 600.0, **OPENCODE | {"message_count": 3})
    said = [serve(sessions, 601.0 + step, last_role="tool", **OPENCODE | {"message_count": 5}) for step in range(54)]
    assert said[50] == (CHATBOT, "default")
    assert said[51] == (CHATBOT, "unattended, not yet")
    assert said[53] == (BACKGROUND, "unattended")


def agent(
    sessions: Sessions, name: str, begin_s: float, steps: int, second_at: int = 0
) -> list[tuple[RequestClass, str]]:
    """A session that says nothing of itself: one human message, then tool steps; perhaps another message among them."""
    said = []
    for step in range(steps + 1):
        role = "user" if step in (0, second_at) else "tool"
        at_s = begin_s + 60.0 * step
        facts = {"session": name, "template_hash": 7, "tool_count": 5, "message_count": 1 + 2 * step, "last_role": role}
        said.append(serve(sessions, at_s, **facts))
    return said


def test_a_session_that_works_long_on_its_one_message_is_a_background_agent_and_so_are_those_that_begin_alike() -> None:
    sessions = Sessions(16, 16)
    first = agent(sessions, "one", 0.0, LONE_STEPS + 5)
    assert set(first[: LONE_STEPS + 1]) == {(CHATBOT, "default")}
    assert first[-1] == (BACKGROUND, "lone-loop")
    second = agent(sessions, "two", 1000.0, 4)
    assert second[0] == (CHATBOT, "default")
    assert [cls for cls, _ in second[1:]] == [CHATBOT, CHATBOT, BACKGROUND, BACKGROUND]


def test_where_people_come_back_nobody_is_taken_for_an_agent() -> None:
    sessions = Sessions(16, 16)
    agent(sessions, "one", 0.0, 4, second_at=3)
    assert set(agent(sessions, "two", 600.0, LONE_STEPS + 9)) == {(CHATBOT, "default")}


def named(sessions: Sessions, count: int, begin_s: float, **facts: Any) -> list[tuple[RequestClass, str]]:
    """First requests of sessions that begin alike."""
    begun = {"template_hash": 7, "message_count": 2} | facts
    return [serve(sessions, begin_s + n, n, session=f"{begin_s}-{n}", **begun) for n in range(count)]


def test_who_begins_like_agents_that_name_themselves_is_one_too_even_where_headers_are_lost() -> None:
    sessions = Sessions(64, 16)
    named(sessions, KIN - 1, 0.0, **CODEX_EXEC)
    assert named(sessions, 1, 100.0) == [(CHATBOT, "default")]
    named(sessions, 1, 200.0, **CODEX_EXEC)
    assert named(sessions, 1, 300.0) == [(BACKGROUND, "lone-loop")]
    assert named(sessions, 1, 400.0, template_hash=8) == [(CHATBOT, "default")]
    assert named(sessions, 1, 500.0, message_count=6) == [(CHATBOT, "default")]


def test_where_people_type_the_same_beginning_nobody_is_taken_for_an_agent() -> None:
    sessions = Sessions(64, 16)
    named(sessions, 7, 0.0, **CODEX_EXEC)
    named(sessions, 2, 100.0, **CODEX_TUI)
    assert named(sessions, 1, 200.0) == [(CHATBOT, "default")]


def test_a_person_taken_for_an_agent_is_one_again_with_the_second_message() -> None:
    sessions = Sessions(64, 16)
    named(sessions, KIN, 0.0, **CODEX_EXEC)
    asks = {"session": "person", "template_hash": 7}
    assert serve(sessions, 100.0, message_count=2, **asks)[0] is BACKGROUND
    assert serve(sessions, 160.0, message_count=4, **asks) == (CHATBOT, "human-pace")


def test_a_second_message_wins_the_urgency_back() -> None:
    sessions = Sessions(16, 16)
    said = agent(sessions, "one", 0.0, LONE_STEPS + 8, second_at=LONE_STEPS + 6)
    assert said[LONE_STEPS + 5] == (BACKGROUND, "lone-loop")
    assert said[LONE_STEPS + 6][0] is CHATBOT
    assert said[-1][0] is CHATBOT


def test_somebody_who_answers_at_human_pace_is_a_person() -> None:
    """One-shot looks, no streaming, but 30 s between an answer and the next question."""
    sessions = Sessions(16, 16)
    plain = {"user_agent": "python-requests/2.32", "stream": False, "has_session": False}
    said = [serve(sessions, 32.0 * turn, **plain) for turn in range(3)]
    assert said[0] == (BATCH, "one-shot-job")
    assert said[1:] == [(CHATBOT, "human-pace")] * 2


def test_a_burst_is_batch_work_whatever_the_user_agent_says() -> None:
    sessions = Sessions(16, 64)
    forged = {**CLAUDE_TUI, "session": "", "stream": False, "template_hash": 7, "message_count": 2}
    said = [serve(sessions, 0.1 * number, number, **forged) for number in range(10)]
    assert said[4] == (CHATBOT, "interactive-agent")
    assert said[5:] == [(BATCH, "burst")] * 5


def test_a_slow_drip_of_siblings_is_found_by_the_twentieth() -> None:
    sessions = Sessions(16, 64)
    forged = {**CLAUDE_TUI, "session": "", "stream": False, "template_hash": 7, "message_count": 2}
    said = [serve(sessions, 60.0 * number, number, **forged)[1] for number in range(20)]
    assert said[18:] == ["interactive-agent", "burst"]


def test_conversations_that_share_a_system_prompt_are_no_burst() -> None:
    sessions = Sessions(64, 64)
    said = [
        serve(sessions, 0.1 * number, number, session=f"s{number}", template_hash=7, message_count=2 + number % 2 * 4)[
            0
        ]
        for number in range(30)
    ]
    assert set(said) == {CHATBOT}


def test_memory_of_sessions_and_templates_is_bounded() -> None:
    sessions = Sessions(sessions_max=4, templates_max=4)
    for number in range(100):
        serve(sessions, float(number), number, session=f"s{number}", template_hash=number + 1)
    assert len(sessions._sessions) == 4
    assert len(sessions._templates) == 4


def test_a_stranger_does_not_inherit_a_session_of_another_organisation() -> None:
    sessions = Sessions(16, 16)
    serve(sessions, 0.0, **CODEX_EXEC)
    stranger = request(session="a", agent_id="x", tenant=Tenant(id="b", organisation="b"))
    assert sessions.view(stranger, 1.0).request_class is None
