"""The client: HTTP/1.1 with keep-alive and server-sent events, stamped as the bytes come in.

Owns sockets and the stamps. Never decides what to send or whether an answer was good; it behaves as a real client does:
it obeys Retry-After a bounded number of times, and hangs up when its patience ends."""

# Hot: `data_received` runs once per network read, and its stamp is the measurement. No JSON is parsed here.

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import cast
from urllib.parse import urlsplit

# As the SDKs of OpenAI and Anthropic do, alike; but without their jitter, so that a run can be repeated.
RETRIES_MAX = 2
RETRY_AFTER_MAX_S = 60.0  # a longer wait is not obeyed: they come back by their own pause
RETRY_FIRST_S, RETRY_MOST_S = 0.5, 8.0  # that pause, doubled each time
IDLE_MAX = 256  # kept connections
HEAD_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 16 * 1024 * 1024
REFUSALS = (429, 503, 529)  # 529: Anthropic's overloaded

Clock = Callable[[], float]


@dataclass(slots=True)
class Answer:
    """One exchange: status and headers, then body pieces with the time at which each came.

    The caller makes it and it fills as bytes come, so that a client that leaves still knows what it had been given."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    sent_at: float = 0.0
    ended_at: float = 0.0
    error: str = ""  # of the transport: what cut the answer short
    attempts: int = 0

    def begin(self, now: float) -> None:
        """Forget what an earlier attempt brought."""
        self.status, self.error, self.sent_at, self.ended_at = 0, "", now, 0.0
        self.headers.clear()
        self.pieces.clear()

    def body(self) -> bytes:
        """All pieces as one."""
        return b"".join(piece for _, piece in self.pieces)

    def events(self) -> list[tuple[float, bytes]]:
        """The `data:` payloads of an event stream, each with the time at which its last byte came."""
        events, rest = [], b""
        for at, piece in self.pieces:
            *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            for text in whole:
                data = b"\n".join(line[5:].strip() for line in text.split(b"\n") if line.startswith(b"data:"))
                if data:
                    events.append((at, data))
        return events


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Target:
        """From `http://host:port/prefix`. Raises ValueError for anything else."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// address (TLS is not spoken here)")
        return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/"))


