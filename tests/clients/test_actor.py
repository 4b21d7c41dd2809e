"""The actor that `make clients` plays with, by Anthropic's SDK: it calls a tool of its own accord; its context ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.clients import tiny_agent
from tests.clients.actor import COMMANDS, FILL, PROOF, RUN, SUMMARY, SUMS_UP, answer
from tests.clients.agents import AGENTS
from tests.clients.run import stage
from tests.clients.tiny_agent import SENTENCE

BASH: Any = {"name": "Bash", "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}}}
CONTEXT = 1000


def test_it_calls_greets_sums_up_and_says_when_its_context_is_full(tmp_path: Path) -> None:
    tiny_agent.make(tmp_path / "tiny-agent")

    async def work() -> None:
        async with (
            stage(tmp_path / "run", CONTEXT) as built,
            anthropic.AsyncAnthropic(base_url=str(built.client.base_url), api_key="none", max_retries=0) as client,
        ):

            async def ask(messages: list[Any]) -> Any:
                async with client.messages.stream(
                    model="claude-any", max_tokens=200, messages=messages, tools=[BASH]
                ) as stream:
                    return await stream.get_final_message()

            history: list[Any] = [{"role": "user", "content": RUN}]
            said = await ask(history)
            assert (said.stop_reason, said.content[-1].input["command"]) == ("tool_use", COMMANDS[RUN])
            result = {"type": "tool_result", "tool_use_id": said.content[-1].id, "content": PROOF}
            history += [{"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
            told = await ask(history)
            assert told.content[0].text == f"{SENTENCE} {PROOF}"
            assert told.usage.cache_read_input_tokens > 0
            full = [*history, {"role": "assistant", "content": "1\n" * 2000}, {"role": "user", "content": FILL}]
            with pytest.raises(anthropic.BadRequestError, match=rf"prompt is too long: \d+ tokens > {CONTEXT} maximum"):
                await ask(full)

    asyncio.run(work())


def test_its_script_reads_the_last_message_that_is_not_a_systems() -> None:
    def rendered(*messages: tuple[str, str]) -> str:
        spoken = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
        return f"{spoken}<|im_start|>assistant\n"

    assert answer(rendered(("system", '"name": "bash"'), ("user", RUN), ("system", "late"))).startswith("<tool_call>")
    assert answer(rendered(("user", RUN))) == SENTENCE  # no shell is offered
    assert answer(rendered(("user", f"Write a {SUMS_UP[0]}."))) == SUMMARY
    assert answer(rendered(("system", '"name": "bash"'), ("user", RUN), ("tool", "no such file"))) == SENTENCE


def test_each_agent_has_a_part() -> None:
    assert all(agent.asks or agent.screen for agent in AGENTS)
    assert all(agent.goes_on for agent in AGENTS if agent.compacts)
