"""Answers that outlive their client: finished when asked for, and sent again to who comes back with the same key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from policies.request import Tenant
from router.delivery.kept import KeptAnswers, KeptLimits
from tests.router.desk import Desk, chat, desk, ids_of, keyless, run, speak

KEY = {"idempotency-key": "turn-1"}
FINISH = {"x-headway-on-disconnect": "finish"}


async def ask(
    d: Desk, body: dict[str, Any], headers: dict[str, str]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request on a bare socket, so that the test can drop it."""
    data = json.dumps(body).encode()
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{lines}content-length: {len(data)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(*d.address)
    writer.write(head.encode() + data)
    return reader, writer


async def again(d: Desk, body: dict[str, Any], headers: dict[str, str] = KEY) -> httpx.Response:
    """The same bytes as `ask` sends."""
    return await d.client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)


def without_ids(stream: str) -> list[Any]:
    return [json.loads(line[6:])["choices"] for line in stream.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("headers", [KEY, FINISH])
@pytest.mark.parametrize("phase", ["held", "prefill", "decode"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_an_answer_is_finished_without_its_client_if_that_was_asked_for(
    headers: dict[str, str], phase: str, is_stream: bool
) -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.holds = phase == "held"
            _, writer = await ask(d, chat(stream=is_stream), headers)
            if phase == "held":
                await d.until(lambda: bool(d.mind.tokens))
                writer.transport.abort()
                await d.until(lambda: not d.listener.connection_count)
                d.mind.place(d.mind.offered[0].id)
            attempt = await d.fleet.next()
            if phase == "decode":
                attempt.start()
                attempt.say(ids_of("some"))
            writer.transport.abort()
            await d.until(lambda: not d.listener.connection_count)
            if phase != "decode":
                attempt.start()
            attempt.say(ids_of("thing"))
            attempt.end()
            await d.settled()
            assert (d.receipts[0].outcome, attempt.aborted, d.mind.gone_ids) == ("finished", "", [])

    run(work())


@pytest.mark.parametrize("is_stream", [True, False])
def test_the_same_key_gets_the_same_answer_and_nothing_is_computed_again(is_stream: bool) -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("an answer")
            body = chat(stream=is_stream)
            first, second = await again(d, body), await again(d, body)
            assert (first.status_code, second.status_code) == (200, 200)
            assert first.content == second.content
            assert first.headers["x-headway-request"] == second.headers["x-headway-request"]
            assert "x-headway-notice" not in first.headers
            assert "joined" in second.headers["x-headway-notice"]
            assert len(d.mind.offered) == 1

    run(work())


def test_who_comes_back_in_the_middle_of_a_stream_gets_its_beginning_and_its_end() -> None:
    async def work() -> None:
        async with desk() as d:
            body = chat(stream=True)
            reader, writer = await ask(d, body, KEY)
            attempt = await d.fleet.next()
            attempt.start()
            attempt.say(ids_of("begin"))
            await reader.readuntil(b"begin")
            writer.transport.abort()
            joining = asyncio.create_task(again(d, body))
            await d.until(lambda: len(d.listener.tasks) == 2)
            attempt.say(ids_of("ning"))
            attempt.end()
            answer = await joining
            text = "".join(choice[0]["delta"].get("content", "") for choice in without_ids(answer.text))
            assert (text, answer.text.endswith("data: [DONE]\n\n")) == ("beginning", True)

    run(work())


def test_two_who_read_one_answer_both_get_all_of_it_and_one_may_leave() -> None:
    async def work() -> None:
        async with desk() as d:
            body = chat(stream=False)
            first = asyncio.create_task(again(d, body))
            attempt = await d.fleet.next()
            _, leaver = await ask(d, body, KEY)
            second = asyncio.create_task(again(d, body))
            await d.until(lambda: len(d.listener.tasks) == 3)
            leaver.transport.abort()
            await d.until(lambda: len(d.listener.tasks) == 2)
            attempt.start()
            attempt.say(ids_of("both"))
            attempt.end()
            answers = await asyncio.gather(first, second)
            assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == ["both", "both"]

    run(work())


def test_a_key_with_another_request_is_refused() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("an answer")
            await again(d, chat("this"))
            answer = await again(d, chat("that"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "idempotency_mismatch")

    run(work())


def test_what_did_not_end_well_is_tried_again() -> None:
    async def work() -> None:
        async with desk() as d:
            refused = await again(d, chat("x" * 5000))
            assert refused.status_code == 400
            d.fleet.answer = lambda attempt: attempt.end("error", "broke")
            assert (await again(d, chat())).status_code == 500
            d.fleet.answer = speak("an answer")
            answer = await again(d, chat())
            assert (answer.status_code, "x-headway-notice" in answer.headers) == (200, False)

    run(work())


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-headway-on-disconnect": "stay"}, "x-headway-on-disconnect"),
        ({"idempotency-key": ""}, "Idempotency-Key"),
        ({"idempotency-key": "k" * 256}, "Idempotency-Key"),
    ],
)
def test_a_wish_that_cannot_be_understood_is_refused_by_name(headers: dict[str, str], param: str) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await again(d, chat(), headers)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    run(work())


def test_abort_wins_over_a_key() -> None:
    async def work() -> None:
        async with desk() as d:
            _, writer = await ask(d, chat(), KEY | {"x-headway-on-disconnect": "abort"})
            attempt = await d.fleet.next()
            writer.transport.abort()
            await d.settled()
            assert attempt.aborted == "client gone"

    run(work())


class Now:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


@asynccontextmanager
async def kept(limits: KeptLimits, now: Now) -> AsyncIterator[tuple[Desk, KeptAnswers]]:
    answers = KeptAnswers(limits, now)
    async with desk(kept=answers) as d:
        d.fleet.answer = speak("an answer")
        yield d, answers


def test_answers_are_kept_for_a_while_and_within_bounds() -> None:
    async def work() -> None:
        now = Now()
        async with kept(KeptLimits(answers_max=2, kept_s=10.0), now) as (d, answers):
            for number in range(4):
                await again(d, chat(), {"idempotency-key": str(number)})
            assert len(answers) == 2
            held = answers.bytes_held
            assert held > 100
            assert "x-headway-notice" in (await again(d, chat(), {"idempotency-key": "3"})).headers
            assert "x-headway-notice" not in (await again(d, chat(), {"idempotency-key": "0"})).headers
            now.s = 10.5
            assert "x-headway-notice" not in (await again(d, chat(), {"idempotency-key": "3"})).headers
            assert (len(answers), answers.joined) == (1, 1)
        async with kept(KeptLimits(bytes_max=held - 1), Now()) as (d, answers):
            for number in range(3):
                await again(d, chat(), {"idempotency-key": str(number)})
            assert answers.bytes_held < held

    run(work())


def test_an_answer_too_long_to_be_kept_says_so() -> None:
    async def work() -> None:
        async with kept(KeptLimits(answer_bytes_max=10), Now()) as (d, _):
            assert (await again(d, chat())).status_code == 200
            answer = await again(d, chat())
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "answer_too_long")

    run(work())


def test_a_key_is_its_organisations_own() -> None:
    async def work() -> None:
        answers = KeptAnswers()
        for organisation in ("a", "b"):
            async with desk(kept=answers, tenants=keyless(Tenant(organisation=organisation))) as d:
                d.fleet.answer = speak(f"for {organisation}")
                answer = await again(d, chat())
                assert answer.json()["choices"][0]["message"]["content"] == f"for {organisation}"

    run(work())
