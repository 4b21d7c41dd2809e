"""The faces between one request's relay and the rest of the router.

Owns no behaviour. All are called synchronously from the event loop's own callbacks and must never block or await."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.wire import End, Scored, Start, Submit
from policies.actions import Cancel, Dispatch, Reject, Tokenise
from policies.request import Request, RequestId, WorkerId
from router.errors import Headers
from router.telemetry.receipts import Receipt


class Client(Protocol):
    """Who offered a request to the mind, and hears what was decided, possibly before `offer` returns."""

    def tokenise(self, action: Tokenise) -> None:
        """Render and tokenise now, then tell the mind `arrived`."""

    def dispatch(self, action: Dispatch) -> None:
        """Send it to this worker now."""

    def reject(self, action: Reject) -> None:
        """Answer no. The mind has forgotten the request."""

    def cancel(self, action: Cancel) -> None:
        """Stop the attempt; another action follows."""

    def broke(self) -> None:
        """An action could not be carried out, by our own fault. The mind has forgotten the request."""


class Sink(Protocol):
    """Who receives an attempt's tokens, inside the loop over one engine frame."""

    def started(self, start: Start) -> None:
        """The first token is in this frame."""

    def tokens(self, ids: Sequence[int]) -> None:
        """New token ids."""

    def scored(self, scores: Sequence[Scored]) -> None:
        """Log-probabilities of the tokens that come next, where they were asked for."""

    def ended(self, end: End) -> None:
        """Nothing follows."""

    def lost(self, reason: str) -> None:
        """The worker died or the link broke; nothing follows."""


class Outlet(Protocol):
    """Where an answer goes: the client's exchange, or one voice of a chorus."""

    on_cut: Callable[[], None] | None
    on_gone: Callable[[], None] | None
    on_writable: Callable[[], None] | None

    @property
    def has_started(self) -> bool: ...
    @property
    def has_ended(self) -> bool: ...
    @property
    def is_writable(self) -> bool: ...
    def respond(self, status: int, headers: Headers, body: bytes) -> None: ...
    def start(self, status: int, headers: Headers, first: bytes) -> None: ...
    def write(self, data: bytes) -> None: ...
    def end(self, last: bytes = b"") -> None: ...


class Attempt(Protocol):
    """One try of a request on one worker."""

    @property
    def weights_version(self) -> int:
        """Of the weights that compute it; an attempt ends where they change."""

    def abort(self, reason: str) -> None:
        """Forget it; its sink hears nothing more. Idempotent."""


class MindPort(Protocol):
    """The mind, to a relay."""

    def offer(self, request: Request, client: Client) -> None: ...
    def arrived(self, request_id: RequestId, tokens: int, chain: bytes) -> None: ...
    def gone(self, request_id: RequestId) -> None: ...
    def stopped(self, request_id: RequestId, output_tokens: int) -> None: ...
    def failed(self, request_id: RequestId, worker: WorkerId, reason: str) -> None: ...


class FleetPort(Protocol):
    """The fleet, to a relay."""

    def submit(self, worker: WorkerId, request_id: RequestId, order: Submit, sink: Sink) -> Attempt:
        """Send an attempt. Raises router.workers.link.LinkLost when the worker is gone: the sink hears nothing."""

    def name(self, worker: WorkerId) -> str:
        """The worker's name, for people."""

    def cost_s(self, worker: WorkerId, prompt: int, cached: int, output: int) -> float:
        """GPU-seconds that so many tokens are worth there."""


class Observer(Protocol):
    """Who hears how each request ended."""

    def ended(self, receipt: Receipt) -> None: ...
