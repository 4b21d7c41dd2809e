"""Foreign engines: what they say reaches the client as it is; what goes wrong is retried unseen, or told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from router.access import keys
from router.delivery.order import RelayLimits
from router.settings.config import Upstream
from router.upstreams.fleet import MODELS_MAX
from router.upstreams.http1 import UpstreamLimits
from router.upstreams.relay import WEAKER
from tests.router.access.test_tenants import tenants_of
from tests.router.desk import DEADLINE_S, run
from tests.router.upstreams.scripted import (
    DONE,
    SSE_HEAD,
    WHOLE,
    Asked,
    Scripted,
    UpstreamDesk,
    chat,
    chunk,
    delta,
    say_abc,
    upstream_desk,
)


def at(scripted: Scripted, **fields: Any) -> Upstream:
    return Upstream(url=scripted.url, **fields)


def test_a_stream_passes_raw_and_the_receipt_says_what_is_weaker() -> None:
    async def work() -> None:
        async with Scripted() as one, upstream_desk(at(one)) as d:
            answer = await d.client.post("/v1/chat/completions", json=chat(stream=True))
            assert answer.status_code == 200
            assert answer.content == delta("a") + delta("b") + delta("c", "stop") + DONE
            assert answer.headers["x-headway-class"] == "chatbot+"
            assert answer.headers["x-headway-worker"] == one.url.removeprefix("http://")
            receipt = await d.settled()
            assert (receipt.outcome, receipt.output_tokens, receipt.attempts) == ("finished", 4, 1)
            assert receipt.weaker == f"{WEAKER}, tokens estimated"

    run(work())


def test_a_whole_answer_passes_raw_and_its_usage_is_the_receipts() -> None:
    async def work() -> None:
        async with Scripted() as one, upstream_desk(at(one)) as d:
            answer = await d.client.post("/v1/chat/completions", json=chat())
            assert answer.content == WHOLE
            assert answer.headers["content-type"] == "application/json"
            receipt = await d.settled()
            assert (receipt.prompt_tokens, receipt.cached_tokens, receipt.output_tokens) == (12, 4, 3)
            assert receipt.weaker == WEAKER

    run(work())


def test_the_upstream_gets_the_body_as_it_came_but_for_the_models_name_and_a_priority() -> None:
    async def work() -> None:
        async with Scripted(models=("there",)) as one:
            config = at(one, models={"here": "there"}, key_env="KEY", priority="vllm")
            async with upstream_desk(config, env={"KEY": "sk-upstream"}) as d:
                odd = {"whatever": [1e-9, {"deep": None}], "seed": 2**60}
                body = chat(model="here", **odd)
                headers = {"authorization": "Bearer client", "x-headway-class": "batch", "cookie": "a=b", "x-evil": "1"}
                await d.client.post("/v1/chat/completions", json=body, headers=headers)
                asked = one.asked[0]
                assert asked.json() == body | {"model": "there", "priority": 2}
                assert asked.headers["authorization"] == "bearer sk-upstream"
                assert set(asked.headers) == {"host", "content-type", "content-length", "accept", "authorization"}
                listed = (await d.client.get("/v1/models")).json()["data"]
                assert [(model["id"], model["max_model_len"]) for model in listed] == [("here", 4096)]
                assert (await d.client.post("/v1/chat/completions", json=chat(model="there"))).status_code == 404

    run(work())


@pytest.mark.parametrize(("window", "label"), [("24h", "data-processor"), ("9" * 5000 + "h", "background-agent")])
def test_a_declared_window_classes_a_passed_request_and_travels_as_it_came(window: str, label: str) -> None:
    async def work() -> None:
        async with Scripted() as one, upstream_desk(at(one)) as d:
            reply = await d.client.post("/v1/chat/completions", json=chat(completion_window=window))
            assert (reply.status_code, reply.headers["x-headway-class"]) == (200, label)
            assert one.asked[0].json()["completion_window"] == window

    run(work())


def test_a_model_that_is_null_is_one_that_is_not_named() -> None:
    async def work() -> None:
        async with Scripted(models=("there",)) as one, upstream_desk(at(one)) as d:
            answer = await d.client.post("/v1/chat/completions", json=chat(model=None))
            assert (answer.status_code, one.asked[0].json()["model"]) == (200, "there")

    run(work())


@pytest.mark.parametrize(
    ("path", "last", "reason"),
    [
        ("/v1/chat/completions", delta("c", "length") + DONE, "length"),
        ("/v1/chat/completions", delta("c", "tool_calls") + DONE, "calls"),
        (
            "/v1/messages",
            b'data: {"delta":{"stop_reason":"max_tokens"}}\n\nevent: message_stop\ndata: {}\n\n',
            "length",
        ),
        ("/v1/responses", b'event: response.incomplete\ndata: {"response":{"status":"incomplete"}}\n\n', "length"),
        ("/v1/responses", b'event: response.completed\ndata: {"response":{"status":"completed"}}\n\n', "stop"),
    ],
)
def test_a_receipt_says_why_a_stream_ended(path: str, last: bytes, reason: str) -> None:
    async def script(asked: Asked) -> None:
        await asked.stream(delta('a "finish_reason": "length" quoted'), last)

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one, routes=(path,))) as d:
            await d.client.post(path, json=chat(stream=True) | {"input": "x"})
            assert (await d.settled()).reason == reason

    run(work())


def test_a_receipt_says_why_a_whole_answer_ended() -> None:
    async def script(asked: Asked) -> None:
        await asked.reply(b'{"choices": [{"message": {"content": "c"}, "finish_reason": "length"}]}')

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            await d.client.post("/v1/chat/completions", json=chat())
            assert (await d.settled()).reason == "length"

    run(work())


def test_an_upstreams_answer_is_finished_without_its_client_and_sent_again() -> None:
    is_left = asyncio.Event()

    async def script(asked: Asked) -> None:
        await is_left.wait()
        await say_abc(asked)

    async def work() -> None:
        headers = {"idempotency-key": "k"}
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            first = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat(), headers=headers))
            await d.until(lambda: bool(one.asked))
            first.cancel()
            await d.until(lambda: not d.listener.connection_count)
            is_left.set()
            assert (await d.settled()).outcome == "finished"
            answer = await d.client.post("/v1/chat/completions", json=chat(), headers=headers)
            assert (answer.content, len(one.asked)) == (WHOLE, 1)

    run(work())


@pytest.mark.parametrize("step", [1, 3, 7])
def test_events_that_come_in_pieces_are_passed_on_whole(step: int) -> None:
    whole = delta("ä") + b": comment\n\n" + delta("\n\n[DONE]") + delta('"error"', "stop") + DONE

    async def script(asked: Asked) -> None:
        pieces = [whole[at : at + step] for at in range(0, len(whole), step)]
        await asked.stream(*pieces)

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            reply = await d.client.post("/v1/chat/completions", json=chat(stream=True))
            assert reply.content == whole
            await d.settled()

    run(work())


# Trouble before the first event: unseen -------------------------------------------------------------------------------


async def refuse(asked: Asked) -> None:
    await asked.reply(b'{"error": {"message": "no"}}', b"500 Internal Server Error")


async def busy(asked: Asked) -> None:
    await asked.reply(b"", b"503 Service Unavailable")


async def die(asked: Asked) -> None:
    asked.cut()


async def begin_and_die(asked: Asked) -> None:
    await asked.say(SSE_HEAD)
    asked.cut()


async def error_in_good_clothes(asked: Asked) -> None:
    if asked.json().get("stream"):
        await asked.stream(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n', DONE)
    else:
        await asked.reply(b'{"object": "error", "message": "out of memory"}')


async def babble(asked: Asked) -> None:
    await asked.say(b"I am no web server\r\n\r\n")


async def nothing_at_all(asked: Asked) -> None:
    await asked.stream()


TROUBLES = (refuse, busy, die, begin_and_die, error_in_good_clothes, babble, nothing_at_all)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_fails_before_its_first_event_is_served_by_another_upstream(trouble: Any, stream: bool) -> None:
    if trouble is nothing_at_all and not stream:
        pytest.skip("an empty whole answer is an answer")

    async def work() -> None:
        async with Scripted(trouble) as bad, Scripted() as good, upstream_desk(at(bad), at(good)) as d:
            for number in range(6):  # whichever comes first
                answer = await d.client.post("/v1/chat/completions", json=chat(f"{number}", stream=stream))
                assert answer.status_code == 200
                assert answer.content == (delta("a") + delta("b") + delta("c", "stop") + DONE if stream else WHOLE)
                await d.settled(number + 1)
            assert bad.asked
            assert max(receipt.attempts for receipt in d.receipts) == 2

    run(work())


def test_when_all_fail_the_client_is_told_with_a_status() -> None:
    async def work() -> None:
        async with Scripted(refuse) as one, Scripted(die) as two, upstream_desk(at(one), at(two)) as d:
            answer = await d.client.post("/v1/chat/completions", json=chat(stream=True))
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert (await d.settled()).outcome == "failed"

    run(work())


@pytest.mark.parametrize(
    ("status", "body", "seen", "code"),
    [
        (
            b"400 No",
            b'{"error": {"message": "too long", "code": "context_length_exceeded"}}',
            400,
            "context_length_exceeded",
        ),
        (b"400 No", b'{"object": "error", "message": "older", "code": 400}', 400, None),
        (b"422 No", b'{"detail": "fastapi"}', 422, None),
        (b"404 No", b"<html>", 404, None),
        (b"401 No", b'{"error": {"message": "key sk-router is wrong"}}', 502, "upstream_key"),
        (b"403 No", b"", 502, "upstream_key"),
        (b"302 Found", b"", 502, None),
        (b"400 No", b'{"error": {"message": "' + b"x" * 300_000 + b'"}}', 400, None),
    ],
)
def test_a_refusal_that_no_other_upstream_would_mend_is_told_within_bounds(
    status: bytes, body: bytes, seen: int, code: str | None
) -> None:
    async def work() -> None:
        async def script(asked: Asked) -> None:
            await asked.reply(body, status)

        async with Scripted(script) as one, Scripted(script) as two, upstream_desk(at(one), at(two)) as d:
            for path in ("/v1/chat/completions", "/v1/completions"):
                reply = await d.client.post(path, json=chat(prompt="x"))
                assert reply.status_code == seen
                assert reply.json()["error"]["code"] == code
                assert len(reply.content) <= 1024
                assert "sk-router" not in reply.text
            assert len(one.asked) + len(two.asked) == 2  # nobody tried again
            assert d.upstreams.up_count == 2

    run(work())


# Trouble after it: told -----------------------------------------------------------------------------------------------


async def say_one_and(asked: Asked, *then: bytes) -> None:
    await asked.say(SSE_HEAD, chunk(delta("a")), *[chunk(piece) for piece in then])


@pytest.mark.parametrize("then", [b"", b'data: {"half', b'data: {"error": {"message": "CUDA error"}}\n\n' + DONE])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_stream_that_breaks_ends_with_an_error_event_and_never_as_if_it_were_whole(path: str, then: bytes) -> None:
    async def script(asked: Asked) -> None:
        await say_one_and(asked, *([then] if then else []))
        asked.cut()

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one, routes=(path,))) as d:
            answer = await d.client.post(path, json=chat(stream=True, max_tokens=5))
            assert answer.status_code == 200
            assert answer.content.startswith(delta("a"))
            assert b"[DONE]" not in answer.content
            assert b"half" not in answer.content
            last = answer.text.removesuffix("\n\n").split("\n\n")[-1]
            assert last.startswith("event: error\ndata: " if path == "/v1/messages" else "data: ")
            assert "error" in json.loads(last.split("data: ", 1)[1])
            assert (await d.settled()).outcome == "failed"

    run(work())


def test_a_stream_that_ends_without_its_last_word_was_cut() -> None:
    async def script(asked: Asked) -> None:
        await asked.stream(delta("a"))

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            answer = await d.client.post("/v1/chat/completions", json=chat(stream=True))
            assert b"upstream_cut" in answer.content
            assert b"[DONE]" not in answer.content

    run(work())


def test_an_upstream_that_falls_silent_is_given_up() -> None:
    async def script(asked: Asked) -> None:
        await say_one_and(asked)
        await asked.gone.wait()

    async def work() -> None:
        limits = UpstreamLimits(idle_s=0.05)
        async with Scripted(script) as one, upstream_desk(at(one), limits=limits) as d:
            answer = await d.client.post("/v1/chat/completions", json=chat(stream=True))
            assert b"silent for 0.05 s" in answer.content

    run(work())


def test_an_event_without_end_and_an_answer_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.upstreams.relay.EVENT_BYTES_MAX", 1000)
    monkeypatch.setattr("router.upstreams.relay.WHOLE_BYTES_MAX", 1000)

    async def script(asked: Asked) -> None:
        if asked.json().get("stream"):
            await say_one_and(asked, b"data: " + b"x" * 2000)
            await asked.gone.wait()
        else:
            await asked.reply(b"x" * 2000)

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            streamed = await d.client.post("/v1/chat/completions", json=chat(stream=True))
            assert b"larger than this router takes" in streamed.content
            assert (await d.client.post("/v1/chat/completions", json=chat())).status_code == 503
            await d.settled(2)

    run(work())


# Clients that leave or lag --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["before the head", "before the first event", "in the stream"])
def test_a_client_that_leaves_closes_its_call(phase: str) -> None:
    async def script(asked: Asked) -> None:
        if phase != "before the head":
            await asked.say(SSE_HEAD)
        if phase == "in the stream":
            await asked.say(chunk(delta("a")))
        await asked.gone.wait()

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            reader, writer = await asyncio.open_connection(*d.address)
            body = json.dumps(chat(stream=True)).encode()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            writer.write(body)
            await d.until(lambda: bool(one.asked))
            if phase == "in the stream":
                await reader.readuntil(b"delta")
            writer.close()
            async with asyncio.timeout(DEADLINE_S):
                await one.asked[0].gone.wait()
            assert (await d.settled()).outcome == "cancelled"
            assert d.upstreams.up_count == 1

    run(work())


def test_a_client_that_reads_nothing_stops_the_reading_of_its_upstream_alone() -> None:
    said = [0]

    async def script(asked: Asked) -> None:
        await asked.say(SSE_HEAD)
        event = chunk(delta("x" * 60_000))
        while not asked.gone.is_set() and said[0] < 1000:
            asked.writer.write(event)
            await asked.writer.drain()
            said[0] += 1

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            reader, writer = await asyncio.open_connection(*d.address, limit=4096)
            body = json.dumps(chat(stream=True)).encode()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            writer.write(body)
            await reader.readuntil(b"delta")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            before = -1
            while said[0] != before:
                before = said[0]
                await asyncio.sleep(0.3)
            assert 0 < said[0] < 500  # 60 MB would have come, were it not paused
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            await d.until(lambda: said[0] > before)
            writer.close()
            await d.settled()

    run(work())


def test_a_stream_that_waits_long_commits_early_and_goes_on() -> None:
    async def script(asked: Asked) -> None:
        await release.wait()
        await say_abc(asked)

    release: asyncio.Event

    async def work() -> None:
        nonlocal release
        release = asyncio.Event()
        relay_limits = RelayLimits(commit_after_s=0.02, heartbeat_s=0.02)
        async with Scripted(script) as one, upstream_desk(at(one), relay_limits=relay_limits) as d:
            async with d.client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as reply:
                pieces = reply.aiter_bytes()
                waited = b""
                while waited.count(b": waiting\n\n") < 2:
                    waited += await anext(pieces)
                release.set()
                rest = b"".join([piece async for piece in pieces])
            assert rest.replace(b": waiting\n\n", b"") == delta("a") + delta("b") + delta("c", "stop") + DONE

    run(work())


# Places, routes, tenants ----------------------------------------------------------------------------------------------


def test_prompts_that_share_a_beginning_go_where_it_was() -> None:
    async def script(asked: Asked) -> None:
        while len(one.asked) + len(two.asked) < 2:  # noqa: ASYNC110 -- the first two run at one time: they part
            await asyncio.sleep(0.005)
        await say_abc(asked)

    one, two = Scripted(script), Scripted(script)

    async def work() -> None:
        async with one, two, upstream_desk(at(one), at(two)) as d:

            async def ask(family: str, turn: int) -> None:
                messages = [{"role": "user", "content": family * 3000}]
                messages += [{"role": "assistant", "content": f"{number}"} for number in range(turn)]
                answer = await d.client.post("/v1/chat/completions", json=chat() | {"messages": messages})
                assert answer.status_code == 200

            await asyncio.gather(ask("a", 0), ask("b", 0))
            for turn in range(1, 8):
                await ask("b", turn)
                await ask("a", turn)
            homes = [{asked.json()["messages"][0]["content"][0] for asked in each.asked} for each in (one, two)]
            assert sorted(map(sorted, homes)) == [["a"], ["b"]]

    run(work())


def test_work_goes_where_the_engine_says_that_it_is_idle() -> None:
    busy_metrics = b'# HELP x\nvllm:num_requests_running{model_name="m"} 90.0\nvllm:num_requests_waiting{e="0"} 30\n'
    idle_metrics = b"sglang:num_running_reqs 0\nsglang:num_queue_reqs 0\nsglang:token_usage 0.1\n"

    async def work() -> None:
        async with Scripted() as loaded, Scripted() as idle:
            loaded.metrics, idle.metrics = busy_metrics, idle_metrics
            async with upstream_desk(at(loaded), at(idle)) as d:
                await d.until(lambda: all(state.load is not None for state in d.upstreams.states))
                assert d.upstreams.states[0].load == (90, 30, 0.0)
                for number in range(10):
                    await d.client.post("/v1/chat/completions", json=chat(f"{number}" * 500))
                assert not loaded.asked

    run(work())


def test_beyond_its_concurrency_requests_wait_in_the_router() -> None:
    async def script(asked: Asked) -> None:
        most.append(d.upstreams.states[0].live)
        if len(one.asked) <= 2:
            await release.wait()
        await say_abc(asked)

    release: asyncio.Event
    one, most = Scripted(script), list[int]()
    d: UpstreamDesk

    async def work() -> None:
        nonlocal release, d
        release = asyncio.Event()
        async with one, upstream_desk(at(one, concurrency=2)) as d:
            bodies = [chat(f"{number}") for number in range(7)]
            asks = [asyncio.create_task(d.client.post("/v1/chat/completions", json=body)) for body in bodies]
            await d.until(lambda: d.mind.live_count == 7 and len(one.asked) == 2)
            release.set()
            assert [answer.status_code for answer in await asyncio.gather(*asks)] == [200] * 7
            await d.settled(7)
            assert max(most) == 2
            assert len(most) == 7

    run(work())


def test_an_upstream_that_dies_is_left_and_taken_again_when_it_is_back() -> None:
    async def work() -> None:
        async with Scripted() as one, Scripted() as two, upstream_desk(at(one), at(two)) as d:
            one.is_well = False
            await d.until(lambda: d.upstreams.up_count == 1)
            for number in range(6):
                assert (await d.client.post("/v1/chat/completions", json=chat(f"{number}"))).status_code == 200
            assert not one.asked
            assert d.upstreams.shown()[0]["lost_reason"] == "GET /v1/models says 500"
            one.is_well, two.is_well = True, False
            await d.until(lambda: [state.is_well for state in d.upstreams.states] == [True, False])
            assert (await d.client.post("/v1/chat/completions", json=chat("again"))).status_code == 200
            assert one.asked

    run(work())


def test_an_answer_that_outlives_its_upstreams_health_leaves_nothing_behind() -> None:
    async def script(asked: Asked) -> None:
        await say_one_and(asked)
        await release.wait()
        await asked.say(chunk(DONE), b"0\r\n\r\n")

    release: asyncio.Event

    async def work() -> None:
        nonlocal release
        release = asyncio.Event()
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat(stream=True)))
            await d.until(lambda: bool(one.asked))
            one.is_well = False
            await d.until(lambda: d.upstreams.up_count == 0)
            release.set()
            assert (await asking).content.endswith(DONE)
            await d.settled()
            assert d.mind._reducer.live_count == 0  # type: ignore[attr-defined]

    run(work())


def test_other_routes_go_to_upstreams_that_have_them_else_the_key_is_named() -> None:
    async def script(asked: Asked) -> None:
        await asked.reply(b'{"data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 7}}')

    async def work() -> None:
        async with Scripted(script) as one:
            async with upstream_desk(at(one)) as d:
                refused = await d.client.post("/v1/embeddings", json={"model": "m", "input": "x"})
                assert refused.status_code == 501
                assert "`routes` in [[upstreams]]" in refused.json()["error"]["message"]
            one.paths = ("/v1/embeddings", "/v1/chat/completions", "/admin")
            async with upstream_desk(at(one)) as d:
                answer = await d.client.post("/v1/embeddings", json={"model": "m", "input": "x"})
                assert answer.status_code == 200
                assert (await d.client.post("/v1/completions", json={"model": "m", "prompt": "x"})).status_code == 501
            async with upstream_desk(at(one, routes=("/v1/embeddings",))) as d:
                answer = await d.client.post("/v1/embeddings", json={"model": "m", "input": "x"})
                assert answer.json()["data"] == [{"embedding": [0.5]}]
                assert (await d.settled()).prompt_tokens == 7

    run(work())


def test_tenants_are_the_same_in_front_of_upstreams(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "alice", {"concurrency": 1}, ("m",), "")

    async def work() -> None:
        tenants = tenants_of(path)
        async with Scripted(models=("m", "secret")) as one, upstream_desk(at(one), tenants=tenants) as d:
            assert (await d.client.post("/v1/chat/completions", json=chat())).status_code == 401
            d.client.headers["x-api-key"] = key
            assert (await d.client.post("/v1/chat/completions", json=chat())).status_code == 200
            assert (await d.client.post("/v1/chat/completions", json=chat(model="secret"))).status_code == 404
            receipt = await d.settled()
            tenants.accounts.ended(receipt)
            assert tenants.accounts.of("alice").tokens == 15

    run(work())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b'{"model": 1}', b'{"messages": {}}', b'{"stream": "yes"}', b"[" * 100_000, b"\xff"],
)
def test_what_is_no_request_reaches_no_upstream(body: bytes) -> None:
    async def work() -> None:
        async with Scripted() as one, upstream_desk(at(one)) as d:
            answer = await d.client.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400
            assert len(answer.content) <= 1024
            assert not one.asked

    run(work())


async def kept(d: UpstreamDesk) -> None:
    await d.until(lambda: d.pool.idle_count(d.upstreams.states[0].origin) > 0)


def test_a_connection_that_was_closed_while_idle_costs_no_attempt() -> None:
    async def work() -> None:
        async with Scripted() as one, upstream_desk(at(one)) as d:
            await d.client.post("/v1/chat/completions", json=chat())
            await kept(d)
            first = one.asked[0]
            first.cut()
            answer = await d.client.post("/v1/chat/completions", json=chat())
            assert answer.status_code == 200
            assert (await d.settled(2)).attempts == 1

    run(work())


def test_no_more_models_of_an_upstream_are_taken_than_the_bound() -> None:
    async def work() -> None:
        names = tuple(f"m{number}" for number in range(100))
        async with Scripted(models=names) as one, upstream_desk(at(one)) as d:
            assert len((await d.client.get("/v1/models")).json()["data"]) == MODELS_MAX

    run(work())


def test_an_upstream_that_lists_no_model_yet_makes_nothing_ready() -> None:
    async def work() -> None:
        async with Scripted(models=()) as one, upstream_desk(at(one)) as d:
            assert (await d.client.get("/readyz")).status_code == 503
            assert (await d.client.post("/v1/chat/completions", json=chat())).status_code == 503
            one.models = ("m",)
            await d.until(lambda: bool(d.upstreams.models()))
            assert (await d.client.get("/readyz")).status_code == 200
            assert (await d.client.post("/v1/chat/completions", json=chat())).status_code == 200

    run(work())
