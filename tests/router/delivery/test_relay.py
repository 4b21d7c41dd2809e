"""One request's life: every one ends exactly once, nothing is sent before its time, nobody's tokens are lost."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from policies.request import RequestClass
from router.delivery.order import RelayLimits
from router.dialects.chat import ChatEncoder
from router.language.text import Text, TextLimits
from router.listener.server import ListenerLimits
from tests.router.desk import VOCABULARY, Desk, chat, desk, ids_of, refusal, run, speak


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def content(text: str) -> str:
    chunks = [event for event in events(text) if event != "[DONE]" and event.get("choices")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_a_stream_carries_every_character_and_ends_properly() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("Grüße, 世界 🌍!", cached_tokens=3)
            body = chat(stream=True, stream_options={"include_usage": True})
            answer = await d.client.post("/v1/chat/completions", json=body)
            *_, finish, usage, done = events(answer.text)
            assert content(answer.text) == "Grüße, 世界 🌍!"
            assert "�" not in answer.text
            assert finish["choices"][0]["finish_reason"] == "stop"
            assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
            assert usage["usage"]["completion_tokens"] == len(ids_of("Grüße, 世界 🌍!"))
            assert done == "[DONE]"
            assert answer.headers["x-headway-class"] == "chatbot+"
            assert answer.headers["x-headway-worker"] == "w0"
            assert answer.headers["x-headway-class-reason"] == "default"
            assert [receipt.outcome for receipt in d.receipts] == ["finished"]

    run(work())


def test_a_whole_answer_has_openais_shape() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("hello", reason="length")
            answer = (await d.client.post("/v1/chat/completions", json=chat())).json()
            assert answer["object"] == "chat.completion"
            assert answer["choices"][0]["message"] == {"role": "assistant", "content": "hello", "refusal": None}
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 5

    run(work())


@pytest.mark.parametrize("is_stream", [True, False])
def test_completions_continue_text_and_ids_alike(is_stream: bool) -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak(" world")
            for prompt in ("hello", ids_of("hello"), ["hello"], [ids_of("hello")]):
                body = {"model": "tiny", "prompt": prompt, "stream": is_stream}
                answer = await d.client.post("/v1/completions", json=body)
                texts = (
                    [event["choices"][0]["text"] for event in events(answer.text) if event != "[DONE]"]
                    if is_stream
                    else [answer.json()["choices"][0]["text"]]
                )
                assert "".join(texts) == " world"
                assert (await d.fleet.next()).ids == ids_of("hello")

    run(work())


def test_a_stop_string_spelt_over_tokens_cuts_the_answer_and_frees_the_worker() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("one STOP two")
            answer = await d.client.post("/v1/chat/completions", json=chat(stream=True, stop=["STOP"]))
            assert content(answer.text) == "one "
            assert events(answer.text)[-1] == "[DONE]"
            assert (await d.fleet.next()).aborted == "stop string"
            (request,) = d.mind.offered
            assert d.mind.stops[request.id] > 0
            assert d.mind.gone_ids == []

    run(work())


def test_text_that_only_begins_a_stop_string_is_not_lost() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("one STO")
            answer = await d.client.post("/v1/chat/completions", json=chat(stop="STOP"))
            assert answer.json()["choices"][0]["message"]["content"] == "one STO"

    run(work())


def test_an_answer_that_ends_inside_a_character_shows_it() -> None:
    async def work() -> None:
        async with desk() as d:

            def answer(attempt: Any) -> None:
                attempt.start()
                attempt.say(ids_of("é")[:1])
                attempt.end("length")

            d.fleet.answer = answer
            response = await d.client.post("/v1/chat/completions", json=chat())
            assert response.json()["choices"][0]["message"]["content"] == "�"

    run(work())


def test_classes_that_nobody_watches_are_sent_in_fewer_events_with_the_same_text() -> None:
    async def work() -> None:
        async with desk(relay_limits=RelayLimits(coalesce_tokens=8, coalesce_s=1000)) as d:
            d.mind.request_class = RequestClass.DATA_PROCESSOR
            d.fleet.answer = speak("x" * 64)
            answer = await d.client.post("/v1/chat/completions", json=chat(stream=True))
            assert content(answer.text) == "x" * 64
            assert len(events(answer.text)) < 16

    run(work())


def test_steps_that_are_read_together_leave_together_and_others_at_once() -> None:
    async def work() -> None:
        async with desk() as d:
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat(stream=True)))
            attempt = await d.fleet.next()
            attempt.start()
            for burst in ("a", "bcd", "e"):
                for token in ids_of(burst):
                    attempt.say([token])
                await asyncio.sleep(0)
            attempt.end()
            chunks = [event for event in events((await asking).text)[1:-2] if event["choices"]]
            assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["a", "bcd", "e"]

    run(work())


@pytest.mark.parametrize("inline_chars", [0, 1_000_000])
def test_a_fault_of_the_router_is_an_answer_and_an_end(monkeypatch: pytest.MonkeyPatch, inline_chars: int) -> None:
    async def work() -> None:
        async with desk(text_limits=TextLimits(inline_chars_max=inline_chars)) as d:
            monkeypatch.setattr(Text, "tokenise", lambda *_: 1 / 0)
            answer = await d.client.post("/v1/chat/completions", json=chat())
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "internal_error"
            assert d.receipts[0].outcome == "failed"
            assert not d.mind.clients

    run(work())


def test_a_fault_at_the_flush_ends_its_own_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = ChatEncoder.delta

    def fragile(encoder: ChatEncoder, text: str) -> bytes:
        assert text != "bad"
        return delta(encoder, text)

    async def work() -> None:
        monkeypatch.setattr(ChatEncoder, "delta", fragile)
        async with desk() as d:
            asking = [asyncio.create_task(d.client.post("/v1/chat/completions", json=chat(stream=True))) for _ in "ab"]
            ill, well = await d.fleet.next(), await d.fleet.next()
            for attempt, text in ((ill, "bad"), (well, "good")):
                attempt.start()
                for token in ids_of(text):
                    attempt.say([token])
            await d.until(lambda: bool(d.receipts))
            well.end()
            answers = sorted([await answer for answer in asking], key=lambda answer: answer.status_code)
            assert content(answers[0].text) == "good"
            assert answers[1].status_code == 500
            assert ill.aborted == "router fault"

    run(work())


def test_a_refusal_says_when_to_come_back_and_carries_its_class() -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.refusal = refusal(503, "patience")
            answer = await d.client.post("/v1/chat/completions", json=chat())
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "7"
            assert answer.headers["retry-after-ms"] == "7000"
            assert answer.headers["x-headway-class"] == "chatbot+"
            assert answer.json()["error"]["code"] == "patience"
            assert d.receipts[0].outcome == "refused"

    run(work())


def test_a_receipt_tells_of_room_that_was_kept() -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.refusal = replace(refusal(503, "patience"), is_reserved=True)
            await d.client.post("/v1/chat/completions", json=chat())
            d.mind.refusal = refusal(503, "patience")
            await d.client.post("/v1/chat/completions", json=chat())
            assert [receipt.reservation for receipt in d.receipts] == ["made", ""]

    run(work())


def test_a_worker_lost_before_the_first_token_is_invisible() -> None:
    async def work() -> None:
        async with desk() as d:
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat(stream=True)))
            (await d.fleet.next()).sink.lost("killed")
            speak("fine")(await d.fleet.next())
            answer = await asking
            assert content(answer.text) == "fine"
            assert d.receipts[0].attempts == 2

    run(work())


@pytest.mark.parametrize("cut", range(1, len("Grüße 🌍".encode())))
def test_a_stream_goes_on_elsewhere_from_the_tokens_that_were_sent(cut: int) -> None:
    async def work() -> None:
        async with desk() as d:
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat(stream=True)))
            first, ids = await d.fleet.next(), ids_of("Grüße 🌍")
            first.start()
            for token in ids[:cut]:
                first.say([token])
            first.sink.lost("killed")
            second = await d.fleet.next()
            assert second.ids == first.ids + ids[:cut]
            assert second.order.prompt_len == len(first.ids)
            assert second.order.sampling.seed == first.order.sampling.seed
            second.say(ids[cut:])
            second.end()
            answer = await asking
            assert content(answer.text) == "Grüße 🌍"
            assert events(answer.text)[-1] == "[DONE]"

    run(work())


def test_a_stream_that_cannot_go_on_ends_with_an_error_and_never_with_done() -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.attempts_max = 1
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat(stream=True)))
            attempt = await d.fleet.next()
            attempt.start()
            attempt.say(ids_of("half"))
            await asyncio.sleep(0)  # what came in one go is sent behind it
            attempt.sink.lost("killed")
            answer = await asking
            last = events(answer.text)[-1]
            assert last["error"]["code"] == "attempts"
            assert "[DONE]" not in answer.text
            assert '"finish_reason":"' not in answer.text
            assert d.receipts[0].outcome == "failed"

    run(work())


def test_broken_logits_fail_that_request_alone() -> None:
    async def work() -> None:
        async with desk() as d:
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat()))
            (await d.fleet.next()).end("error", "logits are not finite")
            answer = await asking
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "engine_error"

    run(work())


async def leave(d: Desk, body: dict[str, Any]) -> asyncio.StreamWriter:
    """A request on a bare socket, so that the test can drop it."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    _, writer = await asyncio.open_connection(*d.address)
    writer.write(head.encode() + data)
    return writer


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("phase", ["held", "prefill", "decode"])
def test_a_client_that_leaves_in_any_phase_frees_everything(phase: str, is_stream: bool) -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.holds = phase == "held"
            writer = await leave(d, chat(stream=is_stream))
            attempt = None
            if phase != "held":
                attempt = await d.fleet.next()
            else:
                await d.until(lambda: bool(d.mind.tokens))
            if attempt is not None and phase == "decode":
                attempt.start()
                attempt.say(ids_of("some"))
            writer.transport.abort()
            await d.settled()
            assert d.receipts[0].outcome == "cancelled"
            assert d.mind.gone_ids == [d.mind.offered[0].id]
            assert attempt is None or attempt.aborted == "client gone"
            assert not d.listener.tasks

    run(work())


