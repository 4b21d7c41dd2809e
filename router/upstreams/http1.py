"""HTTP/1.1 to an upstream: one request at a time on a connection, its reply passed on as the bytes come in.

Owns connections and those that wait for their next request. A connection belongs to one call or to nobody, so nothing
is ever left half taken: who cancels a call closes its connection, and no other call notices."""

from __future__ import annotations

import asyncio
import ssl
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from router.errors import Headers

NO_BODY = (204, 304)


@dataclass(frozen=True, slots=True)
class UpstreamLimits:
    """What an upstream may take of us."""

    connect_s: float = 2.0
    first_byte_s: float = 600.0  # an answer that is no stream says nothing before its end
    idle_s: float = 120.0  # between two pieces of a reply: a stalled engine, or a network that is gone
    header_bytes_max: int = 64 * 1024
    kept_max: int = 64  # idle connections to one upstream
    kept_s: float = 20.0  # uvicorn closes them after 5 s, others after 60: a closed one costs one more dial


class Listener(Protocol):
    """Who asked. Hears a head, data, and then one ending."""

    def head(self, status: int, headers: Headers) -> None: ...
    def data(self, data: bytes) -> None: ...
    def end(self) -> None:
        """The reply is whole."""

    def failed(self, reason: str) -> None:
        """It is not, and nothing more comes."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an upstream listens."""

    host: str
    port: int
    is_tls: bool

    @classmethod
    def of(cls, url: str) -> Origin:
        """Raises ValueError for what is no http or https URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError("an upstream is http://HOST:PORT or https://HOST:PORT")
        is_tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), is_tls)

    @property
    def authority(self) -> str:
        """For the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class Connection(asyncio.Protocol):
    """One connection. `listener` is set while a reply is awaited."""

    def __init__(self, limits: UpstreamLimits, free: Callable[[Connection], None]) -> None:
        self.transport: asyncio.Transport
        self._is_made = False
        self.freed_at = 0.0
        self.has_reply = False  # a byte of the awaited reply came
        self._limits = limits
        self._free = free
        self._loop = asyncio.get_running_loop()
        self._listener: Listener | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._headers: Headers = []
        self._header_bytes = 0
        self._ends_at_close = False

    @property
    def is_usable(self) -> bool:
        return self._listener is None and not self.transport.is_closing()

    def ask(self, request: bytes, listener: Listener) -> None:
        """Send a request; `listener` hears the reply."""
        assert self._listener is None, "one at a time"
        self._listener, self.has_reply = listener, False
        self._parser = httptools.HttpResponseParser(self)
        self._headers, self._header_bytes, self._ends_at_close = [], 0, False
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(self._limits.idle_s, self._look)
        self.transport.write(request)

    def drop(self) -> None:
        """Nobody wants the reply: close, so that the engine stops. Its listener hears nothing more."""
        self._listener = None
        self._disarm()
        self.transport.abort()

    def give_up(self) -> None:
        """Whoever dialled does not want it any more."""
        if self._is_made:
            self.transport.abort()

    def pause(self) -> None:
        """The client is behind: read no more until `resume`."""
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        if not self.transport.is_closing():
            self._heard_at = self._loop.time()
            self.transport.resume_reading()

    # asyncio's side ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._is_made = True

    # Hot: once per piece of a stream.
    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self.has_reply = True
        if self._listener is None:
            self.transport.abort()  # nobody asked for this
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            cause = error.__context__
            if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(cause, ValueError):
                raise
            self._fail(f"no valid HTTP: {cause or error}"[:200])

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._listener is not None and self._ends_at_close and exc is None:
            self._settle().end()
        else:
            self._fail(f"connection lost: {exc}" if exc else "connection closed")

    # httptools' side --------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self._limits.header_bytes_max:
            raise ValueError("its headers are too large")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._headers.clear()
            return
        framed = any(name in (b"content-length", b"transfer-encoding") for name, _ in self._headers)
        self._ends_at_close = not framed and status not in NO_BODY
        if self._listener is not None:
            self._listener.head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if self._listener is not None:
            self._listener.data(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200 or self._listener is None:
            return
        keep = self._parser.should_keep_alive() and not self._ends_at_close
        listener = self._settle()
        if keep:
            self.freed_at = self._loop.time()
            self._free(self)
        else:
            self.transport.close()
        listener.end()

    # Ending -----------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Whether the upstream has been silent for too long."""
        most_s = self._limits.idle_s if self.has_reply else self._limits.first_byte_s
        left_s = self._heard_at + most_s - self._loop.time()
        if left_s <= 0 and self.transport.is_reading():
            self._fail(f"silent for {most_s:g} s")
            return
        again_s = left_s if 0 < left_s < self._limits.idle_s else self._limits.idle_s
        self._timer = self._loop.call_later(again_s, self._look)

    def _settle(self) -> Listener:
        listener, self._listener = self._listener, None
        assert listener is not None, "a reply that somebody awaits"
        self._disarm()
        return listener

    def _fail(self, reason: str) -> None:
        self.transport.abort()
        if self._listener is not None:
            self._settle().failed(reason)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Pool:
    """Connections to all upstreams. A call takes one, or dials; there is no queue, so none can be stuck in it."""

    def __init__(self, limits: UpstreamLimits | None = None) -> None:
        self.limits = limits or UpstreamLimits()
        self._idle: defaultdict[Origin, deque[Connection]] = defaultdict(deque)
        self._tls: ssl.SSLContext | None = None

    def idle_count(self, origin: Origin) -> int:
        return len(self._idle[origin])

    def take(self, origin: Origin) -> Connection | None:
        """A connection that is open and idle, the last used first."""
        idle = self._idle[origin]
        oldest = asyncio.get_running_loop().time() - self.limits.kept_s
        while idle:
            connection = idle.pop()
            if connection.is_usable and connection.freed_at >= oldest:
                return connection
            connection.drop()
        return None

    async def dial(self, origin: Origin) -> Connection:
        """A new connection. Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        context = self._context() if origin.is_tls else None

        def free(connection: Connection) -> None:
            idle = self._idle[origin]
            idle.append(connection)
            while len(idle) > self.limits.kept_max:
                idle.popleft().drop()

        connection = Connection(self.limits, free)
        try:
            async with asyncio.timeout(self.limits.connect_s):
                await loop.create_connection(lambda: connection, origin.host, origin.port, ssl=context)
        except BaseException:
            connection.give_up()  # cancelled between the connect and its news: nobody else knows of it
            raise
        return connection

    def close(self) -> None:
        """Close what is idle."""
        for idle in self._idle.values():
            while idle:
                idle.pop().drop()

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


class Call:
    """One request to one origin. Its listener hears the reply, unless `abort` came first."""

    def __init__(self, pool: Pool, origin: Origin, request: bytes, listener: Listener) -> None:
        self._pool, self._origin, self._request, self._listener = pool, origin, request, listener
        self._connection: Connection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._is_over = False
        self._is_reused = False
        if (kept := pool.take(origin)) is not None:
            self._is_reused = True
            self._send(kept)
        else:
            self._dial()

    def abort(self) -> None:
        """The reply is not wanted any more. Idempotent."""
        self._is_over = True
        if self._dialling is not None:
            self._dialling.cancel()
        if self._connection is not None:
            self._connection.drop()
            self._connection = None

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def _dial(self) -> None:
        self._dialling = asyncio.get_running_loop().create_task(self._dialled())

    async def _dialled(self) -> None:
        try:
            connection = await self._pool.dial(self._origin)
        except (OSError, TimeoutError) as error:
            if not self._is_over:
                self._is_over = True
                self._listener.failed(f"cannot connect: {error or 'timed out'}")
            return
        if self._is_over:
            connection.give_up()
        else:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        connection.ask(self._request, self)

    # http1.Listener ---------------------------------------------------------------------------------------------------

    def head(self, status: int, headers: Headers) -> None:
        if not self._is_over:
            self._listener.head(status, headers)

    def data(self, data: bytes) -> None:
        if not self._is_over:
            self._listener.data(data)

    def end(self) -> None:
        self._connection = None
        if not self._is_over:
            self._is_over = True
            self._listener.end()

    def failed(self, reason: str) -> None:
        connection, self._connection = self._connection, None
        if self._is_over:
            return
        if self._is_reused and connection is not None and not connection.has_reply:
            self._is_reused = False  # it was closed while it lay idle: this says nothing about the upstream
            self._dial()
            return
        self._is_over = True
        self._listener.failed(reason)
