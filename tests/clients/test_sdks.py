"""The SDKs of OpenAI and Anthropic, unchanged, against a whole Headway: streams, tools, schemas, caches, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.clients.tiny_agent import SENTENCE

LONG = "The quick brown fox jumps over the lazy dog. " * 40
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Bergen"]}}, "required": ["city"]}
SCHEMA: dict[str, Any] = CITY | {"additionalProperties": False}
WEATHER = {"name": "weather", "description": "Says the weather.", "parameters": SCHEMA}
TOOLS: Any = [{"type": "function", "function": WEATHER}]
CLAUDE_TOOLS: Any = [{"name": "weather", "description": "Says the weather.", "input_schema": SCHEMA}]
ASKED: Any = [{"role": "user", "content": "How is Oslo?"}]


@pytest.fixture(scope="module")
def chatty(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key="none", max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed(chatty: openai.OpenAI) -> None:
    whole = chatty.chat.completions.create(model="gpt-any", messages=ASKED)
    assert whole.choices[0].message.content == SENTENCE
    assert whole.model == "tiny-agent"
    with chatty.chat.completions.stream(model="gpt-any", messages=ASKED) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == SENTENCE


def test_messages_whole_and_streamed_and_counted(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model="claude-any", max_tokens=50, messages=ASKED)
    assert whole.content[0].text == SENTENCE
    with claude.messages.stream(model="claude-any", max_tokens=50, messages=ASKED) as stream:
        assert "".join(stream.text_stream) == SENTENCE
        usage = stream.get_final_message().usage
    counted = claude.messages.count_tokens(model="claude-any", messages=ASKED)
    assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens


def test_responses_whole_and_streamed(chatty: openai.OpenAI) -> None:
    assert chatty.responses.create(model="gpt-any", input="How is Oslo?", store=False).output_text == SENTENCE
    with chatty.responses.stream(model="gpt-any", input="How is Oslo?") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == SENTENCE


def test_both_sdks_at_once(server: str) -> None:
    async def ask() -> list[str]:
        async with (
            openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as first,
            anthropic.AsyncAnthropic(base_url=server, api_key="none") as second,
        ):
            chats = [first.chat.completions.create(model="gpt-any", messages=ASKED) for _ in range(4)]
            messages = [second.messages.create(model="claude-any", max_tokens=50, messages=ASKED) for _ in range(4)]
            told = await asyncio.gather(*chats), await asyncio.gather(*messages)
            return [chat.choices[0].message.content for chat in told[0]] + [one.content[0].text for one in told[1]]

    assert asyncio.run(ask()) == [SENTENCE] * 8


def test_a_forced_call_goes_out_and_its_result_comes_back(chatty: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    chat = chatty.chat.completions.create(model="gpt-any", messages=ASKED, tools=TOOLS, tool_choice="required")
    message = chat.choices[0].message
    assert chat.choices[0].finish_reason == "tool_calls"
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Bergen")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "4 degrees"}
    back: Any = [*ASKED, message.model_dump(exclude_none=True), result]
    assert chatty.chat.completions.create(model="gpt-any", messages=back, tools=TOOLS).choices[0].message.content

    with claude.messages.stream(
        model="claude-any", max_tokens=200, messages=ASKED, tools=CLAUDE_TOOLS, tool_choice={"type": "any"}
    ) as stream:
        said = stream.get_final_message()
    assert said.stop_reason == "tool_use"
    used = said.content[-1]
    assert (used.type, used.name) == ("tool_use", "weather")
    assert used.input["city"] in ("Oslo", "Bergen")
    results: Any = {"type": "tool_result", "tool_use_id": used.id, "content": "4 degrees"}
    told: Any = [*ASKED, {"role": "assistant", "content": said.content}, {"role": "user", "content": [results]}]
    assert claude.messages.create(model="claude-any", max_tokens=50, messages=told, tools=CLAUDE_TOOLS).content


def test_an_answer_is_of_the_form_that_was_asked_for(chatty: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    chat = chatty.chat.completions.create(model="gpt-any", messages=ASKED, response_format=wanted)
    assert json.loads(chat.choices[0].message.content)["city"] in ("Oslo", "Bergen")
    text: Any = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}
    response = chatty.responses.create(model="gpt-any", input="Where?", text=text)
    assert json.loads(response.output_text)["city"] in ("Oslo", "Bergen")


def test_the_second_turn_finds_the_first_and_its_answer_in_the_cache(chatty: openai.OpenAI) -> None:
    begun: Any = [{"role": "system", "content": LONG}, *ASKED]
    first = chatty.chat.completions.create(model="gpt-any", messages=begun)
    said: Any = {"role": "assistant", "content": first.choices[0].message.content}
    second = chatty.chat.completions.create(model="gpt-any", messages=[*begun, said, *ASKED])
    assert first.usage is not None
    assert second.usage is not None
    known = first.usage.prompt_tokens + first.usage.completion_tokens
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert known - 16 <= cached + 1  # all but what does not fill a block


def test_errors_are_the_sdks_own(chatty: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny-agent"):
        chatty.chat.completions.create(model="nobody", messages=ASKED)
    with pytest.raises(anthropic.NotFoundError, match="tiny-agent"):
        claude.messages.create(model="nobody", max_tokens=5, messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="messages"):
        chatty.chat.completions.create(model="gpt-any", messages=[])
    long: Any = [{"role": "user", "content": "a b " * 140_000}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 262144 maximum"):
        claude.messages.create(model="claude-any", max_tokens=5, messages=long)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 262144 tokens"):
        chatty.chat.completions.create(model="gpt-any", messages=long)


def test_models_are_listed(chatty: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert [model.id for model in chatty.models.list()] == ["tiny-agent"]
    assert [model.id for model in claude.models.list()] == ["tiny-agent"]
