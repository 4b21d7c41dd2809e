"""Hermes and Qwen: calls are JSON objects between tags, `<tool_call>` and `</tool_call>`.

Owns this family's grammar. A tag without a call behind it is text."""

from __future__ import annotations

from collections.abc import Sequence

from router.language.turn import Event
from router.parsers.call_object import CallObject
from router.parsers.marks import Prose, drained, split_at

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class TaggedCalls:
    """router.language.speech.Parser for calls between tags."""

    def __init__(self) -> None:
        self._prose = Prose()
        self._held = ""
        self._tag = ""  # the opening one, with the space behind it, until it is known to open a call
        self._call: CallObject | None = None
        self._is_behind_call = False

    def feed(self, text: str) -> Sequence[Event]:
        self._held += text
        return drained(self._step)

    def flush(self) -> Sequence[Event]:
        events: list[Event] = []
        if self._call is not None:
            call, self._call = self._call, None
            self._take(call, call.flush(), events)
        text = self._tag + ("" if self._is_behind_call and CLOSE.startswith(self._held) else self._held)
        return [*events, *self._prose.feed(text), *self._prose.flush()]

    def _step(self, events: list[Event]) -> bool:
        """One decision; False when more text is needed for the next."""
        if self._call is not None:
            return self._in_object(self._call, events)
        if self._tag or self._is_behind_call:
            return self._between(events)
        before, tag, self._held = split_at(self._held, OPEN)
        events += self._prose.feed(before)
        self._tag = tag or ""
        return tag is not None

    def _between(self, events: list[Event]) -> bool:
        """Behind a tag, or behind a call: an object, the closing tag, or neither."""
        behind = self._held.lstrip()
        if self._tag:
            self._tag += self._held[: len(self._held) - len(behind)]
        self._held = behind
        if behind.startswith("{"):
            self._call, self._is_behind_call = CallObject(), False
        elif not behind or (self._is_behind_call and len(behind) < len(CLOSE) and CLOSE.startswith(behind)):
            return False
        elif self._is_behind_call:
            self._is_behind_call = False
            self._held = behind.removeprefix(CLOSE)
        else:
            events += self._prose.feed(self._tag)
            self._tag = ""
        return True

    def _in_object(self, call: CallObject, events: list[Event]) -> bool:
        said, self._held = call.feed(self._held), call.rest
        self._call = None if call.is_over else call
        self._take(call, said, events)
        return call.is_over

    def _take(self, call: CallObject, said: list[Event], events: list[Event]) -> None:
        if said and self._tag:
            events += self._prose.mark()
            self._tag = ""
        events += said
        if not call.is_over:
            return
        if call.text is None:
            self._is_behind_call = True
            events += self._prose.mark()
        else:
            events += self._prose.feed(self._tag + call.text)
            self._tag = ""
