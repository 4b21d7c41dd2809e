"""OpenAI's responses: numbered events, items whole and streamed, refusals of what would have to be kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.router.desk import TOOL_TEMPLATE, VOCABULARY, Desk, desk, run, speak

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "description": "Says it.", "parameters": SCHEMA, "strict": False},
    {"type": "web_search"},
    {"type": "namespace", "name": "agents", "tools": []},
]
SAID = '<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def sdk(d: Desk) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{d.client.base_url}/v1", api_key="none", max_retries=0)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


async def prompt(d: Desk, body: dict[str, Any]) -> str:
    """What the model reads; | is a mark."""
    asking = asyncio.create_task(d.client.post("/v1/responses", json={"model": "tiny", **body}))
    attempt = await d.fleet.next()
    attempt.start()
    attempt.end()
    assert (await asking).status_code == 200
    return b"".join(VOCABULARY.token_bytes[token] or b"|" for token in attempt.ids).decode()


def test_the_sdk_gets_a_whole_response() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, sdk(d) as client:
            d.fleet.answer = speak(SAID, cached_tokens=2)
            response = await client.responses.create(model="tiny", input="How is Oslo?", tools=TOOLS, store=False)
            assert response.status == "completed"
            assert response.output_text == "I look."
            reasoning, message, call = response.output
            assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "hm")
            assert message.type == "message"
            assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Oslo"})
            assert len({reasoning.id, message.id, call.id, call.call_id}) == 4
            assert response.usage.input_tokens_details.cached_tokens == 2
            assert response.usage.output_tokens_details.reasoning_tokens > 0
            assert response.store is False

    run(work())


def test_the_sdk_streams_to_the_same_response() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d, sdk(d) as client:
            d.fleet.answer = speak(SAID)
            text, arguments = "", ""
            async with client.responses.stream(model="tiny", input="How is Oslo?", tools=TOOLS[:1]) as stream:
                async for event in stream:
                    text += event.delta if event.type == "response.output_text.delta" else ""
                    arguments += event.delta if event.type == "response.function_call_arguments.delta" else ""
                final = await stream.get_final_response()
            assert text == final.output_text == "I look."
            assert json.loads(arguments) == json.loads(final.output[2].arguments) == {"city": "Oslo"}
            assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]

    run(work())


def test_events_are_numbered_without_a_gap_and_every_part_is_begun_and_done() -> None:
    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            d.fleet.answer = speak(SAID)
            body = {"input": "How is Oslo?", "tools": TOOLS, "stream": True, "store": False}
            answer = await d.client.post("/v1/responses", json=body)
            said = events(answer.text)
            assert [event["sequence_number"] for event in said] == list(range(len(said)))
            kinds = [event["type"] for event in said]
            assert kinds[:2] == ["response.created", "response.in_progress"]
            assert kinds[-1] == "response.completed"
            for begun, done in [("output_item.added", "output_item.done"), ("content_part.added", "content_part.done")]:
                assert kinds.count(f"response.{begun}") == kinds.count(f"response.{done}")
            added = [event["item"]["id"] for event in said if event["type"] == "response.output_item.added"]
            assert [item["id"] for item in said[-1]["response"]["output"]] == added
            names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
            assert names == kinds
            assert answer.headers["x-headway-notice"] == "tools not run here: 2"

    run(work())


def test_a_cut_answer_is_incomplete_and_a_lost_one_failed() -> None:
    async def work() -> None:
        async with desk() as d, sdk(d) as client:
            d.fleet.answer = speak("and so", reason="length")
            response = await client.responses.create(model="tiny", input="x")
            assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
            d.fleet.answer, d.mind.attempts_max = None, 1
            await d.fleet.next()
            asking = asyncio.create_task(d.client.post("/v1/responses", json={"input": "x", "stream": True}))
            attempt = await d.fleet.next()
            attempt.start()
            attempt.say([65])
            await asyncio.sleep(0.01)
            attempt.sink.lost("gone")
            last = events((await asking).text)[-1]
            assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
            assert last["response"]["error"]["message"]

    run(work())


def test_items_of_one_answer_become_one_message() -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "more"}]},
        {"role": "user", "content": "How is Oslo?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "name": "weather", "arguments": '{"city": "Oslo"}', "call_id": "c"},
        {"type": "function_call_output", "call_id": "c", "output": "4 degrees"},
        {"type": "web_search_call", "id": "ws"},
    ]

    async def work() -> None:
        async with desk(template=TOOL_TEMPLATE) as d:
            said = await prompt(d, {"input": items, "instructions": "first"})
            assert said.startswith("|system\nfirst\n\nrules\n\nmore|\n|user\nHow is Oslo?|\n|assistant\n<think>\nhm\n")
            assert 'I look.<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>|' in said
            assert "|tool\n4 degrees|\n|assistant\n" in said

    run(work())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=[param for _, param in BAD])
def test_what_cannot_be_served_is_named(fields: dict[str, Any], param: str) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.post("/v1/responses", json={"input": "x", **fields})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param

    run(work())


def test_a_schema_of_the_text_reaches_the_worker_as_it_was_written() -> None:
    async def work() -> None:
        async with desk() as d:
            wanted = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
            await prompt(d, {"input": "x", "text": {"format": wanted}})
            await prompt(d, {"input": "x"})
            assert d.mind.offered[0].facts.has_json_schema
            assert not d.mind.offered[1].facts.has_json_schema

    run(work())


def test_the_api_describes_itself() -> None:
    async def work() -> None:
        async with desk() as d:
            document = (await d.client.get("/openapi.json")).json()
            assert document["openapi"].startswith("3.1")
            named = json.dumps(document)
            references = {name.split('"')[0] for name in named.split("#/components/schemas/")[1:]}
            assert references <= set(document["components"]["schemas"])
            for path, methods in document["paths"].items():
                (method,) = methods
                answer = await d.client.request(method, path.replace("{model}", "tiny"), content=b"{")
                assert answer.status_code == (400 if method == "post" else 200), path

    run(work())