def test_a_stream_that_waits_long_commits_early_and_later_errors_come_in_it() -> None:
    async def work() -> None:
        async with desk(relay_limits=RelayLimits(commit_after_s=0.01, heartbeat_s=0.01)) as d:
            d.mind.holds = True
            async with d.client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
                lines = answer.aiter_lines()
                assert (await anext(lines)).startswith(":")
                request_id = d.mind.offered[0].id
                d.mind.clients.pop(request_id).reject(refusal(503, "patience"))
                rest = [line async for line in lines if line.startswith("data: ")]
            assert answer.status_code == 200
            assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "patience"

    run(work())


def test_a_client_that_reads_nothing_costs_bounded_memory_and_is_cut() -> None:
    async def work() -> None:
        limits = ListenerLimits(unsent_bytes_max=4096, undrained_s=0.05, sweep_s=0.02)
        async with desk(listener_limits=limits) as d:
            writer = await leave(d, chat(stream=True))
            writer.transport.pause_reading()
            attempt = await d.fleet.next()
            attempt.start()
            sent = 0
            while not attempt.aborted and sent < 200_000:
                attempt.say(ids_of("a long line of text"))
                sent += 1
                await asyncio.sleep(0)
            assert attempt.aborted == "client gone"
            assert d.receipts[0].outcome == "cancelled"
            writer.close()

    run(work())


