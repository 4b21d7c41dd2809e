"""Reasoning: an answer may begin with thoughts between two marks; what follows is for another parser.

Owns the marks of thoughts. A mark anywhere else is text."""

from __future__ import annotations

from collections.abc import Sequence

from router.language.speech import Parser
from router.language.turn import PART_END, Event, PartKind, PartStart
from router.parsers.marks import beginning_at_end

REASONING_START = PartStart(PartKind.REASONING)


class Reasoning:
    """router.language.speech.Parser for thoughts before the rest. `has_begun`: the prompt's end opened them."""

    def __init__(self, marks: tuple[str, str], rest: Parser, *, has_begun: bool) -> None:
        self._open, self._close = marks
        self._rest = rest
        self._held = ""
        self._state = self._thinks if has_begun else self._may_think
        self._has_started = False  # a thought has begun: an empty one is no part

    def feed(self, text: str) -> Sequence[Event]:
        if self._state == self._speaks:
            return self._rest.feed(text)
        self._held += text
        events: list[Event] = []
        while self._state(events):
            pass
        return events

    def flush(self) -> Sequence[Event]:
        held, self._held = self._held, ""
        if self._state == self._thinks:
            return [*self._thought(held), *([PART_END] if self._has_started else []), *self._rest.flush()]
        if self._state == self._has_thought:
            held = ""
        return [*(self._rest.feed(held) if held else ()), *self._rest.flush()]

    def _may_think(self, events: list[Event]) -> bool:
        behind = self._held.lstrip()
        if behind.startswith(self._open):
            self._held, self._state = behind.removeprefix(self._open), self._thinks
            return True
        if self._open.startswith(behind):
            return False
        self._state = self._speaks
        return self._speaks(events)

    def _thinks(self, events: list[Event]) -> bool:
        if not self._has_started:
            self._held = self._held.lstrip()
        at = self._held.find(self._close)
        if at >= 0:
            events += self._thought(self._held[:at].rstrip())
            events += [PART_END] if self._has_started else []
            self._held, self._state = self._held[at + len(self._close) :], self._has_thought
            return True
        keep = beginning_at_end(self._held, (self._close,))
        said = self._held[: len(self._held) - keep].rstrip()
        events += self._thought(said)
        self._held = self._held[len(said) :]
        return False

    def _thought(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._has_started:
            return [text]
        self._has_started = True
        return [REASONING_START, text]

    def _has_thought(self, events: list[Event]) -> bool:
        """Space behind the closing mark belongs to it."""
        self._held = self._held.lstrip()
        if not self._held:
            return False
        self._state = self._speaks
        return self._speaks(events)

    def _speaks(self, events: list[Event]) -> bool:
        held, self._held = self._held, ""
        events += self._rest.feed(held) if held else []
        return False
