"""A scripted server: speaks HTTP and event streams as the test says, and stamps what it sends by its own clock.

Owns one loopback port. Never measures latency: that is the client's claim, which tests compare with these stamps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Asked:
    """One request as it came, and the means to answer it."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, object]
    came: float
    transport: asyncio.WriteTransport
    sent: list[float] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, data: bytes) -> None:
        """Raw bytes."""
        self.transport.write(data)

    def json(self, status: int, body: object, **headers: str) -> None:
        """A whole answer."""
        data = json.dumps(body).encode()
        self.send(head(status, **{"content-length": str(len(data)), "content-type": "application/json", **headers}))
        self.send(data)

    def open_stream(self, **headers: str) -> None:
        """The head of an event stream."""
        self.send(head(200, **{"content-type": "text/event-stream", "transfer-encoding": "chunked", **headers}))

    def event(self, data: bytes) -> None:
        """Any event's bytes, as one chunk."""
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def token(self, text: str = " a") -> None:
        """One token, stamped."""
        self.sent.append(time.monotonic())
        self.event(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n")

    def close_stream(self, output: int = 0, cached: int = 0) -> None:
        """Usage, [DONE], and the last chunk."""
        usage = {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": output or len(self.sent),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        self.event(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        self.event(DONE)
        self.send(b"0\r\n\r\n")

    @property
    def prompt(self) -> list[int]:
        """The token ids; none of words."""
        prompt = self.body.get("prompt", [])
        return prompt if isinstance(prompt, list) else []


Script = Callable[[Asked], Awaitable[None]]


@dataclass(slots=True)
class Scripted:
    """The server while it runs."""

    port: int
    asked: list[Asked]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


async def answer_all(asked: Asked) -> None:
    """As a fast server would: every token at once; whole where no stream was wanted."""
    wanted = asked.body.get("max_tokens", 1)
    assert isinstance(wanted, int)
    if not asked.body.get("stream"):
        usage = {"prompt_tokens": len(asked.prompt), "completion_tokens": wanted}
        asked.json(200, {"choices": [{"text": " a" * wanted}], "usage": usage})
        return
    asked.open_stream(**{"x-headway-class": "chatbot+", "x-headway-worker": "w0"})
    for _ in range(wanted):
        asked.token()
    asked.close_stream()


def head(status: int, **headers: str) -> bytes:
    """A response head."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


@dataclass(slots=True)
class _Served(asyncio.Protocol):
    """One connection: each whole request starts the script; a client that hangs up is told to it."""

    script: Script
    asked: list[Asked]
    tasks: set[asyncio.Task[None]]
    transport: asyncio.WriteTransport | None = None
    buffer: bytes = b""
    current: Asked | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        assert self.transport is not None
        top, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = top.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        body = json.loads(rest) if length else {}
        self.buffer = b""  # the client under test sends nothing before it has its answer
        came = time.monotonic()
        self.current = Asked(len(self.asked), first.split(" ")[1], headers, body, came, self.transport)
        self.asked.append(self.current)
        task = asyncio.ensure_future(self._answer(self.current))
        self.tasks.add(task)

    async def _answer(self, asked: Asked) -> None:
        try:
            await self.script(asked)
        except Exception:
            asked.transport.abort()  # so that nobody waits for the rest
            raise

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self.current is not None:
            self.current.left.set()


@contextlib.asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Scripted]:
    """Serve `script` for the length of the block."""
    asked: list[Asked] = []
    tasks: set[asyncio.Task[None]] = set()
    connections: list[_Served] = []

    def connect() -> _Served:
        connections.append(_Served(script, asked, tasks))
        return connections[-1]

    server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    try:
        yield Scripted(server.sockets[0].getsockname()[1], asked)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for connection in connections:
            if connection.transport is not None:
                connection.transport.abort()
        await server.wait_closed()
    for fault in ended:
        if isinstance(fault, Exception):
            raise fault  # of a script
