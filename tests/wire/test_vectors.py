"""The table of forbidden bytes; and a second parser, h11, which finds the same requests in what the listener takes."""

from __future__ import annotations

import random

import h11
import pytest

from tests.abuse.test_fuzz import REQUESTS, answered, mutated
from tests.router.desk import desk, run, speak
from tests.wire.test_framing import GET, LAST_GET, in_pieces
from tests.wire.vectors import FORBIDDEN


def test_there_are_as_many_as_were_promised() -> None:
    assert len(FORBIDDEN) >= 150


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_forbidden_is_refused_and_nothing_behind_it_is_read(name: str) -> None:
    sent = FORBIDDEN[name] + GET

    async def work() -> None:
        async with desk() as d:
            for answer in (await d.raw(sent), await in_pieces(d.address, sent)):
                assert answer.count(b"HTTP/1.1 ") <= 1
                assert answer == b"" or answer.split(b" ", 2)[1] in (b"400", b"413", b"414", b"431")
            assert not d.mind.offered

    run(work())


def read_by_h11(sent: bytes) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Methods and targets of the requests that another parser finds, and whether it found fault behind them."""
    connection, found = h11.Connection(h11.SERVER), []
    connection.receive_data(sent)
    try:
        while not isinstance(event := connection.next_event(), (h11.ConnectionClosed, type(h11.NEED_DATA))):
            if isinstance(event, h11.Request):
                found.append((bytes(event.method), bytes(event.target)))
            if event is h11.PAUSED or isinstance(event, h11.EndOfMessage):
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                connection.start_next_cycle()
    except h11.RemoteProtocolError:
        return found, True
    except h11.LocalProtocolError:  # the request before was the last one of its connection
        pass
    return found, False


PAIRS = [GET, *REQUESTS, *[request.replace(b"connection: close\r\n", b"") + LAST_GET for request in REQUESTS]]


@pytest.mark.parametrize("rounds", [200, pytest.param(8000, marks=pytest.mark.nightly)])
def test_two_parsers_find_the_same_requests_in_what_is_taken(rounds: int) -> None:
    rng = random.Random(rounds)

    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("ok")
            served: list[tuple[bytes, bytes]] = []
            handle = d.listener.handle

            async def heard(exchange: object) -> None:
                head = exchange.head  # type: ignore[attr-defined]
                query = b"?" + head.query if head.query else b""
                served.append((head.method.encode(), head.path.encode() + query))
                await handle(exchange)  # type: ignore[arg-type]

            d.listener.handle = heard  # type: ignore[assignment]
            for _ in range(rounds):
                sent = mutated(rng, PAIRS)
                served.clear()
                await answered(d.address, sent)
                found, is_faulty = read_by_h11(sent)
                # It refuses an empty line before a request, which RFC 9112 lets pass; what it reads, it reads as we do.
                both = min(len(served), len(found)) if is_faulty else len(served)
                assert served[:both] == found[:both], sent

    run(work())
