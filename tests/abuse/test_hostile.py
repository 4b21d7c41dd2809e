"""What nobody should send, on every route with a body: a small typed 4xx, never a 5xx, a new header or an event."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from policies.request import RequestClass
from tests.router.desk import Desk, chat, desk, run, speak
from tests.router.upstreams.scripted import OK, Asked, Scripted, chunk, delta, upstream_desk
from tests.router.upstreams.test_forward import at

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses")
BASE: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "x",
    "input": "x",
    "max_tokens": 4,
    "store": False,
}


def body(**fields: Any) -> bytes:
    return json.dumps(BASE | fields).encode()


def spliced(key: str, value: bytes) -> bytes:
    return body(**{key: "SPLICE"}).replace(b'"SPLICE"', value)


BAD = {
    "nothing": b"",
    "bom": b"\xef\xbb\xbf" + body(),
    "utf-16": body().decode().encode("utf-16"),
    "utf-32": body().decode().encode("utf-32"),
    "latin-1": '{"model": "tiny", "messages": "é"}'.encode("latin-1"),
    "nul": b"\x00" * 100,
    "two documents": body() + body(),
    "comment": b"/* */" + body(),
    "single quotes": body().replace(b'"', b"'"),
    "trailing comma": body()[:-1] + b",}",
    "a number": b"7",
    "NaN": spliced("temperature", b"NaN"),
    "infinity": spliced("temperature", b"-Infinity"),
    "1e999": spliced("temperature", b"1e999"),
    "hex": spliced("max_tokens", b"0x10"),
    "5,000 digits": spliced("max_tokens", b"9" * 5000),
    "a fraction": spliced("max_tokens", b"1.5"),
    "bool for int": spliced("max_tokens", b"true"),
    "negative": spliced("max_tokens", b"-1"),
    "text for int": spliced("max_tokens", b'"4"'),
    "deep list": spliced("metadata", b"[" * 100_000),
    "deep object": spliced("metadata", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep content": body(messages=[{"role": "user", "content": [[[["x"]]]]}], prompt=[[["x"]]], input=[[["x"]]]),
    "roles of nobody": body(messages=[{"role": "king", "content": "x"}], prompt={}, input=[{"role": "king"}]),
    "wrong containers": body(messages={"role": "user"}, prompt={}, input={}),
    "half a surrogate": spliced("messages", b'[{"role": "user", "content": "\\ud800"}]').replace(b'"x"', b'"\\ud800"'),
    "gzip": gzip.compress(body()),
    "gzip bomb": gzip.compress(b"0" * 10_000_000),
    "form": b"model=tiny&prompt=x",
    "multipart": b"--x\r\ncontent-disposition: form-data; name=a\r\n\r\n1\r\n" * 100_000,
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_body_is_a_small_typed_refusal_on_every_route(path: str, case: str) -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            answer = await d.client.post(path, content=BAD[case])
            assert answer.status_code == 400
            assert answer.json()["error"]["message"]
            assert len(answer.content) <= 1024
            assert not d.mind.offered

    run(work())


async def ask(d: Desk, **fields: Any) -> Any:
    return await d.client.post("/v1/chat/completions", json=chat(**fields))


EVIL = ("a\r\nx-evil: 1", "a\nb", "a\x00b", "é\u2028", "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "data: [DONE]\n\n")


@pytest.mark.parametrize("text", EVIL)
@pytest.mark.parametrize("stream", [True, False])
def test_nothing_that_a_client_or_model_says_becomes_a_header_or_an_event(text: str, stream: bool) -> None:
    async def work() -> None:
        async with desk() as d:
            d.mind.request_class = RequestClass.CHATBOT
            d.fleet.answer = speak(text)
            clean = set((await ask(d)).headers)
            answer = await ask(d, stream=stream, user=text, metadata={"user_id": text}, prompt_cache_key=text)
            assert answer.status_code == 200
            assert set(answer.headers) <= clean | {"transfer-encoding", "cache-control"}
            if stream:
                lines = [line for line in answer.text.split("\n") if line]
                assert all(line.startswith("data: ") for line in lines)
                assert lines.count("data: [DONE]") == 1
                events = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
                said = "".join(
                    choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ())
                )
            else:
                said = answer.json()["choices"][0]["message"]["content"]
            assert said == text
            refused = await ask(d, model=text)
            assert refused.status_code == 404
            assert set(refused.headers) <= clean

    run(work())


@pytest.mark.parametrize(
    "head",
    [
        b"content-type: text/event-stream\r\nset-cookie: a=b\r\nx-headway-class: king\r\nlocation: http://evil\r\n",
        b"content-type: text/html\r\ncontent-encoding: gzip\r\nconnection: upgrade\r\n",
        b"content-type: application/json\tx-evil\r\nstrict-transport-security: max-age=1\r\n",
    ],
)
def test_no_header_of_an_upstream_reaches_a_client(head: bytes) -> None:
    async def script(asked: Asked) -> None:
        await asked.say(OK, head, b"transfer-encoding: chunked\r\n\r\n", chunk(delta("a")), chunk(b"data: [DONE]\n\n"))
        await asked.say(b"0\r\n\r\n")

    async def work() -> None:
        async with Scripted(script) as one, upstream_desk(at(one)) as d:
            answer = await d.client.post("/v1/chat/completions", json=chat() | {"model": "m", "stream": True})
            allowed = {"date", "content-type", "cache-control", "transfer-encoding", "content-length"}
            allowed |= {f"x-headway-{name}" for name in ("request", "class", "class-reason", "worker")}
            assert set(answer.headers) <= allowed
            assert answer.headers["x-headway-class"] == "chatbot+"
            assert "evil" not in answer.headers["content-type"]

    run(work())


NUMBERS = {
    "n": 10**9,
    "temperature": 1e308,
    "top_p": -0.1,
    "seed": 2**70,
    "logit_bias": {str(number): 1 for number in range(100_000)},
    "stop": ["x"] * 10_000,
    "top_logprobs": 10**6,
    "presence_penalty": 1e9,
    "stop_token_ids": [2**40],
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
    "structured_outputs": {"regex": "(" * 5000},
    "tools": [{"type": "function", "function": {"name": "x" * 10_000}}] * 3,
}


@pytest.mark.parametrize("field", NUMBERS)
def test_a_value_out_of_bounds_is_never_our_fault(field: str) -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            answer = await ask(d, **{field: NUMBERS[field]})
            assert answer.status_code in (200, 400)
            assert len(answer.content) <= 1024

    run(work())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
def test_a_body_without_end_is_refused_at_its_limit_and_not_read_on(path: str) -> None:
    """Chunked, so nothing says beforehand how much it will be."""
    piece, most = b"10000\r\n" + b" " * 65536 + b"\r\n", 16 * 2**20  # beyond the limit of 8 MiB: what sockets hold

    async def work() -> None:
        async with desk() as d:
            reader, writer = await asyncio.open_connection(*d.address)
            head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
            writer.write(head % path.encode())
            answering, sent = asyncio.create_task(reader.read(4096)), 0
            with contextlib.suppress(ConnectionError):
                while not answering.done() and sent < most:
                    writer.write(piece)
                    sent += len(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
            assert (await answering).startswith(b"HTTP/1.1 413 ")
            assert sent < most
            writer.close()
            assert not d.mind.offered

    run(work())


def test_the_last_of_two_equal_fields_counts_here_and_for_an_upstream() -> None:
    """Parsers differ in which one they take, so an upstream is sent one: it is asked for what was checked here."""
    twice = b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}], "model": "m"}'

    async def script(asked: Asked) -> None:
        assert asked.body.count(b'"model"') == 1
        await asked.reply(b'{"model": "%b"}' % asked.json()["model"].encode())

    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            answer = await d.client.post("/v1/chat/completions", content=twice.replace(b'"m"', b'"tiny"'))
            assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
        async with Scripted(script) as one, upstream_desk(at(one)) as forwarding:
            answer = await forwarding.client.post("/v1/chat/completions", content=twice)
            assert (answer.status_code, answer.json()["model"]) == (200, "m")

    run(work())


def test_a_body_that_says_it_is_packed_is_refused() -> None:
    """No coding is unpacked, so none can be a bomb."""

    async def work() -> None:
        async with desk() as d:
            for coding in ("gzip", "deflate", "br", "zstd"):
                packed = gzip.compress(body())
                headers = {"content-encoding": coding}
                answer = await d.client.post("/v1/chat/completions", content=packed, headers=headers)
                assert answer.status_code == 415

    run(work())


@contextlib.asynccontextmanager
async def canary() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that nobody should call: its URL, and what it got all the same."""
    got: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x.png", got


