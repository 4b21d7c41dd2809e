"""Anthropic's dialect: its events, its errors, its figures, through the real listener and Anthropic's own SDK."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from threading import Lock
from typing import Any

import anthropic
import pytest

from router.delivery.generate import COUNTS_MAX
from router.delivery.relay import NOTICE_CHARS_MAX
from router.language.text import Text
from tests.router.desk import CONTEXT_MAX, VIEW, VOCABULARY, Desk, desk, refusal, run, speak

USER = {"role": "user", "content": "hi"}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 64, "messages": [USER], **fields}


def sdk(d: Desk, **options: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=str(d.client.base_url), api_key="none", max_retries=0, **options)


async def prompt(d: Desk, **fields: Any) -> str:
    """What the model reads."""
    sent = asyncio.create_task(d.client.post("/v1/messages", json=body(**fields)))
    attempt = await d.fleet.next()
    attempt.start()
    attempt.end()
    answer = await sent
    assert answer.status_code == 200, answer.text
    return b"".join(VOCABULARY.token_bytes[token] or b"|" for token in attempt.ids).decode()  # | is a mark


def test_a_stream_has_all_of_anthropics_events() -> None:
    async def work() -> None:
        async with desk() as d, sdk(d) as client:
            d.fleet.answer = speak("Grüße!", cached_tokens=3)
            kinds, text = [], ""
            async with client.messages.stream(**body()) as stream:
                async for event in stream:
                    kinds.append(event.type)
                    if event.type == "content_block_delta":
                        text += event.delta.text
                final = await stream.get_final_message()
            assert text == final.content[0].text == "Grüße!"
            assert [kind for kind in kinds if kind not in ("content_block_delta", "text")] == [
                "message_start",
                "content_block_start",
                "content_block_stop",
                "message_delta",
                "message_stop",
            ]
            assert final.stop_reason == "end_turn"
            assert final.usage.cache_read_input_tokens == 3

    run(work())


def test_the_raw_stream_is_named_events_in_order() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ab")
            answer = await d.client.post("/v1/messages?beta=true", json=body(stream=True))
            names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
            assert names[:3] == ["message_start", "ping", "content_block_start"]
            assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
            assert set(names[3:-3]) == {"content_block_delta"}
            assert answer.headers["content-type"].startswith("text/event-stream")

    run(work())


def test_a_whole_answer_and_its_figures() -> None:
    async def work() -> None:
        async with desk() as d, sdk(d) as client:
            d.fleet.answer = speak("hello", cached_tokens=4)
            message = await client.messages.create(**body())
            counted = await client.messages.count_tokens(model="tiny", messages=[USER])
            assert message.content[0].text == "hello"
            usage = message.usage
            total = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
            assert total == counted.input_tokens
            assert usage.output_tokens == 5

    run(work())


def test_a_stop_sequence_is_named() -> None:
    async def work() -> None:
        async with desk() as d, sdk(d) as client:
            d.fleet.answer = speak("one END two")
            message = await client.messages.create(**body(stop_sequences=["never", "END"]))
            assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
            assert message.content[0].text == "one "
            d.fleet.answer = speak("cut", reason="length")
            assert (await client.messages.create(**body())).stop_reason == "max_tokens"

    run(work())


def test_system_stands_anywhere_and_cache_control_changes_nothing() -> None:
    async def work() -> None:
        async with desk() as d:
            cached = {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}
            system = [{"type": "text", "text": "one"}, cached]
            said = await prompt(d, system=system, messages=[USER, {"role": "system", "content": "later"}, USER])
            assert said.startswith("|system\none\n\ntwo|\n|user\nhi|\n|system\nlater|\n|user\nhi")
            plain = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
            assert await prompt(d, system=plain, messages=[USER, {"role": "system", "content": "later"}, USER]) == said

    run(work())


def test_tool_results_are_messages_of_their_own_in_their_order() -> None:
    async def work() -> None:
        async with desk() as d:
            blocks = [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "42"}]},
                {"type": "tool_result", "tool_use_id": "b", "content": "43"},
                {"type": "text", "text": "go on"},
            ]
            said = await prompt(d, messages=[USER, {"role": "user", "content": blocks}])
            assert "|tool\n42|\n|tool\n43|\n|user\ngo on|\n" in said

    run(work())


def test_an_image_becomes_words_and_a_notice() -> None:
    async def work() -> None:
        async with desk() as d:
            image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
            document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "paper"}}
            blocks = [image, document, {"type": "text", "text": "what is it?"}]
            said = await prompt(d, messages=[{"role": "user", "content": blocks}])
            assert "[image omitted: tiny cannot see]\npaper\nwhat is it?" in said
            d.fleet.answer = speak("ok")
            answer = await d.client.post("/v1/messages", json=body(messages=[{"role": "user", "content": blocks}]))
            assert answer.headers["x-headway-notice"] == "image omitted: 1"

    run(work())


def test_images_are_refused_where_it_is_configured() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": [image, image]}]}

    async def work() -> None:
        async with desk(refuses_media=True) as d:
            answer = await d.client.post("/v1/chat/completions", json=chat)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "unsupported_media"
            assert "image (2)" in answer.json()["error"]["message"]
            assert not d.mind.offered
            d.fleet.answer = speak("ok")
            assert (await d.client.post("/v1/messages", json=body(messages=[USER]))).status_code == 200

    run(work())


def test_what_was_left_out_is_said_in_few_words() -> None:
    blocks = [{"type": f"block_{number}"} for number in range(3000)]

    async def work() -> None:
        async with desk() as d:
            d.fleet.views = {"tiny": replace(VIEW, context_max=1_000_000)}
            d.fleet.answer = speak("ok")
            answer = await d.client.post("/v1/messages", json=body(messages=[{"role": "user", "content": blocks}]))
            assert answer.status_code == 200
            assert answer.headers["x-headway-notice"].startswith("block_0 omitted: 1; block_1 omitted: 1")
            assert NOTICE_CHARS_MAX - 20 < len(answer.headers["x-headway-notice"]) <= NOTICE_CHARS_MAX

    run(work())


BAD = [
    ("no content", b'{"messages": [{"role": "user"}]}', 400),
    ("null content", b'{"messages": [{"role": "user", "content": null}]}', 400),
    ("no JSON", b"{", 400),
    ("no messages", b"{}", 400),
    ("bad role", b'{"messages": [{"role": "king", "content": "x"}]}', 400),
    ("block without type", b'{"messages": [{"role": "user", "content": [{}]}]}', 400),
    ("forced tool", b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": {"type": "any"}}', 400),
    ("odd choice", b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": {"type": "tool"}}', 400),
    ("odd format", b'{"messages": [{"role": "user", "content": "x"}], "output_config": {"format": {}}}', 400),
    ("hot", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 9}', 400),
    ("unknown model", b'{"model": "no", "messages": [{"role": "user", "content": "x"}]}', 404),
]


@pytest.mark.parametrize(("name", "sent", "status"), BAD, ids=[name for name, _, _ in BAD])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_what_is_wrong_is_said_in_anthropics_shape(path: str, name: str, sent: bytes, status: int) -> None:
    del name

    async def work() -> None:
        async with desk() as d:
            answer = await d.client.post(path, content=sent)
            assert answer.status_code == status
            error = answer.json()
            assert error["type"] == "error"
            assert error["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
            assert len(answer.content) < 1024

    run(work())


def test_a_prompt_that_does_not_fit_is_told_in_words_that_agents_know() -> None:
    async def work() -> None:
        async with desk() as d:
            long = [{"role": "user", "content": "x" * CONTEXT_MAX}]
            answer = await d.client.post("/v1/messages", json=body(messages=long))
            counted = (await d.client.post("/v1/messages/count_tokens", json=body(messages=long))).json()
            assert answer.status_code == 400
            message = answer.json()["error"]["message"]
            assert message == f"prompt is too long: {counted['input_tokens']} tokens > {CONTEXT_MAX} maximum"
            openai = await d.client.post("/v1/chat/completions", json={"messages": long})
            assert openai.json()["error"]["code"] == "context_length_exceeded"
            assert openai.json()["error"]["message"].startswith(f"This model's maximum context length is {CONTEXT_MAX}")

    run(work())


def test_overload_is_529_with_retry_after() -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.refusal = refusal(503, "overloaded")
            answer = await d.client.post("/v1/messages", json=body(stream=True))
            assert answer.status_code == 529
            assert answer.json()["error"]["type"] == "overloaded_error"
            assert answer.headers["retry-after"] == "7"
            d.mind.refusal = refusal(429, "rate")
            assert (await d.client.post("/v1/messages", json=body())).json()["error"]["type"] == "rate_limit_error"

    run(work())


def test_an_error_behind_the_first_token_is_an_event() -> None:
    async def work() -> None:
        async with desk() as d, sdk(d) as client:
            d.mind.attempts_max = 1

            async def consume() -> None:
                async with client.messages.stream(**body()) as stream:
                    async for _ in stream:
                        pass

            running = asyncio.create_task(consume())
            attempt = await d.fleet.next()
            attempt.start()
            attempt.say([65])
            await asyncio.sleep(0.01)
            attempt.sink.lost("gone")
            with pytest.raises(anthropic.APIStatusError):
                await running

    run(work())


def test_claude_code_finds_somebody_at_the_root_and_any_version_will_do() -> None:
    async def work() -> None:
        async with desk() as d:
            assert (await d.client.head("/")).status_code == 200
            huge = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n"
            assert b'"request_too_large"' in await d.raw(huge)
            d.fleet.answer = speak("x")
            headers = {"anthropic-version": "2099-01-01", "anthropic-beta": "no-such-thing", "x-api-key": "k"}
            assert (await d.client.post("/v1/messages", json=body(), headers=headers)).status_code == 200
            unknown = await d.client.get("/v1/nothing", headers=headers)
            assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
            model = await d.client.get("/v1/models/nothing", headers=headers)
            assert (model.status_code, model.json()["type"]) == (404, "error")

    run(work())


def test_models_are_found_by_anthropics_sdk() -> None:
    async def work() -> None:
        async with desk() as d, sdk(d) as client:
            page = await client.models.list(limit=1)
            assert [model.id for model in page.data] == ["tiny"]
            assert (await client.models.retrieve("tiny")).display_name == "tiny"

    run(work())


def test_only_so_many_prompts_are_counted_at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counting, most, lock = 0, 0, Lock()
    tokenise = Text.tokenise

    def slow(text: Text, cold: Any) -> Any:
        nonlocal counting, most
        with lock:
            counting, most = counting + 1, max(most, counting + 1)
        time.sleep(0.01)
        with lock:
            counting -= 1
        return tokenise(text, cold)

    monkeypatch.setattr(Text, "tokenise", slow)

    async def work() -> None:
        async with desk() as d:
            bodies = [body(messages=[{"role": "user", "content": f"{number}"}]) for number in range(COUNTS_MAX * 3)]
            sent = [d.client.post("/v1/messages/count_tokens", json=one) for one in bodies]
            answers = await asyncio.gather(*sent)
            assert {answer.status_code for answer in answers} == {200}

    run(work())
    assert 1 <= most <= COUNTS_MAX
