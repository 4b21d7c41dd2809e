"""The listener: bytes of a socket become exchanges, strictly, with a deadline and a cap on everything a client does.

Owns connections and their bounds. Never routes: `gate` says what a head may send, `handle` answers. httptools (llhttp)
parses; what it lets pass and RFC 9112 does not is refused here, so that nobody behind or before us can read the same
bytes differently."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import cast

import httptools

from router.dialects.common import OPENAI_ERRORS
from router.errors import JSON, Headers, RequestError
from router.language.turn import ErrorShape
from router.listener.exchange import Exchange, Head

log = logging.getLogger(__name__)

HOST = re.compile(rb"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
TARGET = re.compile(rb'/[!"$-~]*')  # no fragment: it is the client's own, and some read a path up to it

# Two of one of these are two requests: what stands before or behind us might read the other one.
SINGLE = (b"host", b"transfer-encoding", b"authorization", b"x-api-key")

CUT_S = 1.0  # what a handler may take to notice that its client is gone
CUT_POLL_S = 0.02

Gate = Callable[[Head], int]
Handler = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """What one client, and all together, may take of us."""

    header_bytes_max: int = 32 * 1024  # names, values and target; Claude Code sends about 2 kB
    header_fields_max: int = 100
    header_s: float = 10.0  # from the first byte of a request to the end of its headers
    body_s: float = 30.0  # for the body, and beyond it ...
    body_bytes_per_s: float = 64 * 1024  # ... as long as so much comes each second
    idle_s: float = 75.0  # between requests
    undrained_s: float = 30.0  # a client that reads nothing for so long has left
    linger_s: float = 2.0  # what a refused client still sends is read so long, else a reset would eat our answer
    unsent_bytes_max: int = 256 * 1024  # high-water mark of one connection
    pipelined_max: int = 16  # requests behind the one being answered
    ahead_bytes_max: int = 64 * 1024  # unread bytes behind it
    connections_max: int = 10_000
    sweep_s: float = 1.0  # how often deadlines are looked at; each may be late by this


Shape = Callable[[str], ErrorShape]  # of a request's path


def openai_shape(path: str) -> ErrorShape:
    """OpenAI's, whatever was asked."""
    del path
    return OPENAI_ERRORS


