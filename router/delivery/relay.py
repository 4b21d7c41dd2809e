"""One request's life on the wire: decisions of the mind and tokens of a worker become bytes for one client.

Owns the request from its offer to its receipt: every one ends exactly once, as finished, refused, failed or cancelled.
Never decides where or when it runs. Until the first token nothing is sent, so that a failed attempt is placed again
unseen; after it a lost worker's stream goes on elsewhere from the tokens that were sent, or ends with an error event,
never as if it were whole."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from array import array
from collections.abc import Sequence

import msgspec

from engine.wire import End, Scored, Start, Submit
from policies.actions import Cancel, Dispatch, Reject, Tokenise
from policies.request import RequestClass
from router.delivery.answer import Answer
from router.delivery.order import Order, Services
from router.delivery.ports import Attempt, Outlet
from router.errors import ErrorDetail, Headers, RequestError, error_type, retry_headers
from router.language.text import Prompt, Rendered, lineage_of
from router.language.turn import Echoing, Scoring, TokenScore, Usage
from router.telemetry.receipts import Receipt
from router.workers.link import LinkLost

log = logging.getLogger(__name__)

RETRY_AFTER_STOP_S = 1.0  # a restart, or the next router behind the same name
NOTICE_CHARS_MAX = 512  # a client names its own blocks and sends any number of them
STOPPING = ErrorDetail("The server stops; ask again.", "server_error", None, "stopping")
BROKEN = ErrorDetail("The router failed on this request.", "server_error", None, "internal_error")


class Relay:
    """Client and Sink of router.delivery.ports, Teller of router.delivery.answer. `begin` it, then await `over`."""

    def __init__(self, order: Order, exchange: Outlet, services: Services) -> None:
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # the receipt's outcome
        self._order, self._exchange, self._services = order, exchange, services
        self._request_class = RequestClass.CHATBOT
        self._class_reason = ""
        self._reservation = ""
        self._prompt: Prompt | None = None
        self._max_tokens = 0
        self._placed: Dispatch | None = None
        self._attempt: Attempt | None = None
        self._attempts = 0
        self._emitted = array("i")
        self._answer = Answer(order, exchange, services, self)
        self._cached_tokens = 0
        self._lineage = b""  # the conversation's name, once there is a prompt
        self._lost_tokens: int | None = None
        self._queue_s: float | None = None
        self._prefill_s: float | None = None
        self._ttft_s: float | None = None
        self._tokenising: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Offer the request. It may be answered before this returns."""
        self._exchange.on_gone = self._client_gone
        self._exchange.on_cut = self._stop
        self._exchange.on_writable = self._answer.flush
        self._services.mind.offer(self._order.request, self)

    # Client: what the mind says ---------------------------------------------------------------------------------------

    def tokenise(self, action: Tokenise) -> None:
        self._request_class, self._class_reason = action.request_class, action.reason
        self._answer.is_watched = action.request_class is RequestClass.CHATBOT
        try:
            rendered = self._order.text.render(self._order.turn, self._order.identity)
            text, context_max = self._order.text, self._order.context_max
            if (tokens := text.hopeless_tokens(rendered, context_max)) is not None:
                raise self._too_long(tokens)
            if rendered.cold_chars > text.limits.inline_chars_max:
                self._tokenising = asyncio.get_running_loop().create_task(self._tokenise_in_thread(rendered))
                return
            self._arrived(text.assemble(rendered, text.tokenise(rendered.cold)))
        except RequestError as error:
            self._refuse(error)

    def dispatch(self, action: Dispatch) -> None:
        assert self._prompt is not None, "tokens come before a place"
        self._placed = action
        self._reservation = "kept" if action.is_reserved else ""
        self._attempts += 1
        if self._queue_s is None:
            self._queue_s = self._since_arrival_s()
        request = self._order.request
        try:
            self._attempt = self._services.fleet.submit(action.worker, request.id, self._submit(action), self)
        except LinkLost as lost:
            self._services.mind.failed(request.id, action.worker, str(lost))
        else:
            self._answer.computed_by(self._attempt.weights_version)

    def reject(self, action: Reject) -> None:
        self._request_class = action.request_class
        self._class_reason = self._class_reason or action.reason
        self._reservation = "made" if action.is_reserved else ""
        outcome = "failed" if self._attempts else "refused"
        detail = ErrorDetail(action.message, error_type(action.status), None, action.reason)
        self._end_with_error(action.status, detail, outcome, retry_headers(action.retry_after_s))

    def cancel(self, action: Cancel) -> None:
        self._drop_attempt(action.reason)

    def fault(self, error: Exception) -> None:
        """Our own fault outside of the mind's and the link's calls: end this request alone."""
        log.error("request %s: its relay failed", self._order.request.id, exc_info=error)
        self._services.mind.gone(self._order.request.id)
        self.broke()

    def broke(self) -> None:
        self._drop_attempt("router fault")
        if not self.over.done():
            self._end_with_error(500, BROKEN, "failed", [])

    # Sink: what the worker says ---------------------------------------------------------------------------------------

    def started(self, start: Start) -> None:
        if self._ttft_s is not None:
            return  # a resumed stream keeps its first start
        self._ttft_s = self._since_arrival_s()
        self._cached_tokens, self._prefill_s = start.cached_tokens, start.prefill_s

    # Hot: once per token and stream. Budget 12 us with its write for chatbot+, 6 coalesced; bench/router.py.
    def tokens(self, ids: Sequence[int]) -> None:
        self._emitted.extend(ids)
        self._answer.say(ids)
        if self._answer.speech.has_stopped:
            self._stop_here()

    def scored(self, scores: Sequence[Scored]) -> None:
        encoder, spell = self._order.encoder, self._order.text.spell
        assert isinstance(encoder, Scoring), "only who can tell them asks for them"
        for score in scores:
            token = spell(score.token)
            if token or self._order.turn.has_echo:  # what ends a text is no part of it; of a prompt each token is told
                top = zip(map(spell, score.top_ids), score.top_logprobs, strict=True)
                encoder.scored([TokenScore(token, score.logprob, tuple(top))])

    def ended(self, end: End) -> None:
        self._attempt = None
        if end.reason in ("stop", "length"):
            self._finish(end.reason)
        elif end.reason == "refused":
            self._failed(end.message or "the worker refused")
        elif end.reason == "invalid":
            self._refuse(RequestError(400, f"The request cannot be served: {end.message}.", code="invalid_value"))
        else:
            self._services.mind.gone(self._order.request.id)
            log.error("request %s on worker %s: %s", self._order.request.id, self._worker_name(), end.message)
            message = "The model failed on this request."
            self._end_with_error(500, ErrorDetail(message, "server_error", None, "engine_error"), "failed", [])

    def lost(self, reason: str) -> None:
        self._attempt = None
        self._failed(reason)

    # Teller: what the answer asks -------------------------------------------------------------------------------------

    def headers(self) -> Headers:
        headers = [
            (b"x-headway-request", self._order.request.id.encode()),
            (b"x-headway-class", self._request_class.label.encode()),
            (b"x-headway-class-reason", self._class_reason.encode("ascii", "replace")),
        ]
        if self._placed is not None:
            headers.append((b"x-headway-worker", self._worker_name().encode("ascii", "replace")))
        if self._order.notices:
            headers.append((b"x-headway-notice", self._notice()))
        return headers

    def _notice(self) -> bytes:
        return "; ".join(self._order.notices)[:NOTICE_CHARS_MAX].encode("ascii", "replace")

    def usage(self) -> Usage:
        prompt_tokens = len(self._prompt.ids) if self._prompt is not None else 0
        return Usage(prompt_tokens, self._cached_tokens, len(self._emitted), self._answer.speech.reasoning_tokens)

    # Placing ----------------------------------------------------------------------------------------------------------

    async def _tokenise_in_thread(self, rendered: Rendered) -> None:
        try:
            tokenised = await asyncio.to_thread(self._order.text.tokenise, rendered.cold)
            self._arrived(self._order.text.assemble(rendered, tokenised))
        except RequestError as error:
            self._refuse(error)
        except Exception as error:  # noqa: BLE001 -- border: nobody else awaits this task
            self.fault(error)

    def _arrived(self, prompt: Prompt) -> None:
        room = self._order.context_max - len(prompt.ids)
        if room < 1:
            raise self._too_long(len(prompt.ids))
        self._prompt, order = prompt, self._order
        if order.turn.has_echo:
            assert isinstance(order.encoder, Echoing), "only who can tell a prompt is asked to"
            order.encoder.echo(order.text.read_back(order.turn, prompt))
            if order.turn.sampling.prompt_logprobs and isinstance(order.encoder, Scoring):
                order.encoder.scored([TokenScore(order.text.spell(int(prompt.ids[0])), math.nan, ())])
        self._lineage = lineage_of(order.turn, order.identity, order.request.session)
        self._lost_tokens = order.text.lost_tokens(self._lineage, order.identity, prompt)
        wanted = self._order.turn.max_tokens
        self._max_tokens = room if wanted is None else min(wanted, room)  # clamped, never refused: agents ask for 64k
        self._services.mind.arrived(self._order.request.id, len(prompt.ids), prompt.chain)

    def _too_long(self, tokens: int) -> RequestError:
        words = self._order.errors.overflow(tokens, self._order.context_max)
        return RequestError(400, words, param="messages", code="context_length_exceeded")

    def _submit(self, action: Dispatch) -> Submit:
        assert self._prompt is not None
        order, prompt = self._order, self._prompt
        wanted = order.turn.sampling
        ids = prompt.ids.tobytes()
        return Submit(
            handle=0,
            ids=ids + self._emitted.tobytes() if self._emitted else ids,
            prompt_len=len(prompt.ids),
            salt=order.identity.salt,
            public_blocks=0,
            request_class=int(action.request_class),
            first_left_s=action.first_left_s,
            tpot_s=action.budget.tpot_s,
            deadline_left_s=action.deadline_left_s,
            session=order.request.session,
            sampling=msgspec.structs.replace(
                wanted, max_tokens=self._max_tokens, min_tokens=min(wanted.min_tokens, self._max_tokens)
            ),
            call_ids=order.text.call_ids(order.turn),
        )

    def _failed(self, reason: str) -> None:
        """The attempt is over and the answer is not: the mind places it again, or rejects it."""
        assert self._placed is not None
        self._services.mind.failed(self._order.request.id, self._placed.worker, reason)

    def _drop_attempt(self, reason: str) -> None:
        if self._attempt is not None:
            self._attempt.abort(reason)
            self._attempt = None

    # Ending -----------------------------------------------------------------------------------------------------------

    def _stop_here(self) -> None:
        """A stop string came: the rest is not wanted."""
        self._drop_attempt("stop string")
        self._services.mind.stopped(self._order.request.id, len(self._emitted))
        self._finish("stop")

    def _finish(self, reason: str) -> None:
        self._answer.hear_the_end()
        ending = self._answer.speech.ending(reason)
        self._answer.finish(ending, self.usage())
        self._remember()
        self._settle("finished", 200, ending.reason)

    def _remember(self) -> None:
        """The answer has left: its ids serve when the client sends it back."""
        order, stopped = self._order, self._answer.speech.has_stopped
        if self._prompt is not None and not stopped:
            order.text.heard(order.turn, order.identity, self._prompt, self._emitted, self._lineage)

    def _refuse(self, error: RequestError) -> None:
        """The client's fault, found before anything was placed."""
        self._services.mind.gone(self._order.request.id)
        self._end_with_error(error.status, error.detail, "refused", [])

    def _end_with_error(self, status: int, detail: ErrorDetail, outcome: str, headers: Headers) -> None:
        self._answer.fail(status, detail, headers)
        self._settle(outcome, status, detail.code or outcome)

    def _worker_name(self) -> str:
        return self._services.fleet.name(self._placed.worker) if self._placed is not None else ""

    def _client_gone(self) -> None:
        self._drop_attempt("client gone")
        self._answer.drop()
        self._services.mind.gone(self._order.request.id)
        self._settle("cancelled", 499, "client-gone")

    def _stop(self) -> None:
        """The router stops and waits no longer for this answer."""
        self._drop_attempt("the router stops")
        self._services.mind.gone(self._order.request.id)
        self._end_with_error(503, STOPPING, "failed", retry_headers(RETRY_AFTER_STOP_S))

    def _settle(self, outcome: str, status: int, reason: str) -> None:
        assert not self.over.done(), "a request ends exactly once"
        if self._tokenising is not None:
            self._tokenising.cancel()
        self._services.observer.ended(self._receipt(outcome, status, reason))
        self.over.set_result(outcome)

    def _receipt(self, outcome: str, status: int, reason: str) -> Receipt:
        order, placed = self._order, self._placed
        duration_s = self._since_arrival_s()
        usage = self.usage()
        gpu_s = 0.0
        if placed is not None and self._ttft_s is not None:
            gpu_s = self._services.fleet.cost_s(placed.worker, usage.prompt, usage.cached, usage.output)
        return Receipt(
            request=order.request.id,
            operation=order.operation,
            tenant=order.request.tenant.id,
            model=order.request.model,
            request_class=self._request_class.label,
            class_reason=self._class_reason,
            outcome=outcome,
            status=status,
            reason=reason,
            worker=self._worker_name(),
            place_reason=placed.reason if placed is not None else "",
            attempts=self._attempts,
            arrived_unix_s=time.time() - duration_s,
            queue_s=self._queue_s,
            prefill_s=self._prefill_s,
            ttft_s=self._ttft_s,
            duration_s=duration_s,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            output_tokens=usage.output,
            lost_tokens=self._lost_tokens,
            gpu_s=gpu_s,
            budget_ttft_s=_finite(placed.budget.ttft_s) if placed is not None else None,
            budget_tpot_s=_finite(placed.budget.tpot_s) if placed is not None else None,
            budget_deadline_s=_finite(placed.budget.deadline_s) if placed is not None else None,
            budget_saved_s=placed.saved_s if placed is not None else 0.0,
            reservation=self._reservation,
            predicted_ttft_s=placed.predicted_ttft_s if placed is not None else None,
            predicted_cached_tokens=placed.predicted_hit_tokens if placed is not None else 0,
            traceparent=order.traceparent,
        )

    def _since_arrival_s(self) -> float:
        return self._services.clock() - self._order.request.arrived


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
