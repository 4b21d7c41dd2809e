"""Mistral: behind `[TOOL_CALLS]` stands a list of call objects, or, newer, `name[ARGS]{...}`.

Owns this family's grammar. A mark without a call behind it is text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from router.language.turn import PART_END, Event, PartKind, PartStart
from router.parsers.call_object import CallObject
from router.parsers.marks import JsonScan, Prose, drained, split_at

MARK = "[TOOL_CALLS]"
NAME_CHARS_MAX = 512  # with [CALL_ID] and [ARGS]; longer is no name

_NAMED = re.compile(r"\s*([\w.:-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\]\s*)?")


class BracketedCalls:
    """router.language.speech.Parser for calls behind a mark."""

    def __init__(self) -> None:
        self._prose = Prose()
        self._held = ""
        self._mark = ""  # it and what followed, until a call is known to
        self._is_behind_call = False
        self._call: CallObject | None = None
        self._arguments: JsonScan | None = None

    def feed(self, text: str) -> Sequence[Event]:
        self._held += text
        return drained(self._step)

    def flush(self) -> Sequence[Event]:
        events: list[Event] = []
        if self._call is not None:
            call, self._call = self._call, None
            self._take(call, call.flush(), events)
        elif self._arguments is not None:
            events.append(PART_END)
        return [*events, *self._prose.feed(self._mark + self._held), *self._prose.flush()]

    def _step(self, events: list[Event]) -> bool:
        """One decision; False when more text is needed for the next."""
        if self._call is not None:
            return self._in_object(self._call, events)
        if self._arguments is not None:
            return self._in_arguments(self._arguments, events)
        if self._mark:
            return self._behind_mark(events)
        if self._is_behind_call:
            return self._behind_call()
        before, mark, self._held = split_at(self._held, MARK)
        events += self._prose.feed(before)
        self._mark = mark or ""
        return mark is not None

    def _behind_mark(self, events: list[Event]) -> bool:
        behind = self._held.lstrip()
        if not behind:
            return False
        if behind[0] == "[" and self._mark == MARK:
            self._mark += self._held[: len(self._held) - len(behind) + 1]
            self._held = behind[1:]
            return True
        if behind[0] == "{":
            self._mark += self._held[: len(self._held) - len(behind)]
            self._call, self._held = CallObject(), behind
            return True
        return self._behind_name(events)

    def _behind_name(self, events: list[Event]) -> bool:
        """`name[ARGS]{`: the brace decides."""
        brace = self._held.find("{", 0, NAME_CHARS_MAX)
        if brace < 0 and len(self._held) < NAME_CHARS_MAX:
            return False
        named = _NAMED.fullmatch(self._held, 0, brace) if brace > 0 else None
        if named is None or self._mark != MARK:
            events += self._prose.feed(self._mark)
            self._mark = ""
            return True
        events += [*self._prose.mark(), PartStart(PartKind.CALL, named[1])]
        self._mark, self._held, self._arguments = "", self._held[brace:], JsonScan()
        return True

    def _behind_call(self) -> bool:
        """More objects of the list, its end, another mark, or text."""
        behind = self._held.lstrip(" \t\r\n,]")
        self._held = behind
        if not behind:
            return False
        self._is_behind_call = False
        if behind[0] == "{":
            self._call = CallObject()
        return True

    def _in_arguments(self, arguments: JsonScan, events: list[Event]) -> bool:
        taken = arguments.feed(self._held)
        events += [self._held[:taken]] if taken else []
        self._held = self._held[taken:]
        if arguments.is_over:
            events.append(PART_END)
            self._arguments, self._is_behind_call = None, True
        return arguments.is_over

    def _in_object(self, call: CallObject, events: list[Event]) -> bool:
        said, self._held = call.feed(self._held), call.rest
        self._call = None if call.is_over else call
        self._take(call, said, events)
        return call.is_over

    def _take(self, call: CallObject, said: list[Event], events: list[Event]) -> None:
        if said:
            events += self._prose.mark()
            self._mark = ""
        events += said
        if not call.is_over:
            return
        if call.text is None:
            self._is_behind_call = True
        else:
            events += self._prose.feed(self._mark + call.text)
            self._mark = ""
