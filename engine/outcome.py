"""What a step, or an order, changed for those who wait for tokens.

Owns the grouping by link. Never knows how it reaches them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.sequence import Sequence
from engine.wire import End, Scored, Start


@dataclass(slots=True)
class Outcome:
    """Tokens by link, and starts and ends beside their link."""

    handles: dict[int, list[int]] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)  # one for each handle
    starts: list[tuple[int, Start]] = field(default_factory=list)
    ends: list[tuple[int, End]] = field(default_factory=list)
    scored: list[tuple[int, Scored]] = field(default_factory=list)

    def add(self, sequence: Sequence, token: int) -> None:
        """One more token."""
        link = sequence.link
        if link not in self.handles:
            self.handles[link], self.ids[link] = [], []
        self.handles[link].append(sequence.handle)
        self.ids[link].append(token)