class Connection(asyncio.Protocol):
    """One keep-alive connection; carries one exchange at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._left = 0  # body bytes, or bytes of the current chunk and its line end
        self._framing = ""  # head | length | size | chunk | trailer | close
        self._body_bytes = 0
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A TCP transport can write; uvloop's does not inherit asyncio's class, hence no isinstance.
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._framing == "close":
            self._finish("")
        else:
            self._finish(f"the connection was lost: {exc}" if exc else "the server closed the connection early")

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send, and wait until `answer` is whole or broken. Cancelling it closes the connection."""
        assert self._transport is not None
        assert self._answer is None
        self._answer = answer
        self._done = asyncio.get_running_loop().create_future()
        self._framing, self._buffer, self._body_bytes = "head", b"", 0
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self._finish("the client left")
            self.close()
            raise

    def close(self) -> None:
        """Hang up at once: what a client does that leaves."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = self._clock()
        self._buffer += data
        if self._answer is None:
            self.close()  # bytes that nobody asked for
            return
        try:
            while self._answer is not None and self._step(self._answer, now):
                pass
        except ValueError as error:
            self._finish(str(error))
            self.close()

    def _step(self, answer: Answer, now: float) -> bool:
        """Consume one unit of the answer; False when more bytes are needed."""
        if self._framing in ("length", "chunk", "close"):
            return self._take_body(answer, now)
        end = b"\r\n\r\n" if self._framing == "head" else b"\r\n"
        at = self._buffer.find(end)
        if at < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise ValueError("the response head is too long")
            return False
        line, self._buffer = self._buffer[:at], self._buffer[at + len(end) :]
        if self._framing == "head":
            self._read_head(answer, line)
        elif self._framing == "size":
            self._read_size(line)
        elif not line:
            self._finish("")  # the empty line behind the last chunk
        return True

    def _read_head(self, answer: Answer, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        parts = first.split(" ", 2)
        if not first.startswith("HTTP/1.") or len(parts) < 2 or not parts[1].isdecimal():
            raise ValueError("the response is not HTTP/1.1")
        answer.status = int(parts[1])
        for line in lines:
            name, _, value = line.partition(":")
            answer.headers[name.strip().lower()] = value.strip()
        if answer.status < 200:
            answer.headers.clear()  # an interim answer; the real one follows
        elif "chunked" in answer.headers.get("transfer-encoding", "").lower():
            self._framing = "size"
        elif "content-length" in answer.headers:
            self._framing, self._left = "length", int(answer.headers["content-length"])
            if self._left == 0:
                self._finish("")
        else:
            self._framing = "close"

    def _read_size(self, line: bytes) -> None:
        size = int(line.split(b";")[0], 16)  # ValueError: not a chunk
        self._framing, self._left = ("chunk", size + 2) if size else ("trailer", 0)

    def _take_body(self, answer: Answer, now: float) -> bool:
        if not self._buffer:
            return False
        take = len(self._buffer) if self._framing == "close" else min(self._left, len(self._buffer))
        piece, self._buffer = self._buffer[:take], self._buffer[take:]
        self._left -= take
        if self._framing == "chunk" and self._left < 2:
            piece = piece[: len(piece) - min(len(piece), 2 - self._left)]  # without the chunk's own line end
        self._body_bytes += len(piece)
        if self._body_bytes > BODY_BYTES_MAX:
            raise ValueError("the response body is too long")
        if piece:
            answer.pieces.append((now, piece))
        if self._left == 0 and self._framing == "chunk":
            self._framing = "size"
        elif self._left == 0 and self._framing == "length":
            self._finish("")
        return True

    def _finish(self, error: str) -> None:
        if self._answer is None:
            return
        self._answer.ended_at, self._answer.error = self._clock(), error
        if error or self._framing == "close" or self._answer.headers.get("connection", "").lower() == "close":
            self.is_open = False
        self._answer = None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


@dataclass(slots=True)
class Client:
    """Posts to one target over as many connections as are wanted at once: there is no cap to wait for."""

    target: Target
    clock: Clock = time.monotonic
    _idle: list[Connection] = field(default_factory=list)

    async def post(self, path: str, headers: Mapping[str, str], body: bytes, answer: Answer) -> None:
        """One exchange, into `answer`. A transport error is in the answer, not raised."""
        request = self._head(path, headers, len(body)) + body
        answer.attempts += 1
        answer.begin(self.clock())
        while (kept := self._kept()) is not None:
            await self._exchange(kept, request, answer)
            if answer.status or not answer.error:
                return
            # The server closed an idle connection just as it was used: every HTTP client tries again.
            answer.begin(answer.sent_at)
        try:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(
                lambda: Connection(self.clock), self.target.host, self.target.port
            )
        except OSError as error:
            answer.ended_at, answer.error = self.clock(), f"cannot connect: {error}"
            return
        await self._exchange(connection, request, answer)

    def _kept(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _exchange(self, connection: Connection, request: bytes, answer: Answer) -> None:
        await connection.exchange(request, answer)
        if connection.is_open and len(self._idle) < IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.close()

    def _head(self, path: str, headers: Mapping[str, str], length: int) -> bytes:
        lines = [f"POST {self.target.prefix}{path} HTTP/1.1", f"host: {self.target.host}:{self.target.port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["content-type: application/json", f"content-length: {length}", "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def close(self) -> None:
        """Drop the kept connections."""
        while self._idle:
            self._idle.pop().close()


def retry_after_s(answer: Answer) -> float | None:
    """When a refused client should come back; None: it should not, or this was no refusal."""
    headers = answer.headers
    if answer.status not in REFUSALS or headers.get("x-should-retry") == "false":
        return None
    told_s = _told_s(headers)
    if told_s is not None and 0 < told_s <= RETRY_AFTER_MAX_S:
        return told_s
    return min(RETRY_MOST_S, RETRY_FIRST_S * 2.0 ** max(0, answer.attempts - 1))


def _told_s(headers: Mapping[str, str]) -> float | None:
    """Milliseconds, seconds or a date, in this order."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return float(headers[name]) * unit_s
    with contextlib.suppress(KeyError, ValueError):
        return parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    return None


async def post_obediently(client: Client, path: str, headers: Mapping[str, str], body: bytes, answer: Answer) -> None:
    """`post`, and again when a refusal asks for it: `answer` is the last one, and counts its attempts."""
    for _ in range(RETRIES_MAX):
        await client.post(path, headers, body, answer)
        wait_s = retry_after_s(answer)
        if wait_s is None:
            return
        await asyncio.sleep(wait_s)
    await client.post(path, headers, body, answer)
