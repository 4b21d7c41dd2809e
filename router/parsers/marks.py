"""What parsers of a model's text share: where a mark is or may begin, where JSON ends, and text between marks.

Owns the rule that white space next to a mark belongs to the mark. Knows no family of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.language.turn import PART_END, TEXT_START, Event


def beginning_at_end(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` begin a mark, and are not a whole one; the most of all marks."""
    longest = max(len(mark) for mark in marks) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def split_at(text: str, mark: str) -> tuple[str, str | None, str]:
    """(what is surely before the mark, the mark if it stands here, what is behind it or may begin it)."""
    before, found, behind = text.partition(mark)
    if found:
        return before, mark, behind
    at = len(text) - beginning_at_end(text, (mark,))
    return text[:at], None, text[at:]


def drained(step: Callable[[list[Event]], bool]) -> list[Event]:
    """The events of a parser's steps, taken until the next one needs more text."""
    events: list[Event] = []
    while step(events):
        pass
    return events


class JsonScan:
    """Finds the end of one JSON object as its text comes. A `<` outside of strings ends it, too: no JSON has one, but a
    model that forgets a brace writes its closing tag there."""

    __slots__ = ("_depth", "_is_escaped", "_is_string", "is_over")

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth  # of the objects that stand open already
        self._is_string = self._is_escaped = self.is_over = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for at, character in enumerate(text):
            if self._is_string:
                self._in_string(character)
            elif character == '"':
                self._is_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_over = True
                    return at + 1
            elif character == "<":
                self.is_over = True
                return at
        return len(text)

    def _in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_string = False


class Prose:
    """Text outside of marks: a part that opens with its first character and closes before a call."""

    __slots__ = ("_is_behind_mark", "_is_open", "_space")

    def __init__(self) -> None:
        self._is_open = self._is_behind_mark = False
        self._space = ""  # at the end of the text so far: it may stand before a mark

    def feed(self, text: str) -> list[Event]:
        """More text."""
        if self._is_behind_mark:
            text = text.lstrip()
            self._is_behind_mark = not text
        body = text.rstrip()
        if not body:
            self._space += text
            return []
        said = self._space + body
        self._space = text[len(body) :]
        return self._opened(said)

    def mark(self) -> list[Event]:
        """A mark stands here."""
        self._space, self._is_behind_mark = "", True
        return self._closed()

    def flush(self) -> list[Event]:
        """The text has ended."""
        space, self._space = self._space, ""
        return [*(self._opened(space) if space else ()), *self._closed()]

    def _opened(self, text: str) -> list[Event]:
        if self._is_open:
            return [text]
        self._is_open = True
        return [TEXT_START, text]

    def _closed(self) -> list[Event]:
        was_open, self._is_open = self._is_open, False
        return [PART_END] if was_open else []
