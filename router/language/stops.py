"""Stop strings: text is cut before the first of them, also when it is spelt over several tokens.

Owns what is held back because it may be the beginning of one. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence

from router.parsers.marks import beginning_at_end


class StopScanner:
    """The text of one answer on its way past its stop strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.has_stopped = False
        self.met: str | None = None  # the stop string that ended the answer

    def feed(self, text: str) -> str:
        """What may go to the client now. After the first stop string nothing does."""
        if self.has_stopped:
            return ""
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.met = min(found)
            self.has_stopped = True
            self._held = ""
            return text[:at]
        keep = beginning_at_end(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The answer ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held
