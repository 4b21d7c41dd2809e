"""The client reads any legal answer however it is cut, obeys refusals within bounds, and hangs up when told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from email.utils import formatdate

import pytest

from loadgen.client import (
    BODY_BYTES_MAX,
    HEAD_BYTES_MAX,
    RETRIES_MAX,
    Answer,
    Client,
    Connection,
    Target,
    post_obediently,
    retry_after_s,
)
from tests.loadgen.server import Asked, Script, answer_all, scripted

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=1\r\n world\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world"
ENDLESS = b"HTTP/1.1 200 OK\r\n\r\nhello world"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED
WAIT_S = 60.0


class Pipe(asyncio.Transport):
    """A transport that goes nowhere."""

    is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def abort(self) -> None:
        self.is_aborted = True


async def received(pieces: Iterable[bytes], *, is_closed: bool = False) -> tuple[Answer, Pipe]:
    connection, pipe, answer = Connection(asyncio.get_running_loop().time), Pipe(), Answer()
    connection.connection_made(pipe)
    exchange = asyncio.ensure_future(connection.exchange(b"", answer))
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    if is_closed:
        connection.connection_lost(None)
    await asyncio.wait_for(exchange, WAIT_S)
    return answer, pipe


@pytest.mark.parametrize("raw", [CHUNKED, SIZED, INTERIM])
@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_an_answer_reads_the_same_however_the_network_cuts_it(raw: bytes, cut: int) -> None:
    pieces = [raw[at : at + cut] for at in range(0, len(raw), cut)]
    answer, _ = asyncio.run(received(pieces))
    assert (answer.status, answer.body(), answer.error) == (200, b"hello world", "")


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    answer, _ = asyncio.run(received([ENDLESS], is_closed=True))
    assert (answer.body(), answer.error) == (b"hello world", "")


@pytest.mark.parametrize("raw", [CHUNKED[:-1], CHUNKED[:60], SIZED[:-1], b"HTTP/1.1 200 O", b""])
def test_an_answer_that_stops_short_says_so(raw: bytes) -> None:
    answer, _ = asyncio.run(received([raw] if raw else [], is_closed=True))
    assert "closed the connection early" in answer.error


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 abc\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n", "many"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "zz"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * HEAD_BYTES_MAX, "head is too long"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"y" * (BODY_BYTES_MAX + 1), "body is too long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_http_is_an_error_and_the_end_of_the_connection(raw: bytes, why: str) -> None:
    answer, pipe = asyncio.run(received([raw]))
    assert why in answer.error
    assert pipe.is_aborted


def test_events_are_found_across_pieces_each_with_the_time_of_its_last_byte() -> None:
    answer = Answer(pieces=[(1.0, b"data: a\n"), (2.0, b"\ndata: b\r\n\r\n: note\n\nda"), (3.0, b"ta: c\n\n")])
    assert answer.events() == [(2.0, b"a"), (2.0, b"b"), (3.0, b"c")]


@pytest.mark.parametrize(
    ("status", "headers", "wait_s"),
    [
        (200, {"retry-after": "5"}, None),
        (500, {"retry-after": "5"}, None),
        (429, {"retry-after": "5"}, 5.0),
        (503, {"retry-after-ms": "250", "retry-after": "5"}, 0.25),
        (503, {}, 0.5),
        (503, {"retry-after": "soon"}, 0.5),
        (529, {"retry-after": "2"}, 2.0),
        (503, {"retry-after": "61"}, 0.5),
        (503, {"retry-after": "-1"}, 0.5),
        (503, {"retry-after": "nan"}, 0.5),
        (503, {"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0.5),
        (503, {"retry-after": "5", "x-should-retry": "false"}, None),
    ],
)
def test_a_refusal_says_when_to_come_back(status: int, headers: dict[str, str], wait_s: float | None) -> None:
    assert retry_after_s(Answer(status=status, headers=headers)) == wait_s


def test_a_client_that_is_told_no_time_waits_twice_as_long_each_time() -> None:
    waits = [retry_after_s(Answer(status=429, attempts=attempts)) for attempts in range(1, 8)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_date_says_when_to_come_back_too() -> None:
    soon = formatdate(time.time() + 55, usegmt=True)
    wait_s = retry_after_s(Answer(status=503, headers={"retry-after": soon}))
    assert wait_s is not None
    assert 5 < wait_s <= 55


def refusing(times: int) -> Script:
    async def script(asked: Asked) -> None:
        if asked.number < times:
            asked.json(503, {"error": {"message": "full"}}, **{"retry-after-ms": "1"})
        else:
            asked.json(200, {"choices": []})

    return script


@pytest.mark.parametrize(("refusals", "status", "attempts"), [(0, 200, 1), (2, 200, 3), (9, 503, RETRIES_MAX + 1)])
def test_a_refused_client_comes_back_and_at_last_gives_up(refusals: int, status: int, attempts: int) -> None:
    async def scene() -> None:
        async with scripted(refusing(refusals)) as server:
            client, answer = Client(Target.parse(server.url)), Answer()
            await asyncio.wait_for(post_obediently(client, "/v1/completions", {}, b"{}", answer), WAIT_S)
            client.close()
        assert (answer.status, answer.attempts, len(server.asked)) == (status, attempts, attempts)

    asyncio.run(scene())


def test_connections_are_kept_and_used_again() -> None:
    async def scene() -> None:
        ports = []

        async def script(asked: Asked) -> None:
            ports.append(asked.transport.get_extra_info("peername"))
            await answer_all(asked)

        async with scripted(script) as server:
            client = Client(Target.parse(server.url))
            for _ in range(3):
                await asyncio.wait_for(client.post("/", {}, b"{}", Answer()), WAIT_S)
            client.close()
        assert len(ports) == 3
        assert len(set(ports)) == 1

    asyncio.run(scene())


def test_a_kept_connection_that_the_server_closed_costs_no_request() -> None:
    async def scene() -> None:
        async def script(asked: Asked) -> None:
            if asked.number == 1:
                asked.transport.abort()  # the second request, on the kept connection, meets a closing one
            else:
                await answer_all(asked)

        async with scripted(script) as server:
            client, answer = Client(Target.parse(server.url)), Answer()
            await asyncio.wait_for(client.post("/", {}, b"{}", Answer()), WAIT_S)
            await asyncio.wait_for(client.post("/", {}, b"{}", answer), WAIT_S)
            client.close()
        assert (answer.status, answer.attempts, len(server.asked)) == (200, 1, 3)

    asyncio.run(scene())


def test_a_client_that_leaves_hangs_up_and_keeps_what_it_had() -> None:
    async def scene() -> None:
        begun = asyncio.Event()
        left = asyncio.Event()

        async def script(asked: Asked) -> None:
            asked.open_stream()
            asked.token()
            begun.set()
            await asked.left.wait()
            left.set()

        async with scripted(script) as server:
            client, answer = Client(Target.parse(server.url)), Answer()
            posting = asyncio.ensure_future(client.post("/", {}, b"{}", answer))
            await asyncio.wait_for(begun.wait(), WAIT_S)
            async with asyncio.timeout(WAIT_S):
                while not answer.pieces:  # noqa: ASYNC110  the client tells nobody when bytes come
                    await asyncio.sleep(0)
            posting.cancel()
            await asyncio.gather(posting, return_exceptions=True)
            await asyncio.wait_for(left.wait(), WAIT_S)
            client.close()
        assert answer.status == 200
        assert len(answer.events()) == 1

    asyncio.run(scene())


def test_a_target_that_does_not_listen_is_an_error_in_the_answer() -> None:
    async def scene() -> Answer:
        async with scripted(answer_all) as server:
            target = Target.parse(server.url)
        answer = Answer()
        await asyncio.wait_for(Client(target).post("/", {}, b"{}", answer), WAIT_S)
        return answer

    assert asyncio.run(scene()).error.startswith("cannot connect")


@pytest.mark.parametrize("url", ["https://host", "ftp://host", "http://"])
def test_an_address_that_is_not_plain_http_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not an http:// address"):
        Target.parse(url)


def test_an_address_may_have_a_prefix_and_no_scheme() -> None:
    assert Target.parse("host:81/api/") == Target("host", 81, "/api")
