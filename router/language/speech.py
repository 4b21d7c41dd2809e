"""What a model says: token ids become the typed events of an answer, as they come.

Owns detokeniser, stop strings and parser of one answer, in this order. Knows no dialect and no socket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from router.language.stops import StopScanner
from router.language.turn import PART_END, TEXT_START, Ending, Event, PartKind, PartStart
from router.language.vocabulary import Detokeniser


class Parser(Protocol):
    """Finds the parts of an answer in its text. Any cut of the text gives the same parts."""

    def feed(self, text: str) -> Sequence[Event]:
        """What the text so far says for certain."""

    def flush(self) -> Sequence[Event]:
        """The text has ended: what was held back, and the end of the part that stood open."""


class PlainText:
    """The parser of a model that only talks: everything is one text."""

    def __init__(self) -> None:
        self._has_begun = False

    # Hot: once per token and stream.
    def feed(self, text: str) -> Sequence[Event]:
        if self._has_begun:
            return (text,)
        self._has_begun = True
        return (TEXT_START, text)

    def flush(self) -> Sequence[Event]:
        return (PART_END,) if self._has_begun else ()


class Speech:
    """One answer on its way from ids to events."""

    __slots__ = (
        "_detokeniser",
        "_has_begun",
        "_has_called",
        "_is_forced",
        "_is_one_call",
        "_kind",
        "_parser",
        "_stops",
        "calls",
        "has_stopped",
        "is_reasoning",
        "reasoning_tokens",
    )

    def __init__(
        self,
        detokeniser: Detokeniser,
        stops: Sequence[str],
        parser: Parser | None = None,
        *,
        is_forced: bool = False,
        is_one_call: bool = False,
    ) -> None:
        self._detokeniser = detokeniser
        self._is_forced = is_forced  # calls and nothing else: what looks like text is the mark of one that was cut
        self._is_one_call = is_one_call
        self._has_called = False  # the only call that there may be has ended
        self._kind = PartKind.TEXT  # of the part that stands open, or ended last
        self._stops = StopScanner(stops) if stops else None
        self._parser = parser  # None: all of it is text
        self._has_begun = False
        self.has_stopped = False  # a stop string came, or the only call has ended: nothing more is said
        self.calls = self.reasoning_tokens = 0
        self.is_reasoning = False

    # Hot: once per token and stream; bench/router.py.
    def feed(self, ids: Sequence[int]) -> Sequence[Event]:
        """The events that `ids` complete."""
        if self._has_called:
            return ()
        text = self._detokeniser.feed(ids)
        if self._stops is not None:
            text = self._stops.feed(text)
            self.has_stopped = self._stops.has_stopped
        if self._parser is None:
            return self._plain(text)
        if self.is_reasoning:
            self.reasoning_tokens += len(ids)
        return self._noted(self._parser.feed(text)) if text else ()

    def _plain(self, text: str) -> Sequence[Event]:
        if self._has_begun or not text:
            return (text,) if text else ()
        self._has_begun = True
        return (TEXT_START, text)

    def finish(self) -> Sequence[Event]:
        """What was held back; every part is whole then."""
        if self._has_called:
            return ()
        text = self._detokeniser.flush()
        if self._stops is not None:
            text = self._stops.feed(text) + self._stops.flush()
            self.has_stopped = self._stops.has_stopped
        if self._parser is None:
            said = self._plain(text)
            return (*said, PART_END) if self._has_begun else said
        events = [*self._parser.feed(text)] if text else []
        return self._noted([*events, *self._parser.flush()])

    def ending(self, reason: str) -> Ending:
        """Why it ended: a stop after calls is for their results."""
        stop_string = self._stops.met if self._stops is not None else None
        return Ending("calls" if reason == "stop" and self.calls and stop_string is None else reason, stop_string)

    def _noted(self, events: Sequence[Event]) -> Sequence[Event]:
        if self._is_forced or self._is_one_call:
            events = list(self._bounded(events))
        for event in events:
            if type(event) is PartStart:
                self.is_reasoning = event.kind is PartKind.REASONING
                self.calls += event.kind is PartKind.CALL
        return events

    def _bounded(self, events: Sequence[Event]) -> Iterator[Event]:
        """What an answer that was told how to call may say."""
        for event in events:
            if self._has_called:
                return
            if type(event) is PartStart:
                self._kind = event.kind
            if self._is_forced and self._kind is PartKind.TEXT:
                continue
            yield event
            if self._is_one_call and self._kind is PartKind.CALL and event is PART_END:
                self._has_called = self.has_stopped = True
