"""Answers that outlive their client: finished when it asked for that, and sent again under the same Idempotency-Key.

Owns who reads an answer, and what is kept of it. Never decides how it is made: to its relay a kept answer is an outlet
like any other, whose client does not leave."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import xxhash

from router.delivery.ports import Outlet
from router.errors import Headers, RequestError
from router.listener.exchange import Exchange, Head

KEY_HEADER, DISCONNECT_HEADER = b"idempotency-key", b"x-headway-on-disconnect"
DISCONNECTS = ("abort", "finish")
FINISHED = "finished"  # the one outcome that is worth sending again
JOINED = (b"x-headway-notice", b"joined an earlier request by its Idempotency-Key")

Name = tuple[str, str]  # organisation, Idempotency-Key


@dataclass(frozen=True, slots=True)
class KeptLimits:
    """What is kept for clients who come back."""

    key_chars_max: int = 255
    answers_max: int = 1024
    answer_bytes_max: int = 4 * 1024 * 1024  # of one; a longer one is finished, and cannot be sent again
    bytes_max: int = 64 * 1024 * 1024  # of all
    kept_s: float = 300.0  # behind its end


class KeptAnswer:
    """router.delivery.ports.Outlet of an answer whose readers come and go."""

    def __init__(self, exchange: Exchange, digest: bytes, bytes_max: int) -> None:
        self.digest = digest  # of what was asked
        self.ended_at: float | None = None
        self.has_started = self.has_ended = False
        self.on_cut: Callable[[], None] | None = None
        self.on_gone: Callable[[], None] | None = None  # never called: that is the point
        self.on_writable: Callable[[], None] | None = None
        self._status, self._headers = 0, Headers()
        self._is_whole = False  # one body, no stream
        self._pieces: list[bytes] | None = []  # None: too many to be sent again
        self._bytes_max = bytes_max
        self.bytes_held = 0
        self._readers: dict[Exchange, asyncio.Future[None]] = {}
        self._attach(exchange)

    @property
    def is_writable(self) -> bool:
        """Whether all who read keep up; what they leave unread stays text meanwhile."""
        return all(reader.is_writable for reader in self._readers)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self._is_whole = True
        self._begin(status, headers, body)
        for reader in self._over():
            reader.respond(status, headers, body)

    def start(self, status: int, headers: Headers, first: bytes) -> None:
        self._begin(status, headers, first)
        for reader in list(self._readers):
            reader.start(status, headers, first)

    def write(self, data: bytes) -> None:
        self._keep(data)
        for reader in list(self._readers):
            reader.write(data)

    def end(self, last: bytes = b"") -> None:
        self._keep(last)
        for reader in self._over():
            reader.end(last)

    async def join(self, exchange: Exchange) -> None:
        """Send what there is to one more, and what comes. Raises RequestError 409 for what is no longer there."""
        if self._pieces is None:
            raise RequestError(
                409, "The answer under this Idempotency-Key is too long to be sent again.", code="answer_too_long"
            )
        said, headers = b"".join(self._pieces), [*self._headers, JOINED]
        if self._is_whole:
            exchange.respond(self._status, headers, said)
            return
        if self.has_started:
            exchange.start(self._status, headers, said)
        if self.has_ended:
            exchange.end()
            return
        await self._attach(exchange)

    def _attach(self, exchange: Exchange) -> asyncio.Future[None]:
        """Whom to tell from here on; done when it has the end, or left."""
        left = self._readers[exchange] = asyncio.get_running_loop().create_future()
        exchange.on_gone = lambda: self._left(exchange)
        exchange.on_cut = self._cut
        exchange.on_writable = self._caught_up
        return left

    def _left(self, exchange: Exchange) -> None:
        if (left := self._readers.pop(exchange, None)) is not None:
            left.set_result(None)
        self._caught_up()  # who held the others up may have been this one

    def _cut(self) -> None:
        if self.on_cut is not None:
            self.on_cut()

    def _caught_up(self) -> None:
        if self.on_writable is not None and self.is_writable:
            self.on_writable()

    def _begin(self, status: int, headers: Headers, first: bytes) -> None:
        self._status, self._headers, self.has_started = status, headers, True
        self._keep(first)

    def _keep(self, data: bytes) -> None:
        if self._pieces is None:
            return
        self._pieces.append(data)
        self.bytes_held += len(data)
        if self.bytes_held > self._bytes_max:
            self._pieces, self.bytes_held = None, 0

    def _over(self) -> list[Exchange]:
        """Who still reads; nobody is told anything behind this."""
        self.has_ended = True
        self.on_cut = self.on_gone = self.on_writable = None
        readers, self._readers = self._readers, {}
        for left in readers.values():
            left.set_result(None)
        return list(readers)


class KeptAnswers:
    """The answers of one router that clients may come back for."""

    def __init__(self, limits: KeptLimits = KeptLimits(), clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._answers: OrderedDict[Name, KeptAnswer] = OrderedDict()
        self.joined = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def bytes_held(self) -> int:
        return sum(answer.bytes_held for answer in self._answers.values())

    async def serve(self, exchange: Exchange, organisation: str, work: Callable[[Outlet], Awaitable[str]]) -> None:
        """Let `work` answer, or join who asked the same before. `work` gives its outcome. Raises RequestError."""
        key, must_finish = self._wishes(exchange.head)
        if not must_finish:
            await work(exchange)
            return
        digest = xxhash.xxh3_128_digest(exchange.head.path.encode() + b" " + exchange.body)
        if not key:
            await work(KeptAnswer(exchange, digest, 0))
            return
        name = organisation, key
        if (known := self._find(name)) is None:
            await self._first(name, KeptAnswer(exchange, digest, self._limits.answer_bytes_max), work)
            return
        if known.digest != digest:
            raise RequestError(
                422, "This Idempotency-Key came with another request before.", code="idempotency_mismatch"
            )
        self.joined += 1
        await known.join(exchange)

    def _wishes(self, head: Head) -> tuple[str, bool]:
        """The key, and whether the answer is to be finished without its client."""
        key, disconnect = head.header(KEY_HEADER), head.header(DISCONNECT_HEADER)
        if key is None and disconnect is None:
            return "", False
        if disconnect not in (None, *DISCONNECTS):
            words = f"The header x-headway-on-disconnect must be one of {', '.join(DISCONNECTS)}."
            raise RequestError(400, words, param="x-headway-on-disconnect", code="invalid_value")
        if key is not None and not 0 < len(key) <= self._limits.key_chars_max:
            words = f"The header Idempotency-Key must have 1 to {self._limits.key_chars_max} characters."
            raise RequestError(400, words, param="Idempotency-Key", code="invalid_value")
        return key or "", disconnect == "finish" or (key is not None and disconnect is None)

    async def _first(self, name: Name, answer: KeptAnswer, work: Callable[[Outlet], Awaitable[str]]) -> None:
        """Keep what ends well; a refusal, an error or a cut is tried again by who comes back."""
        self._answers[name] = answer
        outcome = ""
        try:
            outcome = await work(answer)
        finally:
            if outcome == FINISHED:
                answer.ended_at = self._clock()
                self._answers.move_to_end(name)
                self._make_room()
            else:
                del self._answers[name]

    def _find(self, name: Name) -> KeptAnswer | None:
        self._make_room()
        return self._answers.get(name)

    def _make_room(self) -> None:
        """Drop what is old or too much, the longest ended first; what still runs stays."""
        oldest, held, limits = self._clock() - self._limits.kept_s, self.bytes_held, self._limits
        ended = [(name, answer) for name, answer in self._answers.items() if answer.ended_at is not None]
        for name, answer in ended:
            is_old = answer.ended_at is not None and answer.ended_at < oldest
            if not (is_old or len(self._answers) > limits.answers_max or held > limits.bytes_max):
                break
            held -= answer.bytes_held
            del self._answers[name]
