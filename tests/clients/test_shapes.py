"""What agents really send, by shape: each is served, classed by what it declares, and a second turn shares the first.

shapes.jsonl holds requests of Claude Code 2.1.197 (`-p` and its screen), Codex 0.169.0, opencode 1.18.33, aider 0.86.2,
llm 0.36 and mini-swe-agent 2.4.6, two turns where there are two, and what the first three send to compact: the fields
and their order are theirs, of every longer text only the length is kept."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.api import SessionView
from policies.classify import classify
from router.language.canonical import RULES
from tests.router.desk import IN_TURN_TEMPLATE, NO_SYSTEM_TEMPLATE, TOOL_TEMPLATE, VIEW, Desk, desk, run

SHAPES = [json.loads(line) for line in (Path(__file__).parent / "shapes.jsonl").read_text().splitlines()]
SEEN = {  # class and reason of a first request, from nothing but the request itself
    "claude-code": ("background-agent", "headless-agent"),
    "claude-code-screen": ("chatbot+", "interactive-agent"),
    "claude-code-compaction": ("background-agent", "headless-agent"),
    "codex": ("background-agent", "headless-agent"),
    "codex-compaction": ("background-agent", "headless-agent"),
    "opencode": ("chatbot+", "default"),
    "opencode-compaction": ("chatbot+", "default"),
    "aider": ("chatbot+", "default"),
    "llm": ("chatbot+", "default"),
    "mini-swe-agent": ("background-agent", "tool-loop"),
}
ENDS = {
    "/v1/messages?beta=true": "event: message_stop",
    "/v1/responses": "event: response.completed",
    "/v1/chat/completions": "data: [DONE]",
}
WHOLE = '"finish_reason":"stop"'  # of mini-swe-agent, which does not stream


def filled(value: Any) -> Any:
    """The shape with words where lengths stand. Equal lengths give equal words, so what was shared stays shared."""
    if isinstance(value, str) and value.startswith("~") and value[1:].isdecimal():
        count = int(value[1:])
        return (f"words of {count} characters, " * (count // 10 + 1))[:count]
    if isinstance(value, list):
        return [filled(inner) for inner in value]
    return {name: filled(inner) for name, inner in value.items()} if isinstance(value, dict) else value


async def ask(d: Desk, shape: dict[str, Any]) -> tuple[list[int], str]:
    """The prompt's ids, and what the client is told."""
    body = filled(shape["body"]) | {"model": "gpt-any"}
    asking = asyncio.create_task(d.client.post(shape["path"], json=body, headers=shape["headers"]))
    attempt = await d.fleet.next()
    attempt.start()
    attempt.say([65])
    attempt.end()
    answer = await asking
    assert answer.status_code == 200
    return attempt.ids, answer.text


def offered_messages(shape: dict[str, Any]) -> list[Any]:
    messages: list[Any] = shape["body"].get("messages") or shape["body"]["input"]
    return messages


@pytest.mark.parametrize("shape", SHAPES, ids=[f"{number}-{shape['client']}" for number, shape in enumerate(SHAPES)])
def test_it_is_served_to_its_end_and_classed_by_what_it_declares(shape: dict[str, Any]) -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.fleet.views = {"tiny": replace(VIEW, context_max=1_000_000)}
            _, told = await ask(d, shape)
            assert (ENDS[shape["path"]] if shape["body"].get("stream") else WHOLE) in told
            (offered,) = d.mind.offered
            found = classify(offered, SessionView(), 0.0)
            assert (found.request_class.label, found.reason) == SEEN[shape["client"]]
            assert offered.facts.stream == shape["body"].get("stream", False)
            assert bool(offered.session) == (len(offered_messages(shape)) > 1)  # its own, or how it began
            assert offered.facts.last_role == ("tool" if "~47" in str(offered_messages(shape)[-1]) else "user")

    run(work())


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, IN_TURN_TEMPLATE, NO_SYSTEM_TEMPLATE], ids=["any", "turn", "none"])
@pytest.mark.parametrize("client", ["claude-code", "claude-code-screen", "codex", "opencode", "llm", "mini-swe-agent"])
def test_the_second_turn_begins_with_the_first_whatever_the_template_refuses(client: str, template: str) -> None:
    first, second = [shape for shape in SHAPES if shape["client"] == client][-2:]

    async def work() -> None:
        async with desk(template=template, rules=list(RULES.values())) as d:
            d.fleet.views = {"tiny": replace(VIEW, context_max=1_000_000)}
            before, after = (await ask(d, first))[0], (await ask(d, second))[0]
            assert after[: len(before)] == before
            assert d.mind.offered[0].session in (d.mind.offered[1].session, "")  # llm's one message names none yet

    run(work())
