"""The SDKs and our refusals: they come back when Retry-After says, and not at all where a retry cannot succeed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import anyio
import openai
import pytest

from tests.router.desk import Desk, desk, refusal, run, speak

Ask = Callable[[Desk, int], Awaitable[str | None]]
USER: Any = [{"role": "user", "content": "hi"}]
AFTER_S = 7.0


async def ask_openai(d: Desk, max_retries: int) -> str | None:
    async with openai.AsyncOpenAI(
        base_url=f"{d.client.base_url}/v1", api_key="none", max_retries=max_retries
    ) as client:
        return (await client.chat.completions.create(model="tiny", messages=USER)).choices[0].message.content


async def ask_anthropic(d: Desk, max_retries: int) -> str | None:
    async with anthropic.AsyncAnthropic(
        base_url=str(d.client.base_url), api_key="none", max_retries=max_retries
    ) as client:
        said = await client.messages.create(model="tiny", max_tokens=9, messages=USER)
        return "".join(block.text for block in said.content)


class Waits:
    """What the SDKs would have slept; nobody does. `relents` is called each time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.relents: Callable[[], None] = lambda: None

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.relents()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    slept = Waits()
    monkeypatch.setattr(anyio, "sleep", slept.sleep)
    return slept


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("ask", [ask_openai, ask_anthropic])
def test_they_wait_as_long_as_we_say_and_are_served(ask: Ask, status: int, waits: Waits) -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            d.mind.refusal = refusal(status, "full", AFTER_S)
            waits.relents = lambda: setattr(d.mind, "refusal", None)
            assert await ask(d, 2) == "ok"
            assert len(d.mind.offered) == 2
            (waited,) = waits.seconds
            assert AFTER_S <= waited <= 1.25 * AFTER_S  # they add up to a quarter of their own

    run(work())


@pytest.mark.parametrize(
    ("ask", "kind"), [(ask_openai, openai.RateLimitError), (ask_anthropic, anthropic.RateLimitError)]
)
def test_they_do_not_come_back_where_no_retry_can_succeed(ask: Ask, kind: type[Exception], waits: Waits) -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.refusal = refusal(429, "quota", None)
            with pytest.raises(kind):
                await ask(d, 2)
            assert len(d.mind.offered) == 1
            assert not waits.seconds

    run(work())
