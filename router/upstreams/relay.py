"""One forwarded request: a call to an upstream becomes bytes for one client, raw, event by event.

Owns the request from its offer to its receipt: every one ends exactly once. Until the first event nothing is sent, so
that a failed call is placed again unseen. What an own worker can do and a foreign engine cannot is said in the receipt:
a stream that is cut is not resumed, and ends with an error event."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from policies.actions import Cancel, Dispatch, Reject, Tokenise
from policies.request import Request, RequestClass
from router.delivery.answer import SSE
from router.delivery.kept import KeptAnswers
from router.delivery.order import RelayLimits
from router.delivery.ports import MindPort, Observer, Outlet
from router.errors import JSON, ErrorDetail, Headers, error_type, retry_headers
from router.language.turn import ErrorShape
from router.telemetry.receipts import Receipt
from router.upstreams.fleet import Upstreams
from router.upstreams.http1 import Call
from router.upstreams.peek import PRIORITIES, Seen
from router.upstreams.replies import BUSY, Told, ending, figures, said_wrong, told

log = logging.getLogger(__name__)

EVENT_BYTES_MAX = 4 * 1024 * 1024  # of one event that is not whole yet; the longest have a tool call's arguments in one
WHOLE_BYTES_MAX = 64 * 1024 * 1024  # of a reply that is no stream: embeddings of a large batch
WEAKER = "foreign engine: no resumption, no step budget, prompt estimated before it is placed"
CONTENT_TYPE = re.compile(rb"[a-z]+/[a-z0-9.+-]+(?:; ?charset=[a-z0-9-]+)?", re.IGNORECASE)
BROKEN = ErrorDetail("The router failed on this request.", "server_error", None, "internal_error")
CUT = ErrorDetail("The upstream's answer was cut.", "server_error", None, "upstream_cut")


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One request as the door made it."""

    request: Request
    seen: Seen
    path: str
    salt: bytes
    errors: ErrorShape
    endings: tuple[bytes, ...]  # empty: no stream is wanted
    traceparent: str


@dataclass(frozen=True, slots=True)
class ForwardServices:
    """What every forwarded request works with."""

    mind: MindPort
    upstreams: Upstreams
    observer: Observer
    limits: RelayLimits
    clock: Callable[[], float]
    kept: KeptAnswers = field(default_factory=KeptAnswers)


