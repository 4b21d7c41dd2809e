"""Llama: an answer that begins with a JSON object, or has one behind `<|python_tag|>`, is calls; `;` may part them.

Owns this family's grammar. An object that names no offered function is text: people ask for JSON, too."""

from __future__ import annotations

from collections.abc import Sequence

from router.language.turn import Event
from router.parsers.call_object import CallObject
from router.parsers.marks import Prose, drained, split_at

TAG = "<|python_tag|>"


class BareJsonCalls:
    """router.language.speech.Parser for bare JSON objects."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._prose = Prose()
        self._held = ""
        self._before = ""  # space or tag that belongs to the next object if it is a call, and else to the text
        self._may_call = True  # here an object would be one
        self._call: CallObject | None = None

    def feed(self, text: str) -> Sequence[Event]:
        self._held += text
        return drained(self._step)

    def flush(self) -> Sequence[Event]:
        events: list[Event] = []
        if self._call is not None:
            call, self._call = self._call, None
            self._take(call, call.flush(), events)
        return [*events, *self._prose.feed(self._before + self._held), *self._prose.flush()]

    def _step(self, events: list[Event]) -> bool:
        """One decision; False when more text is needed for the next."""
        if self._call is not None:
            return self._in_object(self._call, events)
        return self._before_object(events) if self._may_call else self._in_text(events)

    def _in_object(self, call: CallObject, events: list[Event]) -> bool:
        said, self._held = call.feed(self._held), call.rest
        self._call = None if call.is_over else call
        self._take(call, said, events)
        return call.is_over

    def _before_object(self, events: list[Event]) -> bool:
        behind = self._held.lstrip(" \t\r\n;,")
        self._before += self._held[: len(self._held) - len(behind)]
        self._held = behind
        if behind.startswith("{"):
            self._call = CallObject(self._names)
        elif behind.startswith(TAG):
            self._before, self._held = self._before + TAG, behind.removeprefix(TAG)
        elif TAG.startswith(behind):
            return False
        else:
            self._may_call = False
            events += self._prose.feed(self._before)
            self._before = ""
        return True

    def _in_text(self, events: list[Event]) -> bool:
        before, tag, behind = split_at(self._held, TAG)
        events += self._prose.feed(before)
        self._held, self._may_call = (tag or "") + behind, tag is not None
        return self._may_call

    def _take(self, call: CallObject, said: list[Event], events: list[Event]) -> None:
        if said and self._before:
            self._before = ""
        if said:
            events += self._prose.mark()
        events += said
        if call.is_over and call.text is not None:
            events += self._prose.feed(self._before + call.text)
            self._before, self._may_call = "", False
