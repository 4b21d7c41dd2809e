"""Calls and thoughts from a model's text to each SDK, and back into the next prompt."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest

from tests.router.desk import TOOL_TEMPLATE, VOCABULARY, Desk, chat, desk, ids_of, run, speak

SAID = (
    "<think>\nThe user wants\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "time")]
CLAUDE_TOOLS: list[Any] = [{"name": name, "input_schema": SCHEMA} for name in ("weather", "time")]
MESSAGES: list[Any] = [{"role": "user", "content": "How is Oslo?"}]


def openai_sdk(d: Desk) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{d.client.base_url}/v1", api_key="none", max_retries=0)


def anthropic_sdk(d: Desk) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=str(d.client.base_url), api_key="none", max_retries=0)


def read(ids: list[int]) -> str:
    return b"".join(VOCABULARY.token_bytes[token] or b"|" for token in ids).decode()


def test_openais_sdk_gets_calls_whole() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, openai_sdk(d) as client:
            d.fleet.answer = speak(SAID)
            answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)
            (choice,) = answer.choices
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "Let me look."
            assert choice.message.reasoning_content == "The user wants"
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
            assert calls == [("weather", {"city": "Oslo"}), ("time", {})]
            assert len({call.id for call in choice.message.tool_calls}) == 2
            details = answer.usage.completion_tokens_details
            assert 0 < details.reasoning_tokens < answer.usage.completion_tokens

    run(work())


def test_openais_sdk_gets_calls_streamed() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, openai_sdk(d) as client:
            d.fleet.answer = speak(SAID)
            async with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS) as stream:
                async for _ in stream:
                    pass
                final = (await stream.get_final_completion()).choices[0]
            assert final.finish_reason == "tool_calls"
            assert final.message.content == "Let me look."
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in final.message.tool_calls]
            assert calls == [("weather", {"city": "Oslo"}), ("time", {})]

    run(work())


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_wants_one_call_gets_the_first_and_the_worker_is_stopped_behind_it(is_stream: bool) -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, openai_sdk(d) as client:
            d.fleet.answer = speak(SAID)
            asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "parallel_tool_calls": False}
            if is_stream:
                async with client.chat.completions.stream(**asked) as stream:
                    choice = (await stream.get_final_completion()).choices[0]
            else:
                choice = (await client.chat.completions.create(**asked)).choices[0]
            assert choice.finish_reason == "tool_calls"
            assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
            assert choice.message.content == "Let me look."
            assert (await d.fleet.next()).aborted == "stop string"

    run(work())


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_forced_call_that_is_cut_says_nothing_of_its_marks(cut: int) -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, openai_sdk(d) as client:
            call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
            d.fleet.answer = speak((call + call)[: len(call) + cut], reason="length")
            answer = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="required"
            )
            (choice,) = answer.choices
            assert choice.finish_reason == "length"
            assert not choice.message.content
            assert choice.message.tool_calls[0].function.name == "weather"

    run(work())


def test_a_prefilled_answer_is_not_continued_and_that_is_said() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.fleet.answer = speak("Well.")
            begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
            answer = await d.client.post("/v1/messages", json={"model": "tiny", "max_tokens": 9, "messages": begun})
            assert answer.status_code == 200
            assert "not continued" in answer.headers["x-headway-notice"]

    run(work())


@pytest.mark.parametrize("is_stream", [True, False])
def test_anthropics_sdk_gets_thinking_text_and_tool_use(is_stream: bool) -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, anthropic_sdk(d) as client:
            d.fleet.answer = speak(SAID)
            asked: Any = {"model": "tiny", "max_tokens": 500, "messages": MESSAGES, "tools": CLAUDE_TOOLS}
            if is_stream:
                async with client.messages.stream(**asked) as stream:
                    message = await stream.get_final_message()
            else:
                message = await client.messages.create(**asked)
            assert message.stop_reason == "tool_use"
            assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
            thinking, text, weather, time = message.content
            assert (thinking.thinking, text.text) == ("The user wants", "Let me look.")
            assert (weather.name, weather.input) == ("weather", {"city": "Oslo"})
            assert (time.name, time.input) == ("time", {})
            assert weather.id != time.id

    run(work())


def test_arguments_that_were_cut_off_stay_readable() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, anthropic_sdk(d) as client:
            d.fleet.answer = speak('<tool_call>{"name": "time", "arguments": {"zone": "Eu', reason="length")
            message = await client.messages.create(model="tiny", max_tokens=9, messages=MESSAGES, tools=CLAUDE_TOOLS)
            assert message.stop_reason == "max_tokens"
            assert message.content[0].input == {"unparsed": '{"zone": "Eu'}

    run(work())


def test_without_tools_or_with_choice_none_the_same_words_are_text() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.fleet.answer = speak('<tool_call>{"name": "time", "arguments": {}}</tool_call>')
            for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}):
                answer = (await d.client.post("/v1/chat/completions", json=chat(**extra))).json()["choices"][0]
                assert answer["finish_reason"] == "stop"
                assert answer["message"]["content"].startswith("<tool_call>")

    run(work())


def test_both_dialects_render_a_tool_round_trip_alike() -> None:
    arguments = {"city": "Oslo"}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    as_openai = [
        *MESSAGES,
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
    ]
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "c1", "name": "weather", "input": arguments},
    ]
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "4 degrees"}
    as_anthropic = [*MESSAGES, {"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]

    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            prompts = []
            sent: list[tuple[str, dict[str, Any]]] = [
                ("/v1/chat/completions", {"messages": as_openai}),
                ("/v1/messages", {"messages": as_anthropic, "max_tokens": 5}),
            ]
            for path, body in sent:
                asking = asyncio.create_task(d.client.post(path, json=body))
                attempt = await d.fleet.next()
                attempt.start()
                attempt.end()
                assert (await asking).status_code == 200
                prompts.append(read(attempt.ids))
            assert prompts[0] == prompts[1]
            assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in prompts[0]
            assert "|tool\n4 degrees|" in prompts[0]
            assert "<think>\nhm\n</think>" in prompts[0]

    run(work())


def test_a_forced_call_is_held_to_a_grammar_and_read_back() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, openai_sdk(d) as client:
            named: Any = {"type": "function", "function": {"name": "time"}}
            d.fleet.answer = speak('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
            answer = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=named
            )
            attempt = await d.fleet.next()
            assert attempt.order.sampling.grammar_kind == "lark"
            assert '"const": "time"' in attempt.order.sampling.grammar
            assert '"const": "weather"' not in attempt.order.sampling.grammar
            assert read(attempt.ids).endswith(
                "<think>\n\n</think>\n\n"
            )  # who is held to a grammar does not think first
            assert answer.choices[0].message.tool_calls[0].function.name == "time"

    run(work())


def test_a_model_without_a_form_of_calls_says_so() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("no calls from me")
            answer = await d.client.post("/v1/chat/completions", json=chat(tools=TOOLS))
            assert answer.headers["x-headway-notice"] == "tools not offered: this model has no form for calls"

    run(work())


def test_thoughts_that_the_prompt_began_are_thoughts() -> None:
    template = TOOL_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")

    async def work() -> None:
        async with desk(template=template) as d:
            d.fleet.answer = speak("hm, yes\n</think>\n\nYes.")
            message = (await d.client.post("/v1/chat/completions", json=chat())).json()["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("hm, yes", "Yes.")

    run(work())


def test_a_worker_that_dies_anywhere_in_thoughts_text_or_a_call_changes_no_byte_of_the_answer() -> None:
    said = ids_of(SAID.replace("Let me look.", "Grüße 🌍."))
    asked = {"model": "tiny", "max_tokens": 900, "messages": MESSAGES, "tools": CLAUDE_TOOLS, "stream": True}

    async def answer(d: Desk, cut: int) -> list[Any]:
        """What the client reads, pieces of one part joined; the worker dies after `cut` tokens."""
        asking = asyncio.create_task(d.client.post("/v1/messages", json=asked))
        attempt = await d.fleet.next()
        if 0 < cut < len(said):
            attempt.start()
            attempt.say(said[:cut])
            attempt.sink.lost("died")
            attempt = await d.fleet.next()
            assert attempt.ids[attempt.order.prompt_len :] == said[:cut]
        attempt.start()
        attempt.say(said[cut:])
        attempt.end()
        lines = [line for line in (await asking).text.splitlines() if line.startswith("data: ")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        parts: dict[int, list[str]] = {}
        for event in events:
            if event["type"] == "content_block_delta":
                (text,) = [value for name, value in event["delta"].items() if name != "type"]
                parts.setdefault(event["index"], []).append(text)
        return [["".join(part) for part in parts.values()], events[-2]["delta"], events[-2]["usage"]["output_tokens"]]

    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.mind.attempts_max = 10_000
            whole = await answer(d, 0)
            assert whole[0][:3] == ["The user wants", "Grüße 🌍.", '{"city": "Oslo"}']
            for cut in range(1, len(said), 3):
                assert await answer(d, cut) == whole, cut

    run(work())