class ForwardRelay:
    """Client of router.delivery.ports, Listener of router.upstreams.http1. `begin` it, then await `over`."""

    def __init__(self, order: Forwarded, exchange: Outlet, services: ForwardServices) -> None:
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # the receipt's outcome
        self._order, self._exchange, self._mind = order, exchange, services.mind
        self._upstreams, self._observer = services.upstreams, services.observer
        self._limits, self._clock = services.limits, services.clock
        self._request_class = RequestClass.CHATBOT
        self._class_reason = ""
        self._reservation = ""
        self._chain = b""
        self._placed: Dispatch | None = None
        self._call: Call | None = None
        self._attempts = 0
        self._status = 0
        self._content_type = b"application/json"
        self._is_streaming = False
        self._pending = bytearray()  # of an event that is not whole yet, or of a reply that is no stream
        self._events = 0
        self._told = Told()  # tokens, where the upstream says them
        self._reason = "stop"  # unless the upstream says another
        self._has_ended_well = False
        self._queue_s: float | None = None
        self._ttft_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Offer the request. It may be answered before this returns."""
        self._exchange.on_gone = self._client_gone
        self._exchange.on_writable = self._client_caught_up
        if self._order.endings:
            self._arm(self._limits.commit_after_s)
        self._mind.offer(self._order.request, self)

    # Client: what the mind says ---------------------------------------------------------------------------------------

    def tokenise(self, action: Tokenise) -> None:
        """The upstream tokenises; we only count characters."""
        self._request_class, self._class_reason = action.request_class, action.reason
        seen = self._order.seen
        self._chain = seen.chain(self._order.salt)
        self._mind.arrived(self._order.request.id, seen.tokens, self._chain)

    def dispatch(self, action: Dispatch) -> None:
        self._placed = action
        self._reservation = "kept" if action.is_reserved else ""
        self._attempts += 1
        self._pending.clear()
        self._status, self._is_streaming = 0, False
        if self._queue_s is None:
            self._queue_s = self._since_arrival_s()
        config, model = self._upstreams.there(action.worker)
        priority = PRIORITIES[config.priority][action.request_class] if config.priority else None
        accept = b"text/event-stream" if self._order.endings else b"application/json"
        body = self._order.seen.body(model, priority)
        self._upstreams.sent(action.worker, self._chain)
        self._call = self._upstreams.call(action.worker, self._order.path, body, accept, self)

    def reject(self, action: Reject) -> None:
        self._request_class = action.request_class
        self._class_reason = self._class_reason or action.reason
        self._reservation = "made" if action.is_reserved else ""
        outcome = "failed" if self._attempts else "refused"
        detail = ErrorDetail(action.message, error_type(action.status), None, action.reason)
        self._end_with_error(action.status, detail, outcome, retry_headers(action.retry_after_s))

    def cancel(self, action: Cancel) -> None:
        del action
        self._drop_call()

    def broke(self) -> None:
        self._drop_call()
        if not self.over.done():
            self._end_with_error(500, BROKEN, "failed", [])

    # http1.Listener ---------------------------------------------------------------------------------------------------

    def head(self, status: int, headers: Headers) -> None:
        self._status = status
        given = next((value for name, value in headers if name == b"content-type"), b"")
        self._content_type = given if CONTENT_TYPE.fullmatch(given) else b"application/json"
        is_sse = self._content_type.startswith(b"text/event-stream")
        self._is_streaming = status == 200 and is_sse and bool(self._order.endings)

    # Hot: once per piece of a stream.
    def data(self, data: bytes) -> None:
        if self._has_ended_well:
            return  # behind the last event: nothing that belongs to the answer
        if self._is_streaming:
            if not self._pending and data.endswith(b"\n\n"):
                self._pass_on(data)  # the usual piece: whole events
                return
            self._pending += data
            self._split()
            return
        self._pending += data
        if len(self._pending) > (WHOLE_BYTES_MAX if self._status == 200 else EVENT_BYTES_MAX):
            self._drop_call("its reply is too large")
            self._attempt_failed("the upstream's reply is larger than this router takes")

    def end(self) -> None:
        self._call = None
        if self._has_ended_well:
            return
        if self._status != 200:
            self._answered_no()
        elif self._is_streaming:
            self._cut("the upstream ended its stream too early")
        elif (why := said_wrong(bytes(self._pending))) is not None:
            self._attempt_failed(f"the upstream answered 200 with an error: {why}"[:300])
        else:
            self._whole()

    def failed(self, reason: str) -> None:
        self._call = None
        if not self._has_ended_well:
            self._cut(reason)

    # Streams ----------------------------------------------------------------------------------------------------------

    def _split(self) -> None:
        """Send the events that are whole. Between two of them an error event of ours would be understood."""
        pending = self._pending
        until = max(pending.rfind(b"\n\n") + 2, pending.rfind(b"\r\n\r\n") + 4)
        if until <= 3:
            if len(pending) > EVENT_BYTES_MAX:
                self._drop_call("its event is too large")
                self._cut("the upstream's event is larger than this router takes")
            return
        events = bytes(pending[:until])
        del pending[:until]
        self._pass_on(events)

    # Hot: once per piece of a stream; about one token.
    def _pass_on(self, events: bytes) -> None:
        if b'"error"' in events and (why := said_wrong(events)) is not None:
            self._drop_call("it failed")
            self._cut(why)
            return
        if b'"usage"' in events:
            self._told = figures(events, self._told)
        if b'_reason":"' in events or b'_reason": "' in events or b'"incomplete"' in events:
            self._reason = ending(events) or self._reason
        if any(last in b"\n" + events for last in self._order.endings):
            self._finish_stream(events)
            return
        self._open(events)

    def _open(self, events: bytes) -> None:
        self._events += events.count(b"data:")
        if self._ttft_s is None and self._events:
            self._begin_answer()
        if self._exchange.has_started:
            self._exchange.write(events)
        else:
            self._exchange.start(200, SSE + self._headers(), events)
        if not self._exchange.is_writable and self._call is not None:
            self._call.pause()

    def _begin_answer(self) -> None:
        assert self._placed is not None
        self._disarm()
        self._ttft_s = self._since_arrival_s()
        self._upstreams.first_token(self._placed.worker, self._order.request.id)

    def _finish_stream(self, events: bytes) -> None:
        self._open(events)
        self._has_ended_well = True
        self._exchange.end()
        self._settle_well()

    def _cut(self, reason: str) -> None:
        """The call failed. Before the first event it is placed again; after it, the client is told."""
        if self._ttft_s is None:
            self._attempt_failed(reason)
            return
        self._release(reason)
        self._mind.gone(self._order.request.id)
        detail = ErrorDetail(f"{CUT.message} ({reason[:120]})", CUT.type, None, CUT.code)
        self._end_with_error(502, detail, "failed", [])

    # Whole replies ----------------------------------------------------------------------------------------------------

    def _whole(self) -> None:
        body = bytes(self._pending)
        self._told, self._reason = figures(body, self._told), ending(body) or "stop"
        self._has_ended_well = True
        self._begin_answer()
        headers = [(b"content-type", self._content_type), *self._headers()]
        if self._exchange.has_started:  # a stream was wanted, and began by heartbeats; a whole answer came
            self._exchange.end(b"data: %b\n\ndata: [DONE]\n\n" % body.replace(b"\n", b" "))
        else:
            self._exchange.respond(200, headers, body)
        self._settle_well()

    def _answered_no(self) -> None:
        """The upstream refused. What is the client's fault is told in its dialect, the rest is tried elsewhere."""
        detail = told(self._status, bytes(self._pending))
        if self._status in BUSY or self._status >= 500:
            self._attempt_failed(f"the upstream said {self._status}", is_ill=self._status not in BUSY)
            return
        self._release("")
        self._mind.gone(self._order.request.id)
        status = self._status if 400 <= self._status < 500 and self._status not in (401, 403) else 502
        self._end_with_error(status, detail, "refused" if status < 500 else "failed", [])

    # Ending -----------------------------------------------------------------------------------------------------------

    def _attempt_failed(self, reason: str, *, is_ill: bool = True) -> None:
        placed = self._placed
        assert placed is not None
        log.info("request %s: %s failed: %s", self._order.request.id, self._upstreams.name(placed.worker), reason)
        self._release(reason if is_ill else "")
        self._mind.failed(self._order.request.id, placed.worker, reason)

    def _settle_well(self) -> None:
        assert self._placed is not None
        output = self._told.output if self._told.output is not None else max(0, self._events - 1)
        is_heard = self._upstreams.ended(self._placed.worker, self._order.request.id, output)
        self._call = None
        if not is_heard:
            self._mind.gone(self._order.request.id)
        self._settle("finished", 200, self._reason)

    def _release(self, fault: str) -> None:
        """The call is over, and its answer is not whole."""
        if self._placed is not None:
            self._upstreams.ended(self._placed.worker, self._order.request.id, None, fault)

    def _drop_call(self, fault: str = "") -> None:
        call, self._call = self._call, None
        if call is not None:
            call.abort()
            if not fault:
                self._release("")

    def _client_gone(self) -> None:
        self._drop_call()
        self._disarm()
        self._mind.gone(self._order.request.id)
        self._settle("cancelled", 499, "client-gone")

    def _client_caught_up(self) -> None:
        if self._call is not None:
            self._call.resume()

    def _end_with_error(self, status: int, detail: ErrorDetail, outcome: str, headers: Headers) -> None:
        self._disarm()
        if self._exchange.has_started:
            self._exchange.end(self._failure(status, detail))
        else:
            status, body = self._order.errors.body(status, detail)
            self._exchange.respond(status, JSON + self._headers() + headers, body)
        self._settle(outcome, status, detail.code or outcome)

    def _failure(self, status: int, detail: ErrorDetail) -> bytes:
        """An end that nobody can take for a whole answer, in each dialect's own shape."""
        _, body = self._order.errors.body(status, detail)
        event = b"event: error\n" if self._order.path == "/v1/messages" else b""
        return b"%bdata: %b\n\n" % (event, body)

    def _settle(self, outcome: str, status: int, reason: str) -> None:
        assert not self.over.done(), "a request ends exactly once"
        self._disarm()
        self._observer.ended(self._receipt(outcome, status, reason))
        self.over.set_result(outcome)

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
            self._exchange.write(b": waiting\n\n")
        else:
            self._exchange.start(200, SSE + self._headers(), b": waiting\n\n")
        self._arm(self._limits.heartbeat_s)

    # Telling ----------------------------------------------------------------------------------------------------------

    def _headers(self) -> Headers:
        headers = [
            (b"x-headway-request", self._order.request.id.encode()),
            (b"x-headway-class", self._request_class.label.encode()),
            (b"x-headway-class-reason", self._class_reason.encode("ascii", "replace")),
        ]
        if self._placed is not None:
            headers.append((b"x-headway-worker", self._upstreams.name(self._placed.worker).encode("ascii", "replace")))
        return headers

    def _receipt(self, outcome: str, status: int, reason: str) -> Receipt:
        request, placed, said = self._order.request, self._placed, self._told
        duration_s = self._since_arrival_s()
        output = said.output if said.output is not None else self._events
        return Receipt(
            request=request.id,
            operation=self._order.path,
            tenant=request.tenant.id,
            model=request.model,
            request_class=self._request_class.label,
            class_reason=self._class_reason,
            outcome=outcome,
            status=status,
            reason=reason,
            worker=self._upstreams.name(placed.worker) if placed is not None else "",
            place_reason=placed.reason if placed is not None else "",
            attempts=self._attempts,
            arrived_unix_s=time.time() - duration_s,
            queue_s=self._queue_s,
            ttft_s=self._ttft_s,
            duration_s=duration_s,
            prompt_tokens=self._order.seen.tokens if said.prompt is None else said.prompt,
            cached_tokens=said.cached or 0,
            output_tokens=output,
            weaker=WEAKER if said.output is not None else f"{WEAKER}, tokens estimated",
            budget_ttft_s=_finite(placed.budget.ttft_s) if placed is not None else None,
            budget_tpot_s=_finite(placed.budget.tpot_s) if placed is not None else None,
            budget_deadline_s=_finite(placed.budget.deadline_s) if placed is not None else None,
            budget_saved_s=placed.saved_s if placed is not None else 0.0,
            reservation=self._reservation,
            traceparent=self._order.traceparent,
        )

    def _since_arrival_s(self) -> float:
        return self._clock() - self._order.request.arrived


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
