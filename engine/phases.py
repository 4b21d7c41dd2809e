"""Where a worker's start goes: seconds of each phase, told in one line when it is over.

Owns the names and times alone. Never waits, never measures what runs beside a phase."""

from __future__ import annotations

import time
from collections.abc import Callable


class Phases:
    """Each `end` closes what began at the one before; a name that ends twice has the sum."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """What was done since the last phase had this name."""
        now = self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {shown}"
