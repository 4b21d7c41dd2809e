"""One HTTP request and its response, past ASGI: whole, or streamed in chunks straight to the transport.

Owns the bytes of one response. Never parses: the listener made the head and body it carries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

from msgspec import Struct

from router.errors import Headers

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_STATUS_LINES[529] = b"HTTP/1.1 529 Overloaded\r\n"  # Anthropic's own


class Head(Struct, frozen=True):
    """The request line and headers. Names are lower case; `path` is as sent, never decoded or normalised."""

    method: str
    path: str
    query: bytes
    fields: dict[bytes, bytes]  # the first of each name; what a chunked body brings behind it is no header
    is_http_11: bool

    def header(self, name: bytes) -> str | None:
        """The first header of this name."""
        value = self.fields.get(name)
        return None if value is None else value.decode("latin-1").strip()


class Connection(Protocol):
    """What an exchange needs of its connection."""

    transport: asyncio.Transport

    @property
    def is_writable(self) -> bool: ...
    @property
    def date(self) -> bytes: ...
    def response_ended(self, exchange: Exchange, *, keep_open: bool) -> None: ...


class Exchange:
    """A request being answered. `on_gone` is called once when the client leaves before the end; `on_cut` when the
    server stops before it; `on_writable` each time a slow client has caught up."""

    __slots__ = (
        "_connection",
        "_is_chunked",
        "_keep_open",
        "arrived",
        "body",
        "has_ended",
        "has_started",
        "head",
        "is_gone",
        "on_cut",
        "on_gone",
        "on_writable",
    )

    def __init__(self, connection: Connection, head: Head, body: bytes, arrived: float, *, keep_open: bool) -> None:
        self.head = head
        self.body = body
        self.arrived = arrived  # local monotonic seconds of the last body byte
        self.has_started = self.has_ended = self.is_gone = False
        self.on_cut: Callable[[], None] | None = None
        self.on_gone: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self._connection = connection
        self._keep_open = keep_open and head.is_http_11
        self._is_chunked = False

    @property
    def is_writable(self) -> bool:
        """Whether the client keeps up: its unsent bytes are below the high-water mark."""
        return self._connection.is_writable

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole response at once. Nothing happens when the client is gone."""
        if self.is_gone:
            return
        head = self._head(status, [*headers, (b"content-length", b"%d" % len(body))])
        self._connection.transport.write(head if self.head.method == "HEAD" else head + body)
        self._end()

    def start(self, status: int, headers: Headers, first: bytes) -> None:
        """Begin a stream: status line, headers and the first bytes in one write. The status stands from here on."""
        if self.is_gone:
            return
        self._is_chunked = self.head.is_http_11
        if self._is_chunked:
            headers = [*headers, (b"transfer-encoding", b"chunked")]
        else:
            self._keep_open = False  # the end of the connection is the end of the body
        self.has_started = True
        self._connection.transport.write(self._head(status, headers) + self._chunk(first))

    # Hot: once per flush of a stream. One join, one write; bench/router.py.
    def write(self, data: bytes) -> None:
        """More of a stream."""
        if not self.is_gone:
            self._connection.transport.write(self._chunk(data))

    def end(self, last: bytes = b"") -> None:
        """The last bytes of a stream."""
        if self.is_gone:
            return
        tail = self._chunk(last) if last else b""
        self._connection.transport.write(tail + b"0\r\n\r\n" if self._is_chunked else tail)
        self._end()

    def abort(self) -> None:
        """Break the connection: the client sees that the response is cut, never a whole one."""
        if not self.is_gone:
            self._connection.transport.abort()

    def gone(self) -> None:
        """The connection says that the client left. Idempotent."""
        if self.is_gone or self.has_ended:
            return
        self.is_gone = True
        if self.on_gone is not None:
            self.on_gone()

    def cut(self) -> None:
        """The server waits no longer: end with an error if the answer knows how."""
        if self.on_cut is not None:
            self.on_cut()
        else:
            self.abort()

    def writable(self) -> None:
        """The connection says that the client has caught up."""
        if self.on_writable is not None and not self.is_gone:
            self.on_writable()

    def _chunk(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data

    def _head(self, status: int, headers: Headers) -> bytes:
        self.has_started = True
        lines = [_STATUS_LINES[status], b"date: ", self._connection.date, b"\r\n"]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        if not self._keep_open:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _end(self) -> None:
        self.has_ended = True
        self.on_cut = self.on_gone = self.on_writable = None
        self._connection.response_ended(self, keep_open=self._keep_open)
