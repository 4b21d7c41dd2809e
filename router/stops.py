"""Stop strings: text is cut before the first of them, also when it is spelt over several tokens.

Owns what is held back because it may be the beginning of one. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence


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
        keep = self._beginning_at_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The answer ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, text: str) -> int:
        """How many characters at the end of `text` begin a stop string; the most of all stops."""
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
