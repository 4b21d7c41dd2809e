"""The pool of upstream connections: whatever is cancelled, and whenever, the next request is answered."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest

from router.upstreams.http1 import Call, Origin, Pool, UpstreamLimits
from router.upstreams.transport import Transport
from tests.router.desk import DEADLINE_S, run
from tests.router.upstreams.scripted import Asked, Scripted


async def slowly(asked: Asked) -> None:
    await asyncio.sleep(0.01)
    await asked.reply(b"{}")


async def cancelled(tasks: list[asyncio.Task[httpx.Response]], times: int) -> None:
    for _ in range(times):
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 20])
def test_the_pool_survives_cancellation(turns: int) -> None:
    """The recipe that poisons httpx 0.28's own pool: 40 queued requests cancelled at once, then 30 cancelled twice."""

    async def work() -> None:
        pool = Pool()
        async with Scripted(slowly) as one, httpx.AsyncClient(transport=Transport(pool), timeout=DEADLINE_S) as client:
            for count, times in ((40, 1), (30, 2)):
                tasks = [asyncio.create_task(client.post(one.url + "/x", json={})) for _ in range(count)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                await cancelled(tasks, times)
                assert (await client.post(one.url + "/x", json={})).status_code == 200
            pool.close()
            async with asyncio.timeout(DEADLINE_S):
                while one._writers:  # noqa: ASYNC110 -- no connection is left that nobody owns
                    await asyncio.sleep(0.01)

    run(work())


def test_the_next_request_works_after_faults_of_every_kind() -> None:
    numbers = iter(range(10_000))

    async def answer(asked: Asked) -> None:
        kind = next(numbers) % 5
        if kind == 0:
            asked.cut()
        elif kind == 1:
            await asked.say(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
            asked.cut()
        elif kind == 2:
            await asked.say(b"HTTP/1.1 999999 ?\r\n\r\n")
        elif kind == 3:
            await asked.say(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n")
        else:
            await asked.reply(b"{}")

    async def work() -> None:
        pool = Pool()
        async with Scripted(answer) as one, httpx.AsyncClient(transport=Transport(pool), timeout=DEADLINE_S) as client:
            good = 0
            for _ in range(200):
                with contextlib.suppress(httpx.TransportError):
                    good += (await client.post(one.url + "/x")).status_code == 200
            assert good >= 40
            pool.close()

    run(work())


def test_a_reply_without_length_ends_with_its_connection() -> None:
    async def answer(asked: Asked) -> None:
        await asked.say(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nall of it")
        asked.writer.close()

    async def work() -> None:
        async with Scripted(answer) as one, httpx.AsyncClient(transport=Transport(Pool())) as client:
            assert (await client.get(one.url + "/x")).content == b"all of it"

    run(work())


def test_a_reply_that_is_too_late_or_too_large_is_an_httpx_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.upstreams.transport.REPLY_BYTES_MAX", 100)

    async def answer(asked: Asked) -> None:
        if asked.path == "/large":
            await asked.reply(b"x" * 200)
        else:
            await asked.gone.wait()

    async def work() -> None:
        async with (
            Scripted(answer) as one,
            httpx.AsyncClient(transport=Transport(Pool()), timeout=DEADLINE_S) as client,
        ):
            with pytest.raises(httpx.ReadTimeout):
                await client.get(one.url + "/late", timeout=0.05)
            with pytest.raises(httpx.ReadError, match="more than 100 bytes"):
                await client.get(one.url + "/large")
            with pytest.raises(httpx.ReadError, match="cannot connect"):
                await client.get("http://127.0.0.1:1/")

    run(work())


def test_idle_connections_are_bounded_and_old_ones_are_not_used() -> None:
    async def work() -> None:
        pool = Pool(UpstreamLimits(kept_max=3, kept_s=600.0))
        async with Scripted(slowly) as one, httpx.AsyncClient(transport=Transport(pool), timeout=DEADLINE_S) as client:
            await asyncio.gather(*[client.post(one.url + "/x") for _ in range(8)])
            origin = Origin.of(one.url)
            assert pool.idle_count(origin) == 3
            assert pool.take(origin) is not None
            for connection in pool._idle[origin]:
                connection.freed_at -= 601.0  # as if so long had passed
            assert pool.take(origin) is None
            assert pool.idle_count(origin) == 0

    run(work())


def test_an_aborted_call_tells_its_listener_nothing_more() -> None:
    heard: list[object] = []

    class Deaf:
        def head(self, *said: object) -> None:
            heard.append(said)

        data = end = failed = head

    async def work() -> None:
        pool = Pool()
        async with Scripted(slowly) as one:
            for turns in range(8):
                call = Call(pool, Origin.of(one.url), b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n", Deaf())
                for _ in range(turns):
                    await asyncio.sleep(0)
                call.abort()
                call.abort()
            await asyncio.sleep(0.05)
            pool.close()
        assert heard == []

    run(work())
