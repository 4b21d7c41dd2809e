"""What clients sent to a recording server elsewhere: everything is served, classed and named as their makers meant it.

The recordings are not part of the repository: $HEADWAY_SHARED/recordings, or ../shared/recordings beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from policies.api import SessionView
from policies.classify import classify
from tests.loadgen.shared import shared_folder
from tests.router.desk import TOOL_TEMPLATE, VIEW, Desk, desk, run, speak

SHORTENED = re.compile(r"<<([0-9]+) chars[^>]*>>\s?")  # and then the text's first 60 characters
OURS = ("/v1/chat/completions", "/v1/messages", "/v1/responses")
NOT_SENT_ON = ("host", "content-length", "accept-encoding", "connection")
SDK_CLASSES = {("data-processor", "one-shot-job"), ("data-processor", "batch-api"), ("chatbot+", "default")}
SEEN = {  # classes and reasons of first requests, by client and scenario; None: its other scenarios
    ("codex", "tui"): {("chatbot+", "interactive-agent")},
    ("codex", None): {("background-agent", "headless-agent")},
    ("aider", None): {("chatbot+", "default")},
    ("openai-python", "tool"): {("background-agent", "tool-loop")},
    ("openai-python", None): SDK_CLASSES,
    ("anthropic-python", None): SDK_CLASSES,
}


def filled(value: Any, name: str = "") -> Any:
    """With as many characters as there were; a schema of which only the length was kept is one that takes anything."""
    if isinstance(value, str) and (shortened := SHORTENED.match(value)):
        if name in ("parameters", "input_schema", "schema"):
            return {"type": "object"}
        return value[shortened.end() :].ljust(int(shortened[1]), "x")
    if isinstance(value, list):
        return [filled(inner) for inner in value]
    return {name: filled(inner, name) for name, inner in value.items()} if isinstance(value, dict) else value


def recorded(client: str) -> Iterator[dict[str, Any]]:
    for line in (shared_folder("recordings") / f"{client}.jsonl").read_text(encoding="utf-8").splitlines():
        request = json.loads(line)
        if request["path"] in OURS:
            yield request


async def ask(d: Desk, request: dict[str, Any]) -> int:
    headers = {name: value for name, value in request["headers"] if name.lower() not in NOT_SENT_ON}
    body = filled(request["body"]) | {"model": "gpt-any"}
    return (await d.client.post(request["path"], json=body, headers=headers)).status_code


@pytest.mark.parametrize("client", ["codex", "aider", "openai-python", "anthropic-python"])
def test_it_is_served_and_classed(client: str) -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.fleet.views = {"tiny": replace(VIEW, context_max=1_000_000)}
            d.fleet.answer = speak("ok")
            for request in recorded(client):
                status = await ask(d, request)
                if request["body"].get("store"):
                    assert status == 400  # responses are not kept
                    continue
                assert status == 200, request["scenario"]
                offered = d.mind.offered[-1]
                found = classify(offered, SessionView(), 0.0)
                expected = SEEN.get((client, request["scenario"])) or SEEN[client, None]
                assert (found.request_class.label, found.reason) in expected
                assert offered.facts.stream == bool(request["body"].get("stream"))
                if client == "codex":
                    assert offered.session == dict(request["headers"])["session-id"]
                    assert offered.facts.is_side_call == (not request["body"].get("tools"))

    run(work())
