"""Several answers to one request: each its own to mind and worker, one response to the client. Log-probabilities."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine.wire import Scored
from tests.router.desk import MARKS, Attempt, Desk, chat, desk, ids_of, refusal, run


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def ask(d: Desk, path: str, body: dict[str, Any]) -> Any:
    return asyncio.create_task(d.client.post(path, json=body))


async def attempts(d: Desk, count: int) -> list[Attempt]:
    return [await d.fleet.next() for _ in range(count)]


WORDS = ("eins", "zwei zwei", "drei")


def serve(attempt: Attempt, text: str, cached_tokens: int = 0) -> None:
    attempt.start(cached_tokens)
    attempt.say(ids_of(text))
    attempt.end("stop")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_whole_response_holds_every_answer_in_order_and_counts_the_prompt_once(path: str) -> None:
    async def work() -> None:
        async with desk() as d:
            body = chat(n=3, seed=40) if "chat" in path else {"model": "tiny", "prompt": "hi", "n": 3, "seed": 40}
            asked = await ask(d, path, body)
            voices = await attempts(d, 3)
            for number in (2, 0, 1):
                serve(voices[number], WORDS[number], cached_tokens=number)
            answer = (await asked).json()

            assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
            texts = [choice["message"]["content"] if "chat" in path else choice["text"] for choice in answer["choices"]]
            assert texts == list(WORDS)
            assert answer["usage"]["completion_tokens"] == sum(len(ids_of(word)) for word in WORDS)
            assert answer["usage"]["prompt_tokens"] == len(voices[0].ids)
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert [voice.order.sampling.seed for voice in voices] == [40, 41, 42]
            assert len({voice.order.ids for voice in voices}) == 1
            assert len({request.id for request in d.mind.offered}) == 3

    run(work())


def test_a_stream_interleaves_the_answers_and_ends_once() -> None:
    async def work() -> None:
        async with desk() as d:
            body = chat(n=3, stream=True, stream_options={"include_usage": True})
            asked = await ask(d, "/v1/chat/completions", body)
            voices = await attempts(d, 3)
            for voice in voices:
                voice.start()
            for at in range(9):
                for voice, word in zip(voices, WORDS, strict=True):
                    voice.say(ids_of(word)[at : at + 1])
                await asyncio.sleep(0)
            for voice in voices:
                voice.end("length")
            response = await asked
            *chunks, usage, done = events(response.text)

            assert done == "[DONE]"
            assert usage["usage"]["completion_tokens"] == sum(len(ids_of(word)) for word in WORDS)
            for index, word in enumerate(WORDS):
                mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
                assert mine[0]["delta"]["role"] == "assistant"
                assert "".join(choice["delta"].get("content", "") for choice in mine) == word
                assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]
            assert len({chunk["id"] for chunk in chunks}) == 1
            assert response.headers["x-headway-request"] in chunks[0]["id"]
            assert [receipt.outcome for receipt in d.receipts] == ["finished"] * 3

    run(work())


@pytest.mark.parametrize("prompts", [["red", "blue sea"], [ids_of("red"), ids_of("blue sea")]])
def test_several_prompts_are_answered_in_one_response_each_as_if_it_were_alone(prompts: list[Any]) -> None:
    async def work() -> None:
        async with desk() as d:
            body = {"model": "tiny", "prompt": prompts, "n": 2, "seed": 7, "echo": True}
            asked = await ask(d, "/v1/completions", body)
            voices = await attempts(d, 4)
            for number in (3, 0, 2, 1):
                serve(voices[number], f" {number}{WORDS[0]}")
            answer = (await asked).json()

            said = [(choice["index"], choice["text"]) for choice in answer["choices"]]
            assert said == [(0, "red 0eins"), (1, "red 1eins"), (2, "blue sea 2eins"), (3, "blue sea 3eins")]
            assert [list(voice.ids) for voice in voices] == [ids_of("red")] * 2 + [ids_of("blue sea")] * 2
            assert [voice.order.sampling.seed for voice in voices] == [7, 8, 7, 8]
            assert answer["usage"]["prompt_tokens"] == len(ids_of("red")) + len(ids_of("blue sea"))
            assert answer["usage"]["completion_tokens"] == 4 * len(ids_of(f" 0{WORDS[0]}"))
            assert {request.facts.prompt_count for request in d.mind.offered} == {2}

    run(work())


def test_a_stream_of_several_prompts_begins_each_with_its_echo() -> None:
    async def work() -> None:
        async with desk() as d:
            body = {"model": "tiny", "prompt": ["red", "blue"], "stream": True, "echo": True}
            asked = await ask(d, "/v1/completions", body)
            for voice in await attempts(d, 2):
                serve(voice, " sky")
            *chunks, done = events((await asked).text)

            assert done == "[DONE]"
            for index, prompt in enumerate(("red", "blue")):
                mine = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == index]
                assert mine[0].startswith(prompt)
                assert "".join(mine) == f"{prompt} sky"

    run(work())


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": ["a", 7]}, "prompt"),
        ({"prompt": [[1, 2], []]}, "prompt"),
        ({"prompt": [[1, "b"]]}, "prompt"),
        ({"suffix": "b"}, "suffix"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_before_anything_runs(change: dict[str, Any], param: str) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.post("/v1/completions", json={"model": "tiny", "prompt": "a", **change})

            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param
            assert not d.mind.offered

    run(work())


def test_a_stop_string_ends_its_own_answer_alone() -> None:
    async def work() -> None:
        async with desk() as d:
            asked = await ask(d, "/v1/chat/completions", chat(n=2, stop=["!"]))
            first, second = await attempts(d, 2)
            first.start()
            first.say(ids_of("one!two"))
            assert first.aborted
            assert not second.aborted
            serve(second, "other")
            answer = (await asked).json()
            assert [choice["message"]["content"] for choice in answer["choices"]] == ["one", "other"]

    run(work())


def test_an_error_before_any_answer_is_the_response_and_ends_the_others() -> None:
    async def work() -> None:
        async with desk() as d:
            asked = await ask(d, "/v1/chat/completions", chat(n=3))
            voices = await attempts(d, 3)
            voices[1].end("invalid", "no such thing")
            response = await asked
            assert response.status_code == 400
            assert voices[0].aborted
            assert voices[2].aborted
            await d.until(lambda: len(d.receipts) == 3)
            assert sorted(receipt.outcome for receipt in d.receipts) == ["cancelled", "cancelled", "refused"]

    run(work())


def test_a_refused_first_answer_starts_no_others() -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.refusal = refusal(503, "full")
            response = await d.client.post("/v1/chat/completions", json=chat(n=4))
            assert response.status_code == 503
            assert len(d.mind.offered) == 1

    run(work())


def test_a_fault_in_a_stream_is_an_error_event_and_never_a_proper_end() -> None:
    async def work() -> None:
        async with desk() as d:
            asked = await ask(d, "/v1/chat/completions", chat(n=2, stream=True))
            first, second = await attempts(d, 2)
            first.start()
            first.say(ids_of("a"))
            await asyncio.sleep(0.01)
            second.end("error")
            first.end("stop")
            told = events((await asked).text)
            assert any("error" in event for event in told)
            assert "[DONE]" not in told

    run(work())


def test_a_client_that_leaves_takes_all_its_answers_along() -> None:
    async def work() -> None:
        async with desk() as d:
            asked = await ask(d, "/v1/chat/completions", chat(n=3, stream=True))
            voices = await attempts(d, 3)
            asked.cancel()
            await d.until(lambda: len(d.receipts) == 3)
            assert all(voice.aborted for voice in voices)

    run(work())


def scored(text: str) -> list[Scored]:
    return [
        Scored(0, token, -0.5 - at, (token, MARKS["end"]), (-0.5 - at, float("-inf")))
        for at, token in enumerate(ids_of(text))
    ]


def test_chat_tells_log_probabilities_of_every_token() -> None:
    async def work() -> None:
        async with desk() as d:
            for stream in (False, True):
                body = chat(logprobs=True, top_logprobs=2, stream=stream)
                asked = await ask(d, "/v1/chat/completions", body)
                (voice,) = await attempts(d, 1)
                assert voice.order.sampling.logprobs == 2
                voice.start()
                for token, score in zip(ids_of("Aé"), scored("Aé"), strict=True):
                    voice.sink.scored([score])
                    voice.say([token])
                    await asyncio.sleep(0)
                voice.sink.scored([Scored(0, MARKS["end"], -1.0)])
                voice.say([MARKS["end"]])
                voice.end("stop")
                response = await asked
                choices = [event["choices"][0] for event in events(response.text) if event != "[DONE]"]
                told = choices if stream else [response.json()["choices"][0]]
                content = [one for choice in told if choice["logprobs"] for one in choice["logprobs"]["content"]]
                assert [one["logprob"] for one in content] == [
                    -0.5,
                    -1.5,
                    -2.5,
                ]  # its end is none
                assert bytes(byte for one in content for byte in one["bytes"]).decode() == "Aé"
                assert content[0]["top_logprobs"] == [
                    {"token": "A", "logprob": -0.5, "bytes": [65]},
                    {"token": "", "logprob": -9999.0, "bytes": []},
                ]

    run(work())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["red", ids_of("red")])
def test_an_echo_tells_the_prompts_log_probabilities_before_the_answers(stream: bool, prompt: Any) -> None:
    async def work() -> None:
        async with desk() as d:
            body = {"model": "tiny", "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 1, "stream": stream}
            asked = await ask(d, "/v1/completions", body)
            (voice,) = await attempts(d, 1)
            assert (voice.order.sampling.logprobs, voice.order.sampling.prompt_logprobs) == (2, True)
            voice.start()
            voice.sink.scored(scored("ed!"))
            voice.say(ids_of("!"))
            voice.end("length")
            response = await asked
            parts = (
                [each["choices"][0] for each in events(response.text) if each != "[DONE]"]
                if stream
                else [response.json()["choices"][0]]
            )

            assert "".join(part["text"] for part in parts) == "red!"
            (told,) = [part["logprobs"] for part in parts if part["logprobs"]]
            assert told["tokens"] == ["r", "e", "d", "!"]
            assert told["token_logprobs"] == [None, -0.5, -1.5, -2.5]
            assert told["top_logprobs"][:2] == [None, {"e": -0.5, "": -9999.0}]
            assert told["text_offset"] == [0, 1, 2, 3]

    run(work())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_openais_dialects_name_the_weights_of_each_run_of_tokens(path: str, stream: bool) -> None:
    async def work() -> None:
        async with desk() as d:
            body = chat(stream=stream) if "chat" in path else {"model": "tiny", "prompt": "hi", "stream": stream}
            d.mind.attempts_max = 3
            asked = await ask(d, path, body)
            for version, word in ((0, "one "), (3, "two "), (4, "three")):
                (voice,) = await attempts(d, 1)
                voice.start()
                voice.say(ids_of(word))
                await asyncio.sleep(0.01)
                if version < 4:
                    d.fleet.weights_version = 4 if version else 3
                    voice.sink.lost("other weights")
            voice.end("stop")
            response = await asked
            if not stream:
                assert response.json()["system_fingerprint"] == "weights-3+weights-4"
                return
            said: dict[str | None, str] = {}
            for event in events(response.text)[:-1]:
                choice = event["choices"][0]
                text = choice["delta"].get("content", "") if "chat" in path else choice["text"]
                mark = event.get("system_fingerprint")
                said[mark] = said.get(mark, "") + text
            assert said == {None: "one ", "weights-3": "two ", "weights-4": "three"}

    run(work())


def test_completions_tell_log_probabilities_in_columns() -> None:
    async def work() -> None:
        async with desk() as d:
            body = {"model": "tiny", "prompt": "x", "logprobs": 1}
            asked = await ask(d, "/v1/completions", body)
            (voice,) = await attempts(d, 1)
            voice.start()
            voice.sink.scored(scored("abc"))
            voice.say(ids_of("abc"))
            voice.end("length")
            logprobs = (await asked).json()["choices"][0]["logprobs"]
            assert logprobs["tokens"] == ["a", "b", "c"]
            assert logprobs["token_logprobs"] == [-0.5, -1.5, -2.5]
            assert logprobs["text_offset"] == [0, 1, 2]
            assert [top[token] for top, token in zip(logprobs["top_logprobs"], "abc", strict=True)] == [
                -0.5,
                -1.5,
                -2.5,
            ]

    run(work())