def test_a_prompt_beyond_the_context_gets_the_words_that_agents_look_for() -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.post("/v1/chat/completions", json=chat("x" * 5000))
            error = answer.json()["error"]
            assert answer.status_code == 400
            assert error["code"] == "context_length_exceeded"
            assert "maximum context length is 4096 tokens. However, your messages resulted in 50" in error["message"]
            assert d.mind.gone_ids

    run(work())


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            monkeypatch.setattr(Text, "tokenise", None)  # a call would be a 500
            for stream in (True, False):
                answer = await d.client.post("/v1/chat/completions", json=chat("x" * 1_000_000, stream=stream))
                assert answer.status_code == 400
                assert "your messages resulted in 250" in answer.json()["error"]["message"]  # about a fourth of it
            # One whose tokens might all be as long as the longest is counted.
            monkeypatch.undo()
            assert VOCABULARY.token_chars_max == len("<|im_start|>")
            answer = await d.client.post("/v1/chat/completions", json=chat("x" * 4000 * VOCABULARY.token_chars_max))
            assert "your messages resulted in 480" in answer.json()["error"]["message"]

    run(work())


def test_an_answer_of_calls_alone_and_a_tool_that_said_nothing_are_messages() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": None}]

    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            body = chat() | {"messages": [*chat()["messages"], *said]}
            assert (await d.client.post("/v1/chat/completions", json=body)).status_code == 200

    run(work())


def test_max_tokens_beyond_the_room_left_is_clamped() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            await d.client.post("/v1/chat/completions", json=chat(max_tokens=64_000, min_tokens=60_000))
            attempt = await d.fleet.next()
            room = 4096 - len(attempt.ids)
            assert attempt.order.sampling.max_tokens == room
            assert attempt.order.sampling.min_tokens == room

    run(work())


def test_long_cold_prompts_are_tokenised_apart_and_give_the_same_ids() -> None:
    async def work() -> None:
        texts = ["word " * 200, "other " * 100]
        ids = []
        for inline_chars in (0, 1_000_000):
            async with desk(text_limits=TextLimits(inline_chars_max=inline_chars)) as d:
                d.fleet.answer = speak("ok")
                messages = [{"role": "user", "content": text} for text in texts]
                await d.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
                ids.append((await d.fleet.next()).ids)
        assert ids[0] == ids[1]

    run(work())


def test_a_moved_request_is_stopped_where_it_was() -> None:
    async def work() -> None:
        async with desk() as d:
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat()))
            first = await d.fleet.next()
            request_id = d.mind.offered[0].id
            d.mind.cancel(request_id)
            assert first.aborted == "moved"
            d.mind.place(request_id)
            speak("elsewhere")(await d.fleet.next())
            assert (await asking).json()["choices"][0]["message"]["content"] == "elsewhere"

    run(work())


def test_a_worker_that_cannot_be_reached_is_an_attempt_that_failed() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.is_lost = True
            answer: httpx.Response = await d.client.post("/v1/chat/completions", json=chat())
            assert answer.status_code == 503
            assert d.mind.failures == ["no link", "no link"]

    run(work())
