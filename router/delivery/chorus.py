"""Several answers to one request as one response: each is a request of its own to the mind, all share the client.

Owns the exchange of such a request. Never decides: every answer is charged, placed and resumed by itself, and the
engine's prefix cache computes their common prompt once."""

from __future__ import annotations

from collections.abc import Callable

from router.delivery.ports import Outlet
from router.errors import Headers

REQUEST_HEADER = b"x-headway-request"


class Chorus:
    """Joins its voices' bytes. The first error that comes before any answer is the response, and ends the others."""

    def __init__(self, exchange: Outlet, request_id: str, count: int) -> None:
        self._exchange = exchange
        self._request_id = request_id.encode()
        self.voices = [Voice(self, exchange) for _ in range(count)]
        self._left = count
        exchange.on_cut = self._cut
        exchange.on_gone = self._gone
        exchange.on_writable = self._writable

    def start(self, status: int, headers: Headers, first: bytes) -> None:
        """A voice's first bytes; the status stands with the first of them."""
        if self._exchange.has_started:
            self._exchange.write(first)
        else:
            self._exchange.start(status, self._named(headers), first)

    def end(self, last: bytes) -> None:
        """A voice's last bytes."""
        self._left -= 1
        if not self._left:
            self._exchange.end(last)
        elif last:
            self._exchange.write(last)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """A voice's whole answer; the last one's body holds them all. An error is told at once."""
        if self._exchange.has_ended:
            return
        self._left -= 1
        if status >= 400 or not self._left:
            self._exchange.respond(status, self._named(headers), body)
            self._gone()

    def _named(self, headers: Headers) -> Headers:
        return [(name, self._request_id if name == REQUEST_HEADER else value) for name, value in headers]

    def _cut(self) -> None:
        for voice in self.voices:
            if voice.on_cut is not None:
                voice.on_cut()

    def _gone(self) -> None:
        for voice in self.voices:
            voice.leave()

    def _writable(self) -> None:
        for voice in self.voices:
            if voice.on_writable is not None:
                voice.on_writable()


class Voice:
    """router.delivery.ports.Outlet of one answer."""

    __slots__ = ("_chorus", "_exchange", "has_ended", "on_cut", "on_gone", "on_writable")

    def __init__(self, chorus: Chorus, exchange: Outlet) -> None:
        self._chorus = chorus
        self._exchange = exchange
        self.has_ended = False
        self.on_cut: Callable[[], None] | None = None
        self.on_gone: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None

    @property
    def has_started(self) -> bool:
        """Once one voice is heard, the others' errors come in the stream."""
        return self._exchange.has_started

    @property
    def is_writable(self) -> bool:
        return self._exchange.is_writable

    def start(self, status: int, headers: Headers, first: bytes) -> None:
        self._chorus.start(status, headers, first)

    def write(self, data: bytes) -> None:
        self._exchange.write(data)

    def end(self, last: bytes = b"") -> None:
        self._over()
        self._chorus.end(last)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self._over()
        self._chorus.respond(status, headers, body)

    def leave(self) -> None:
        """The client is gone, or has its answer already."""
        on_gone, is_over = self.on_gone, self.has_ended
        self._over()
        if on_gone is not None and not is_over:
            on_gone()

    def _over(self) -> None:
        self.has_ended = True
        self.on_cut = self.on_gone = self.on_writable = None
