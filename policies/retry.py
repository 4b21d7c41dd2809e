"""How often a failed request may be placed again: a few times each, and one in ten of all.

Owns the shared retry budget. Never waits: a retry is now or not at all."""

from __future__ import annotations


class RetryBudget:
    """Placements earn a tenth of a retry each; a store of them is for the death of a full worker.

    A fleet that fails everything is thus asked at most 1.1 times as often, not `attempts_max` times."""

    def __init__(self, ratio: float, burst: int) -> None:
        self._ratio = ratio
        self._burst = float(burst)
        self._left = float(burst)

    def earn(self) -> None:
        """A request was placed for the first time."""
        self._left = min(self._burst, self._left + self._ratio)

    def spend(self) -> bool:
        """Whether one more retry is allowed; if so it is taken."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
