"""What a step, or an order, changed for those who wait for tokens.

Owns the grouping by link. Never knows how it reaches them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.scheduling.sequence import Sequence
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

    def speak(self, sequence: Sequence, at: int, token: int, result: StepResult, now: float) -> str | None:
        """What a sequence got as row `at`, up to the token that ends it; why it ends, None if it goes on."""
        if result.scores and at in result.scores:
            self.scored.append((sequence.link, sequence.scored(token, result.scores[at])))
        reason = self.say(sequence, token, now)
        if result.more:
            for drafted in result.more.get(at, ()):
                if reason:
                    break
                reason = self.say(sequence, drafted, now)
        return reason

    # Hot: once a token. 0.25 us of the 0.5 ms that a step of 256 sequences may cost; bench/step_host.py.
    def say(self, sequence: Sequence, token: int, now: float) -> str | None:
        """One more token; why the sequence ends with it, None if it goes on."""
        reason = sequence.append(token)
        link = sequence.link
        handles = self.handles.get(link)
        if handles is None:
            handles, self.ids[link] = self.handles.setdefault(link, []), []
        handles.append(sequence.handle)
        self.ids[link].append(token)
        if sequence.length == sequence.resumed_at + 1:
            queued_s = sequence.prefill_at - sequence.submitted_at
            start = Start(sequence.handle, sequence.cached_tokens, queued_s, now - sequence.prefill_at)
            self.starts.append((link, start))
        return reason
