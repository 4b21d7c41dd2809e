"""Sends what answers have gathered, once all that came in one go is handled.

Owns the list of who is due. Never looks at what they send."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Flushable(Protocol):
    """Who has bytes to send."""

    def flush(self) -> None: ...
    def fault(self, error: Exception) -> None:
        """Its own flush raised."""


class Flusher:
    """Steps that a busy router reads together leave together, in one event and one write. A write costs as much as all
    else that is done for a token."""

    def __init__(self) -> None:
        self._due: list[Flushable] = []

    def soon(self, due: Flushable) -> None:
        """Flush it behind the callbacks that are running now."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._flush)
        self._due.append(due)

    def _flush(self) -> None:
        due, self._due = self._due, []
        for one in due:
            try:
                one.flush()
            except Exception as error:  # noqa: BLE001 -- border: one answer's fault must not hold up the others
                one.fault(error)
