"""HTTP framing: bytes that two parsers could read differently are refused, and the connection ends there."""

from __future__ import annotations

import asyncio

import pytest

from router.listener.server import ListenerLimits
from tests.router.desk import DEADLINE_S, chat, desk, ids_of, run, speak

GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
LAST_GET = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"


def post(*lines: bytes, body: bytes = b"") -> bytes:
    head = [b"POST /v1/completions HTTP/1.1", b"host: localhost", *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def get(*lines: bytes) -> bytes:
    return b"\r\n".join([b"GET /livez HTTP/1.1", *lines]) + b"\r\n\r\n"


CHUNKED = b"transfer-encoding: chunked"
REFUSED = {
    # Two lengths
    "length and chunked": post(b"content-length: 5", CHUNKED, body=b"0\r\n\r\n" + SMUGGLED),
    "chunked and length": post(CHUNKED, b"content-length: 5", body=b"0\r\n\r\n" + SMUGGLED),
    "two lengths": post(b"content-length: 0", b"content-length: 44", body=SMUGGLED),
    "two equal lengths": post(b"content-length: 0", b"content-length: 0", body=SMUGGLED),
    "length list": post(b"content-length: 0, 44", body=SMUGGLED),
    "length sign": post(b"content-length: +0", body=SMUGGLED),
    "length negative": post(b"content-length: -1", body=SMUGGLED),
    "length hex": post(b"content-length: 0x0", body=SMUGGLED),
    "length empty": post(b"content-length: ", body=SMUGGLED),
    "length huge": post(b"content-length: " + b"9" * 40, body=SMUGGLED),
    "length with space": post(b"content-length: 1 2", body=SMUGGLED),
    # Transfer codings
    "gzip, chunked": post(b"transfer-encoding: gzip, chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked, identity": post(b"transfer-encoding: chunked, identity", body=b"0\r\n\r\n" + SMUGGLED),
    "identity": post(b"transfer-encoding: identity", body=SMUGGLED),
    "xchunked": post(b"transfer-encoding: xchunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked twice": post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    "vertical tab": post(b"transfer-encoding:\x0bchunked", body=b"0\r\n\r\n" + SMUGGLED),
    "space before colon": post(b"transfer-encoding : chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked on 1.0": b"POST /v1/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    # Chunks
    "chunk size sign": post(CHUNKED, body=b"+1\r\na\r\n0\r\n\r\n"),
    "chunk size 0x": post(CHUNKED, body=b"0x1\r\na\r\n0\r\n\r\n"),
    "chunk size empty": post(CHUNKED, body=b"\r\n0\r\n\r\n"),
    "chunk size huge": post(CHUNKED, body=b"f" * 20 + b"\r\n"),
    "chunk too long": post(CHUNKED, body=b"1\r\nab\r\n0\r\n\r\n"),
    "chunk bare lf": post(CHUNKED, body=b"1\na\n0\n\n"),
    # Lines
    "bare lf": b"GET /livez HTTP/1.1\nhost: localhost\n\n" + SMUGGLED,
    "lf in value": get(b"host: localhost", b"x: a\ny: b"),
    "obs-fold": get(b"host: localhost", b"x: a", b" b"),
    "nul in value": get(b"host: localhost", b"x: a\x00b"),
    "cr in value": get(b"host: localhost", b"x: a\rb"),
    "nul in name": get(b"host: localhost", b"x\x00: a"),
    "space in name": get(b"host: localhost", b"x y: a"),
    "no name": get(b"host: localhost", b": a"),
    "no colon": get(b"host: localhost", b"xyz"),
    "leading space": get(b" host: localhost"),
    # Host
    "no host": get(b"x: y"),
    "two hosts": get(b"host: localhost", b"host: localhost"),
    "host with path": get(b"host: localhost/#@evil"),
    "host with user": get(b"host: a@localhost"),
    "host empty": get(b"host: "),
    "host list": get(b"host: localhost, evil"),
    # Request line
    "http 2": b"GET /livez HTTP/2.0\r\nhost: localhost\r\n\r\n",
    "http 1.2": b"GET /livez HTTP/1.2\r\nhost: localhost\r\n\r\n",
    "http 0.9": b"GET /livez\r\n\r\n",
    "no such protocol": b"GET /livez ICY/1.0\r\nhost: localhost\r\n\r\n",
    "lower method": b"get /livez HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "unknown method": b"FETCH /livez HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "absolute target": b"GET http://localhost/livez HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "connect": b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "control in target": b"GET /li\x01vez HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "raw utf-8 in target": "GET /livéz HTTP/1.1\r\nhost: localhost\r\n\r\n".encode(),
    "upgrade": get(b"host: localhost", b"connection: upgrade", b"upgrade: h2c"),
    "http 2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    # Size
    "many headers": get(b"host: localhost", *[b"x: y"] * 200),
    "long header": get(b"host: localhost", b"x: " + b"y" * 70_000),
    "long target": b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "in pieces"])
@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED.keys())
def test_doubtful_bytes_are_refused_and_nothing_behind_them_is_read(sent: bytes, is_whole: bool) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await (d.raw(sent + GET) if is_whole else in_pieces(d.address, sent + GET))
            assert answer.count(b"HTTP/1.1 ") <= 1
            assert answer == b"" or answer.split(b" ", 2)[1] in (b"400", b"413", b"414", b"431")
            assert not d.mind.offered

    run(work())


async def in_pieces(address: tuple[str, int], sent: bytes) -> bytes:
    """Byte by byte where it matters: the first 300."""
    reader, writer = await asyncio.open_connection(*address)
    received = asyncio.create_task(reader.read(-1))
    try:
        for at in range(300):
            writer.write(sent[at : at + 1])
            await asyncio.sleep(0)
        writer.write(sent[300:])
        async with asyncio.timeout(DEADLINE_S):
            return await received
    except ConnectionError:
        return b""
    finally:
        received.cancel()
        writer.close()


def test_pipelined_requests_are_answered_in_order() -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.raw(GET * 5 + LAST_GET)
            assert answer.count(b"HTTP/1.1 200 OK") == 6
            assert answer.rfind(b'"alive"') < answer.find(b'"list"')

    run(work())


def test_a_request_behind_a_running_one_waits_for_it() -> None:
    async def work() -> None:
        async with desk() as d:
            body = b'{"model":"tiny","prompt":"a","max_tokens":3}'
            first = post(b"content-length: %d" % len(body), body=body)
            answering = asyncio.create_task(d.raw(first + LAST_GET))
            speak("abc")(await d.fleet.next())
            answer = await answering
            assert 0 < answer.find(b"text_completion") < answer.find(b'"list"')

    run(work())


def test_too_many_pipelined_requests_end_the_connection() -> None:
    async def work() -> None:
        async with desk(listener_limits=ListenerLimits(pipelined_max=2)) as d:
            body = b'{"model":"tiny","prompt":"a"}'
            answering = asyncio.create_task(d.raw(post(b"content-length: %d" % len(body), body=body) + GET * 50))
            speak("abc")(await d.fleet.next())
            answer = await answering
            assert answer.count(b"HTTP/1.1 200 OK") <= 3
            assert b"HTTP/1.1 400 " in answer

    run(work())


UNFINISHED = {
    "silent": b"",
    "half a line": b"GET /livez HT",
    "half the headers": GET[:-2],
    "half a body": post(b"content-length: 9", body=b"half"),
}


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_who_does_not_finish_a_request_is_cut_by_its_deadline(sent: bytes) -> None:
    async def work() -> None:
        limits = ListenerLimits(header_s=0.05, body_s=0.05, idle_s=0.05, linger_s=0.05, sweep_s=0.02)
        async with desk(listener_limits=limits) as d:
            answer = await d.raw(sent)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
            await d.until(lambda: d.listener.connection_count == 0)

    run(work())


def test_an_idle_connection_is_closed_after_its_last_answer() -> None:
    async def work() -> None:
        async with desk(listener_limits=ListenerLimits(idle_s=0.5, sweep_s=0.02)) as d:
            assert (await d.raw(GET)).count(b"HTTP/1.1 200 OK") == 1

    run(work())


def test_connections_beyond_the_bound_are_refused() -> None:
    async def work() -> None:
        async with desk(listener_limits=ListenerLimits(connections_max=1)) as d:
            _, writer = await asyncio.open_connection(*d.address)
            await d.until(lambda: d.listener.connection_count == 1)
            assert await d.raw(GET) == b""
            assert d.listener.refused_connections == 1
            writer.close()

    run(work())


def test_http_10_gets_a_stream_that_ends_with_the_connection() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("abc")
            body = b'{"model":"tiny","prompt":"a","stream":true}'
            head = b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body)
            answer = await d.raw(head + body)
            assert answer.endswith(b"data: [DONE]\n\n")
            assert b"chunked" not in answer

    run(work())


def test_a_chunked_body_is_read_like_any_other() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("abc")
            body = b'{"model":"tiny","prompt":"a"}'
            chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
            answer = await d.raw(post(CHUNKED, b"connection: close", body=chunks))
            assert b'"text":"abc"' in answer
            assert (await d.fleet.next()).ids == ids_of("a")

    run(work())


def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("abc")
            body = b'{"model":"tiny","prompt":"a"}'
            lines = (b"expect: 100-continue", b"connection: close", b"content-length: %d" % len(body))
            answer = await d.raw(post(*lines, body=body))
            assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")

    run(work())


def test_draining_lets_running_answers_end_and_takes_nothing_new() -> None:
    async def work() -> None:
        async with desk() as d:
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat()))
            attempt = await d.fleet.next()
            draining = asyncio.create_task(d.listener.drain(10))
            await d.until(lambda: d.listener.is_draining)
            speak("last words")(attempt)
            answer = await asking
            await draining
            assert answer.json()["choices"][0]["message"]["content"] == "last words"
            assert d.listener.connection_count == 0

    run(work())


def test_draining_ends_what_outlives_the_grace_with_an_error() -> None:
    async def work() -> None:
        async with desk() as d:
            asking = asyncio.create_task(d.client.post("/v1/chat/completions", json=chat()))
            attempt = await d.fleet.next()
            await d.listener.drain(0.05)
            answer = await asking
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["code"] == "stopping"
            assert attempt.aborted == "the router stops"
            assert d.receipts[0].outcome == "failed"

    run(work())
