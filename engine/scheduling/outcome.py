"""What a step, or an order, changed for those who wait for tokens.

Owns the grouping by link. Never knows how it reaches them."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
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

    # Hot: once a token; a third of what `speak` costs each. bench/step_host.py, loadgen/sim.
    def speak_plainly(self, sequences: Sequences[Sequence], ids: list[int], now: float) -> list[tuple[Sequence, str]]:
        """One more token each, without scores or drafts: those that end with it, and why."""
        ended: list[tuple[Sequence, str]] = []
        link, handles, said = None, [], []
        for sequence, token in zip(sequences, ids, strict=True):
            if sequence.link != link:
                link = sequence.link
                handles, said = self.handles.setdefault(link, []), self.ids.setdefault(link, [])
            length = sequence.length
            if length == len(sequence.ids):
                sequence.grow()
            sequence.ids[length] = token
            sequence.length = length = length + 1
            handles.append(sequence.handle)
            said.append(token)
            if length == sequence.resumed_at + 1:
                self._start(sequence, now)
            if length >= sequence.length_max or token in sequence.stop_ids:
                reason = sequence.ending(token)
                if reason:
                    ended.append((sequence, reason))
        return ended

    def speak(self, sequence: Sequence, at: int, token: int, result: StepResult, now: float) -> str | None:
        """What a sequence got as row `at`, up to the token that ends it; why it ends, None if it goes on."""
        if sequence.prompt_scores is not None:
            self.scored += [(sequence.link, told) for told in sequence.take_prompt_scores()]
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
            self._start(sequence, now)
        return reason

    def _start(self, sequence: Sequence, now: float) -> None:
        queued_s = sequence.prefill_at - sequence.submitted_at
        start = Start(sequence.handle, sequence.cached_tokens, queued_s, now - sequence.prefill_at)
        self.starts.append((sequence.link, start))
