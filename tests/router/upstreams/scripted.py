"""A scripted upstream: an HTTP server that answers each path as a test says, byte by byte if it wants, and a desk whose
router has such upstreams and the real mind.

Owns loopback ports for the length of a test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from router.access.tenants import Tenants
from router.control.mind import Mind
from router.control.reducer import build, load_policy
from router.delivery.order import RelayLimits
from router.listener.app import App, House, shape_of
from router.listener.server import Listener
from router.settings.config import Config, Upstream
from router.telemetry.receipts import Receipt
from router.upstreams import fleet as fleet_module
from router.upstreams.fleet import Upstreams
from router.upstreams.forward import ForwardDesk, forwarding
from router.upstreams.http1 import Pool, UpstreamLimits
from router.upstreams.relay import ForwardServices
from tests.router.desk import DEADLINE_S, keyless

OK = b"HTTP/1.1 200 OK\r\n"
JSON_TYPE = b"content-type: application/json\r\n"
SSE_HEAD = OK + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class Asked:
    """One request as the upstream saw it."""

    line: str
    headers: Mapping[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the router closed the connection

    @property
    def path(self) -> str:
        return self.line.split(" ")[1]

    def json(self) -> Any:
        return json.loads(self.body)

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def reply(self, body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (status, kind, len(body))
        await self.say(head + body)

    async def stream(self, *events: bytes, end: bool = True) -> None:
        await self.say(SSE_HEAD, *[chunk(event) for event in events], *([b"0\r\n\r\n"] if end else []))

    def cut(self) -> None:
        self.writer.transport.abort()


Answer = Callable[[Asked], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def delta(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return (
        b"data: " + json.dumps({"id": "x", "object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"
    )


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
WHOLE = json.dumps({"choices": [{"message": {"role": "assistant", "content": "whole"}}], "usage": USAGE}).encode()


async def say_abc(asked: Asked) -> None:
    """A healthy engine."""
    if asked.json().get("stream"):
        await asked.stream(delta("a"), delta("b"), delta("c", "stop"), DONE)
    else:
        await asked.reply(WHOLE)


class Scripted:
    """An upstream. `answer` serves POSTs; models, metrics and health are here."""

    def __init__(self, answer: Answer = say_abc, models: tuple[str, ...] = ("m",)) -> None:
        self.answer = answer
        self.models = models
        self.metrics: bytes | None = None
        self.paths: tuple[str, ...] | None = None  # that its /openapi.json lists; None: it has none
        self.is_well = True
        self.asked: list[Asked] = []
        self.connections = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Scripted:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As if it were killed."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections += 1
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while True:
                    await self._one(await _read(reader, writer), reader)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)
            self._writers.discard(writer)

    async def _one(self, asked: Asked, reader: asyncio.StreamReader) -> None:
        if asked.path.endswith("/v1/models"):
            listed = [{"id": name, "max_model_len": 4096} for name in self.models]
            await asked.reply(json.dumps({"data": listed}).encode(), b"200 OK" if self.is_well else b"500 Oh")
        elif asked.path.endswith("/openapi.json"):
            found = json.dumps({"paths": {path: {} for path in self.paths or ()}}).encode()
            await asked.reply(found, b"200 OK" if self.paths is not None else b"404 No")
        elif asked.path.endswith("/metrics"):
            await asked.reply(self.metrics or b"", b"200 OK" if self.metrics is not None else b"404 No", b"text/plain")
        else:
            self.asked.append(asked)
            watching = asyncio.create_task(_until_gone(reader, asked))
            try:
                await self.answer(asked)
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(head[0], headers, body, writer)


async def _until_gone(reader: asyncio.StreamReader, asked: Asked) -> None:
    with contextlib.suppress(ConnectionError):
        while not reader.at_eof():
            if reader._buffer:  # type: ignore[attr-defined]  # the next request: whose turn it is not
                return
            await asyncio.sleep(0.005)
    asked.gone.set()


@dataclass
class UpstreamDesk:
    """A router in front of upstreams."""

    mind: Mind
    upstreams: Upstreams
    pool: Pool
    listener: Listener
    client: httpx.AsyncClient
    address: tuple[str, int]
    receipts: list[Receipt]

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def settled(self, count: int = 1) -> Receipt:
        await self.until(lambda: len(self.receipts) >= count and not self.listener.tasks)
        assert self.mind.live_count == 0
        assert all(state.live == 0 for state in self.upstreams.states)
        return self.receipts[-1]


class Book:
    """Keeps receipts."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []

    def ended(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)


@contextlib.asynccontextmanager
async def upstream_desk(
    *configs: Upstream,
    env: Mapping[str, str] | None = None,
    limits: UpstreamLimits | None = None,
    relay_limits: RelayLimits | None = None,
    tenants: Tenants | None = None,
    up: int | None = None,
) -> AsyncIterator[UpstreamDesk]:
    """A router whose upstreams are up: `up` of them, all by default. Checks come quickly."""
    config, check_s = Config(), fleet_module.CHECK_S
    fleet_module.CHECK_S = 0.02
    mind = Mind(build(config, load_policy(config, deque(), is_timed=False), 7), deque())
    pool = Pool(limits)
    upstreams = Upstreams(configs, env or {}, mind, pool)
    book, tenants = Book(), tenants or keyless()
    services = ForwardServices(mind, upstreams, book, relay_limits or RelayLimits(), time.monotonic)
    app = App(
        House(
            models=upstreams.models,
            model="",
            posts=forwarding(lambda catalogue: ForwardDesk(services, tenants, catalogue)),
            tenants=tenants,
            readiness=lambda: (upstreams.is_ready(), {}),
            aliases={"gpt-*": ""},
        )
    )
    sock = socket.create_server(("127.0.0.1", 0))
    listener = Listener(app.gate, app.handle, shape=shape_of)
    await listener.start(sock)
    running = asyncio.create_task(upstreams.run())
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
            made = UpstreamDesk(mind, upstreams, pool, listener, client, sock.getsockname()[:2], book.receipts)
            wanted = len(configs) if up is None else up
            await made.until(lambda: upstreams.up_count >= wanted)
            yield made
    finally:
        fleet_module.CHECK_S = check_s
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await listener.close()
        mind.close()


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