def parts_with(url: str) -> dict[str, dict[str, Any]]:
    """For each route a body whose parts name this URL wherever one may stand."""
    chat_parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "file", "file": {"file_data": url, "file_id": "../../etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "text", "text": "what is it?"},
    ]
    blocks = [
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "document", "source": {"type": "url", "url": url}},
        {"type": "document", "source": {"type": "file", "file_id": "../../etc/passwd"}},
    ]
    items = [{"type": "input_image", "image_url": url}, {"type": "input_file", "file_url": url}]
    hook = {"webhook": url, "api_base": url, "base_url": url, "metadata": {"url": url}}
    return {
        "/v1/chat/completions": hook | {"messages": [{"role": "user", "content": chat_parts}]},
        "/v1/messages": hook | {"max_tokens": 9, "messages": [{"role": "user", "content": blocks}]},
        "/v1/responses": hook | {"store": False, "input": [{"type": "message", "role": "user", "content": items}]},
    }


SCHEMES = ("{}", "file:///etc/passwd", "gopher://127.0.0.1:1/", "http://169.254.169.254/latest", "http://[::]:1/")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_that_a_client_names_is_fetched_or_opened(path: str, scheme: str) -> None:
    async def work() -> None:
        async with canary() as (url, got), desk() as d:
            d.fleet.answer = speak("ok")
            answer = await d.client.post(path, json=parts_with(scheme.format(url))[path])
            assert answer.status_code == 200
            assert "root:" not in answer.text
            await asyncio.sleep(0)
            assert not got

    run(work())


def test_an_upstreams_redirect_is_not_followed() -> None:
    async def work() -> None:
        async with canary() as (url, got):

            async def script(asked: Asked) -> None:
                head = b"HTTP/1.1 307 Elsewhere\r\nlocation: %b\r\ncontent-length: 0\r\n\r\n" % url.encode()
                await asked.say(head)

            async with Scripted(script) as one, upstream_desk(at(one)) as d:
                answer = await d.client.post("/v1/chat/completions", json=chat() | {"model": "m"})
                assert answer.status_code >= 400
                assert "location" not in answer.headers
                assert not got

    run(work())


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "%2e%2e%2fetc", "a" * 5000, "tiny\x00", "..."])
def test_a_models_name_is_no_path(name: str) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.post("/v1/chat/completions", json=chat() | {"model": name})
            assert answer.status_code in (400, 404)
            assert len(answer.content) <= 1024
            assert "root:" not in answer.text

    run(work())
