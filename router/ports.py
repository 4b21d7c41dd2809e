"""The two faces between one request's relay and the rest of the router.

Owns no behaviour. Both are called synchronously from the event loop's own callbacks and must never block or await."""

from __future__ import annotations

from typing import Protocol

from engine.wire import End, Start
from policies.actions import Cancel, Dispatch, Reject, Tokenise


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


class Sink(Protocol):
    """Who receives an attempt's tokens, inside the loop over one engine frame."""

    def started(self, start: Start) -> None:
        """The first token is in this frame."""

    def tokens(self, ids: memoryview) -> None:
        """New token ids (int32), valid only during the call."""

    def ended(self, end: End) -> None:
        """Nothing follows."""

    def lost(self, reason: str) -> None:
        """The worker died or the link broke; nothing follows."""
