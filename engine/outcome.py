"""What a step, or an order, changed for those who wait for tokens.

Owns the grouping by link. Never knows how it reaches them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.sequence import Sequence
from engine.step import StepResult
from engine.wire import End, HintAck, Scored, Start


@dataclass(slots=True)
class Outcome:
    """Tokens by link, and starts and ends beside their link."""

    handles: dict[int, list[int]] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)  # one for each handle
    starts: list[tuple[int, Start]] = field(default_factory=list)
    ends: list[tuple[int, End]] = field(default_factory=list)
    scored: list[tuple[int, Scored]] = field(default_factory=list)
    acks: list[tuple[int, HintAck]] = field(default_factory=list)

    def speak(self, sequence: Sequence, at: int, result: StepResult, now: float) -> str | None:
        """What a sequence got as row `at`, up to the token that ends it; why it ends, None if it goes on."""
        own = int(result.ids[at])
        if at in result.scores:
            self.scored.append((sequence.link, sequence.scored(own, result.scores[at])))
        for token in (own, *result.more.get(at, ())):
            reason = sequence.append(token)
            self.add(sequence, token)
            if sequence.length == sequence.resumed_at + 1:
                queued_s = sequence.prefill_at - sequence.submitted_at
                start = Start(sequence.handle, sequence.cached_tokens, queued_s, now - sequence.prefill_at)
                self.starts.append((sequence.link, start))
            if reason:
                return reason
        return None

    def add(self, sequence: Sequence, token: int) -> None:
        """One more token."""
        link = sequence.link
        if link not in self.handles:
            self.handles[link], self.ids[link] = [], []
        self.handles[link].append(sequence.handle)
        self.ids[link].append(token)