class Listener:
    """A listening socket and its connections."""

    def __init__(
        self, gate: Gate, handle: Handler, limits: ListenerLimits | None = None, shape: Shape = openai_shape
    ) -> None:
        self.gate = gate
        self.handle = handle
        self.limits = limits or ListenerLimits()
        self.shape = shape  # in which dialect an error is told that comes before any handler
        self.is_draining = False
        self.date = formatdate(usegmt=True).encode()
        self.refused_connections = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self._connections: dict[HttpConnection, None] = {}
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    async def start(self, listening: socket.socket) -> None:
        """Take connections from a bound socket; it stays its owner's, who may hand it to a successor."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: HttpConnection(self), sock=listening, backlog=2048)
        self._sweep()

    async def drain(self, grace_s: float) -> None:
        """Take no more connections, let running answers end within the grace, cut what is left."""
        assert self._server is not None, "not started"
        self.is_draining = True
        self._server.close()
        for connection in list(self._connections):
            connection.close_if_idle()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=grace_s)
        await self._cut()
        await self.close()

    async def _cut(self) -> None:
        """End every answer that still runs with an error that says so, and let the errors reach their clients."""
        cut = sum(connection.cut() for connection in list(self._connections))
        if cut:
            log.warning("answers that took longer than the drain and were cut with an error: %d", cut)
        until = asyncio.get_running_loop().time() + CUT_S
        while self._connections and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110 -- at the end, once
            await asyncio.sleep(CUT_POLL_S)

    async def close(self) -> None:
        """Cut everything."""
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._connections):
            connection.transport.abort()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=CUT_S)
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def joined(self, connection: HttpConnection) -> bool:
        """Take a connection in, unless there are too many."""
        if len(self._connections) >= self.limits.connections_max:
            self.refused_connections += 1
            return False
        self._connections[connection] = None
        return True

    def left(self, connection: HttpConnection) -> None:
        self._connections.pop(connection, None)

    def answer(self, exchange: Exchange) -> None:
        """Run the handler of one exchange as a task that the listener owns."""
        task = asyncio.get_running_loop().create_task(self._answer(exchange))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self.handle(exchange)
        except Exception as error:  # border: one request's fault is not the listener's
            log.error("a handler failed", exc_info=error)
            if exchange.has_started:
                exchange.abort()
            else:
                exchange.respond(500, JSON, RequestError(500, "The router failed on this request.").body())

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self.date = formatdate(usegmt=True).encode()
        now = loop.time()
        for connection in list(self._connections):
            connection.check(now)
        self._sweeper = loop.call_later(self.limits.sweep_s, self._sweep)


class HttpConnection(asyncio.Protocol):
    """One client connection. Requests on it are answered one after the other."""

    def __init__(self, listener: Listener) -> None:
        self.transport: asyncio.Transport
        self.is_writable = True
        self._listener = listener
        self._limits = listener.limits
        self._parser = httptools.HttpRequestParser(self)
        self._loop = asyncio.get_running_loop()
        self._answering: Exchange | None = None
        self._next: deque[Exchange | RequestError] = deque()
        self._ahead = bytearray()
        self._is_refusing = False
        self._deadline = self._loop.time() + self._limits.header_s
        self._reset()

    def _reset(self) -> None:
        self._is_receiving = False
        self._target = b""
        self._headers: Headers = []
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._body_bytes_max = 0
        self._head: Head | None = None

    @property
    def date(self) -> bytes:
        return self._listener.date

    # asyncio's side ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # TCP_NODELAY is set by asyncio and uvloop alike
        self.transport.set_write_buffer_limits(high=self._limits.unsent_bytes_max)
        if not self._listener.joined(self):
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._listener.left(self)
        self._next.clear()
        if self._answering is not None:
            self._answering.gone()

    def eof_received(self) -> bool:
        return False  # a client that ends its side has left: asyncio closes, connection_lost follows

    def pause_writing(self) -> None:
        self.is_writable = False
        self._deadline = self._loop.time() + self._limits.undrained_s

    def resume_writing(self) -> None:
        self.is_writable = True
        self._deadline = float("inf")
        if self._answering is not None:
            self._answering.writable()

    def data_received(self, data: bytes) -> None:
        if self._is_refusing:
            return
        if self._answering is not None:
            self._ahead += data
            if len(self._ahead) > self._limits.ahead_bytes_max:
                self.transport.abort()
            return
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(RequestError(400, "Upgrade and CONNECT are not supported."))
        except httptools.HttpParserCallbackError as error:
            self._refuse_callback(error)
        except httptools.HttpParserError as error:
            self._refuse(RequestError(400, f"The request is no valid HTTP: {str(error)[:80]}."))

    def _refuse_callback(self, error: Exception) -> None:
        cause = error.__context__
        if not isinstance(cause, RequestError):
            raise error
        self._refuse(cause)

    # httptools' side --------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._reset()
        self._is_receiving = True
        self._deadline = self._loop.time() + self._limits.header_s

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._header_bytes += len(url)
        if self._header_bytes > self._limits.header_bytes_max:
            raise RequestError(414, "The request's address is larger than this server takes.")

    # Hot: ten times a request.
    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))
        self._header_bytes += len(name) + len(value)
        limits = self._limits
        if self._header_bytes > limits.header_bytes_max or len(self._headers) > limits.header_fields_max:
            raise RequestError(431, "The request's headers are larger than this server takes.")

    def on_headers_complete(self) -> None:
        head = self._head = self._checked_head()
        self._body_bytes_max = self._listener.gate(head)
        if int(head.header(b"content-length") or 0) > self._body_bytes_max:
            raise too_large(self._body_bytes_max)
        self._deadline = self._loop.time() + self._limits.body_s
        if head.header(b"expect") == "100-continue" and self._answering is None and not self._next:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)
        self._body_bytes += len(data)
        self._deadline += len(data) / self._limits.body_bytes_per_s
        if self._body_bytes > self._body_bytes_max:
            raise too_large(self._body_bytes_max)

    def on_message_complete(self) -> None:
        assert self._head is not None
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        keep_open = self._parser.should_keep_alive() and not self._listener.is_draining
        exchange = Exchange(self, self._head, body, self._loop.time(), keep_open=keep_open)
        self._reset()
        self._deadline = float("inf")
        if len(self._next) >= self._limits.pipelined_max:
            raise RequestError(400, "Too many requests are pipelined on this connection.")
        self._next.append(exchange)
        self._pump()

    # RFC 9112 beyond the parser ---------------------------------------------------------------------------------------

    def _checked_head(self) -> Head:
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise RequestError(400, "This version of HTTP is not served.")
        if not TARGET.fullmatch(self._target):
            raise RequestError(400, "The request's target must be a path.")
        fields = dict(reversed(self._headers))
        host, coding = fields.get(b"host"), fields.get(b"transfer-encoding")
        if (host is None and version == "1.1") or (host is not None and not HOST.fullmatch(host)):
            raise RequestError(400, "The request must have exactly one valid Host header.")
        if coding is not None and (coding.strip().lower() != b"chunked" or version == "1.0"):
            raise RequestError(400, "The only transfer coding taken is chunked, on HTTP/1.1.")
        if len(fields) < len(self._headers) and self._has_twice(SINGLE):
            raise RequestError(400, "Host, Transfer-Encoding and keys may be sent once.")
        method = self._parser.get_method().decode("ascii")
        if b"upgrade" in fields or method == "CONNECT":
            raise RequestError(400, "Upgrade and CONNECT are not supported.")
        if fields.get(b"content-encoding", b"identity") != b"identity":
            raise RequestError(415, "Bodies are taken as they are: send it uncompressed, without Content-Encoding.")
        path, _, query = self._target.partition(b"?")
        return Head(method, path.decode("ascii"), query, fields, version == "1.1")

    def _has_twice(self, names: tuple[bytes, ...]) -> bool:
        seen = [name for name, _ in self._headers]
        return any(seen.count(name) > 1 for name in names)

    # Answering --------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        if self._answering is not None or not self._next:
            return
        following = self._next.popleft()
        if isinstance(following, RequestError):
            self._refuse_now(following)
            return
        self._answering = following
        self._listener.answer(following)

    def response_ended(self, exchange: Exchange, *, keep_open: bool) -> None:
        """Its exchange says that the last byte of a response was written."""
        assert exchange is self._answering
        self._answering = None
        if not keep_open or (self._listener.is_draining and not self._next):
            self.transport.close()
            return
        self._deadline = self._loop.time() + self._limits.idle_s
        self._pump()
        if self._ahead and self._answering is None and not self._is_refusing:
            data = bytes(self._ahead)
            self._ahead.clear()
            self._feed(data)

    def _refuse(self, error: RequestError) -> None:
        """Framing is lost: answer what came before, then this, then close."""
        self._is_refusing = True
        self._next.append(error)
        self._pump()

    def _refuse_now(self, error: RequestError) -> None:
        status, headers, body = self._listener.shape(self._target.decode("latin-1")).refusal(error)
        line = b"HTTP/1.1 %d Refused\r\n" % status
        fields = b"".join(b"%b: %b\r\n" % field for field in headers)
        fixed = b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(line + fields + fixed + body)
        self._deadline = self._loop.time() + self._limits.linger_s
        if self.transport.can_write_eof():
            self.transport.write_eof()

    # Deadlines --------------------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """The listener's sweep: end what took too long."""
        if now < self._deadline:
            return
        self._deadline = float("inf")
        if self._is_receiving and not self._is_refusing:
            self._refuse(RequestError(408, "The request took too long to arrive."))
        else:
            self.transport.abort()

    def cut(self) -> bool:
        """End of the drain. Whether an answer was cut."""
        if self._answering is None:
            self.transport.abort()
            return False
        self._answering.cut()
        return True

    def close_if_idle(self) -> None:
        """Drain: between requests there is nothing to wait for."""
        if self._answering is None and not self._next and not self._is_receiving:
            self.transport.close()


def too_large(bytes_max: int) -> RequestError:
    """413, with the limit that holds on this route."""
    return RequestError(413, f"The body is larger than the {bytes_max} bytes that this route takes.")
