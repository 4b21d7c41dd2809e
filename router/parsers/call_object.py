"""One call written as a JSON object, `{"name": ..., "arguments": {...}}`: its arguments go on while they come.

Owns what is held back until the name is known, and its bound. What turns out to be no call is handed back as text."""

from __future__ import annotations

import re

import msgspec

from router.language.turn import PART_END, Event, PartKind, PartStart
from router.parsers.marks import JsonScan

HELD_CHARS_MAX = 65_536  # of an object whose name has not come; beyond it the object is text

_HEADER = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class CallObject:
    """Feed it from its first brace on until it `is_over`; `rest`, empty till then, is behind it. `text`: no call."""

    __slots__ = ("_arguments", "_held", "_names", "_outer", "is_over", "rest", "text")

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self._names = names  # the only ones that make a call; None: any
        self._held = ""
        self._outer = JsonScan()
        self._arguments: JsonScan | None = None  # once they are on their way
        self.is_over = False
        self.rest = ""
        self.text: str | None = None

    def feed(self, text: str) -> list[Event]:
        """The events that `text` completes."""
        if self._arguments is not None:
            return self._stream(text)
        room = HELD_CHARS_MAX - len(self._held)
        taken = self._outer.feed(text[:room])
        self._held += text[:taken]
        if (header := _HEADER.match(self._held)) and (name := self._named(header[1])) is not None:
            self._arguments, self._outer = JsonScan(), JsonScan(depth=1)
            behind = self._held[header.end() :] + text[taken:]
            return [PartStart(PartKind.CALL, name), *self._stream(behind)]
        if self._outer.is_over or len(self._held) == HELD_CHARS_MAX:
            return self._end_whole(text[taken:])
        return []

    def flush(self) -> list[Event]:
        """The text has ended: arguments that were cut off stay as they are."""
        if self.is_over:
            return []
        if self._arguments is None:
            return self._end_whole("")
        self.is_over = True
        return [] if self._arguments.is_over else [PART_END]

    def _stream(self, text: str) -> list[Event]:
        assert self._arguments is not None
        events: list[Event] = []
        if not self._arguments.is_over:
            taken = self._arguments.feed(text)
            events += [text[:taken]] if taken else []
            events += [PART_END] if self._arguments.is_over else []
            text = text[taken:]
        if self._arguments.is_over:
            taken = self._outer.feed(text)  # other fields of the call say nothing
            self.is_over, self.rest = self._outer.is_over, text[taken:]
        return events

    def _end_whole(self, rest: str) -> list[Event]:
        """All of it is here and its arguments did not come last: read it in one piece."""
        self.is_over, self.rest = True, rest
        call = whole_call(self._held, self._names)
        if call is None:
            self.text = self._held
            return []
        name, arguments = call
        return [PartStart(PartKind.CALL, name), arguments, PART_END]

    def _named(self, quoted: str) -> str | None:
        try:
            name = msgspec.json.decode(quoted, type=str)
        except (msgspec.DecodeError, UnicodeError):
            return None
        return name if self._names is None or name in self._names else None


def whole_call(text: str, names: frozenset[str] | None) -> tuple[str, str] | None:
    """Name and arguments of a call object; None if it is none."""
    try:
        call = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # some write their JSON as a string
        return (name, arguments) if arguments and (names is None or name in names) else None
    if not isinstance(arguments, dict) or (names is not None and name not in names):
        return None
    return name, msgspec.json.encode(arguments).decode()
