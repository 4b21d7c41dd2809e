"""What clients change in a system prompt for reasons of their own is removed, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.language.canonical import RULES, RuleError, canonical, load
from router.language.turn import Message
from tests.router.desk import Desk, desk, run

HEADER = "x-anthropic-billing-header: cc_version=9.9.9.{}; cc_entrypoint=cli;"


def test_the_billing_header_goes_and_what_is_behind_it_stays() -> None:
    rules = load(["claude-code-billing", "total-tokens"])
    system = Message(
        "system", HEADER.format("abc") + "\n\nYou are an agent.\n<total_tokens>123 left</total_tokens>\nBe brief."
    )
    user = Message("user", HEADER.format("abc"))
    alone = Message("system", HEADER.format("abc"))
    assert canonical((system, user, alone), rules) == (Message("system", "You are an agent.\nBe brief."), user)
    untouched = (Message("system", "No header: x-anthropic-billing-header: is named here."), user)
    assert canonical(untouched, rules) is untouched


def test_two_sessions_of_claude_code_share_their_prefix() -> None:
    async def work() -> None:
        async with desk(rules=list(RULES.values())) as d:
            prompts = [await ids(d, HEADER.format(version)) for version in ("abc", "def")]
            assert prompts[0] == prompts[1]

    run(work())


async def ids(d: Desk, header: str) -> list[int]:
    system: list[dict[str, Any]] = [{"type": "text", "text": header}, {"type": "text", "text": "You are an agent."}]
    body = {"system": system, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    asking = asyncio.create_task(d.client.post("/v1/messages", json=body))
    attempt = await d.fleet.next()
    attempt.start()
    attempt.end()
    assert (await asking).status_code == 200
    return attempt.ids


def test_rules_are_named_or_imported() -> None:
    assert load(["string:capwords"])[0]("a b") == "A B"
    for name in ("nobody", "no_such_module:x", "string:nobody", "string:digits", ":"):
        with pytest.raises(RuleError):
            load([name])
