"""One answer on its way out: tokens become bytes in the client's dialect, as fast as its class and the client want.

Owns speech, encoder and exchange of one request from its first byte to its last. Never decides where it runs or how
it ends: its relay does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from router.delivery.order import Order, Services
from router.delivery.ports import Outlet
from router.errors import JSON, ErrorDetail, Headers
from router.language.turn import Encoder, Ending, Event, PartStart, Usage, Versioned, Weights, parts_of

SSE: Headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Teller(Protocol):
    """The relay, to its answer."""

    def headers(self) -> Headers:
        """What the response says of the request."""

    def usage(self) -> Usage:
        """Tokens so far."""

    def fault(self, error: Exception) -> None:
        """Sending failed by our own fault."""


class Answer:
    """Implements router.delivery.flusher.Flushable."""

    def __init__(self, order: Order, exchange: Outlet, services: Services, teller: Teller) -> None:
        self._encoder, self._errors, self._is_stream = order.encoder, order.errors, order.turn.is_stream
        self._exchange, self._services, self._teller = exchange, services, teller
        self.speech = order.text.speech(order.turn)
        self.is_watched = True  # whether a person reads along: then every token leaves at once
        self._unsent: list[Event] = []
        self._unsent_tokens = 0
        self._is_flush_soon = False
        self._weights = 0
        self._flushed_at = 0.0
        self._has_opened = False  # the encoder's first bytes are out
        self._timer: asyncio.TimerHandle | None = None
        if self._is_stream:
            self._arm(services.limits.commit_after_s)

    def computed_by(self, version: int) -> None:
        """The version of the weights that make what is said next; 0 is what a worker started with."""
        if version == self._weights or not isinstance(self._encoder, Versioned):
            return
        self._weights = version
        if self._unsent:  # what others made must leave under their name
            self._unsent.append(Weights(version))
        else:
            self._encoder.computed_by(version)

    # Hot: once per token and stream. Budget 12 us with its write for chatbot+, 6 coalesced; bench/router.py.
    def say(self, ids: Sequence[int]) -> None:
        """More tokens. `speech.has_stopped` may be true then."""
        self._unsent += self.speech.feed(ids)
        if self._is_stream and not self.speech.has_stopped:
            self._unsent_tokens += len(ids)
            if not self._is_flush_soon and (self.is_watched or self._is_flush_due()):
                self._is_flush_soon = True
                self._services.flusher.soon(self)

    def _is_flush_due(self) -> bool:
        """Of an answer that nobody watches."""
        limits = self._services.limits
        if not self._has_opened or self._unsent_tokens >= limits.coalesce_tokens:
            return True
        return self._services.clock() - self._flushed_at > limits.coalesce_s

    def flush(self) -> None:
        """Send what is there, unless the client is behind: then it stays text, and `on_writable` comes back here."""
        self._is_flush_soon = False
        exchange = self._exchange
        if not self._unsent or not self._is_stream or not exchange.is_writable or exchange.has_ended:
            return
        data = self._taken()
        if self._has_opened:
            if data:
                exchange.write(data)
        else:
            self._open(data)
        if not self.is_watched:
            self._flushed_at = self._services.clock()

    def fault(self, error: Exception) -> None:
        self._teller.fault(error)

    def finish(self, ending: Ending, usage: Usage) -> None:
        """The proper end; `speech` has finished, and `last` holds what it said then."""
        self._disarm()
        if not self._is_stream:
            for event in self._unsent:
                if isinstance(event, Weights) and isinstance(self._encoder, Versioned):
                    self._encoder.computed_by(event.version)
            whole = self._encoder.whole(parts_of(self._unsent), ending, usage)
            self._exchange.respond(200, JSON + self._teller.headers(), whole)
            return
        last = self._taken() + self._encoder.close(ending, usage)
        if self._has_opened:
            self._exchange.end(last)
        else:
            self._open(last)
            self._exchange.end()

    def hear_the_end(self) -> None:
        """The model says no more: take what its speech held back."""
        self._unsent += self.speech.finish()

    def fail(self, status: int, detail: ErrorDetail, headers: Headers) -> None:
        """The end that is an error: a status if none was sent yet, else an event."""
        self._disarm()
        if self._exchange.has_started:
            self._exchange.end(self._encoder.fail(status, detail))
        else:
            status, body = self._errors.body(status, detail)
            self._exchange.respond(status, JSON + self._teller.headers() + headers, body)

    def drop(self) -> None:
        """Nobody listens any more."""
        self._disarm()
        self._unsent.clear()

    def _taken(self) -> bytes:
        """The bytes of what is unsent; in front of the first ones, what opens an answer."""
        opening = b"" if self._has_opened else self._encoder.open(self._teller.usage())
        data = _encoded(self._encoder, self._unsent)
        self._unsent.clear()
        self._unsent_tokens = 0
        return opening + data

    def _open(self, data: bytes) -> None:
        """The first bytes of the answer; with them the status, unless it stands already."""
        self._disarm()
        self._has_opened = True
        if self._exchange.has_started:
            self._exchange.write(data)
        else:
            self._exchange.start(200, SSE + self._teller.headers(), data)

    # Waiting ----------------------------------------------------------------------------------------------------------

    def _arm(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._commit_early)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _commit_early(self) -> None:
        """Nothing came for long: say that we live. From here on errors go in-stream."""
        if self._exchange.has_started:
            self._exchange.write(self._encoder.heartbeat())
        else:
            self._exchange.start(200, SSE + self._teller.headers(), self._encoder.heartbeat())
        self._arm(self._services.limits.heartbeat_s)


# Hot: once per flush of a stream.
def _encoded(encoder: Encoder, events: Sequence[Event]) -> bytes:
    """The bytes of events; neighbours of one part leave as one delta."""
    if len(events) == 1 and type(events[0]) is str:
        return encoder.delta(events[0])
    said: list[bytes] = []
    texts: list[str] = []
    for event in events:
        if isinstance(event, str):
            texts.append(event)
            continue
        if texts:
            said.append(encoder.delta("".join(texts)))
            texts.clear()
        if isinstance(event, Weights):
            assert isinstance(encoder, Versioned), "nobody else is told"
            encoder.computed_by(event.version)
        else:
            said.append(encoder.start(event) if isinstance(event, PartStart) else encoder.end())
    if texts:
        said.append(encoder.delta("".join(texts)))
    return b"".join(said)
