"""Llama 3.2 and 4: an answer that begins as a list of Python calls, `[f(a=1), g()]`, is those calls.

Owns this family's grammar. Nothing is evaluated but literals; what names no offered function is text."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

import msgspec

from router.language.turn import PART_END, Event, PartKind, PartStart
from router.parsers.call_object import HELD_CHARS_MAX
from router.parsers.marks import Prose

JSON_WORDS = {"true": True, "false": False, "null": None}
DEPTH_MAX = 32  # of brackets in one call

_NAME = re.compile(r"[A-Za-z_][\w.]*\(")
_NAME_BEGINS = re.compile(r"[A-Za-z_][\w.]*")


class PythonicCalls:
    """router.language.speech.Parser for a list of Python calls."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._prose = Prose()
        self._held = ""
        self._state = self._before_list
        self._scanned = 0  # characters of the held call that were looked at
        self._brackets = 0
        self._quote = ""
        self._is_escaped = False

    def feed(self, text: str) -> Sequence[Event]:
        self._held += text
        events: list[Event] = []
        while self._state(events):
            pass
        return events

    def flush(self) -> Sequence[Event]:
        text, self._held = self._held, ""
        if self._state == self._behind_call and not text.strip(" \t\r\n,"):
            text = ""  # a list whose end was cut off
        return [*self._prose.feed(text), *self._prose.flush()]

    # States: each takes from what is held, and returns False when more text is needed ---------------------------------

    def _before_list(self, events: list[Event]) -> bool:
        behind = self._held.lstrip()
        if not behind:
            return False
        inner = behind[1:].lstrip() if behind[0] == "[" else None
        if inner is None:
            return self._give_up(events)
        return self._begin_call(inner, len(self._held) - len(inner), events)

    def _begin_call(self, text: str, at: int, events: list[Event]) -> bool:
        """`text` should begin with `name(`; it stands at `at` in what is held."""
        named = _NAME.match(text)
        if named is None:
            could_be = not text or (_NAME_BEGINS.fullmatch(text) is not None and len(text) < HELD_CHARS_MAX)
            return False if could_be else self._give_up(events)
        if named[0][:-1] not in self._names:
            return self._give_up(events)
        self._scanned, self._brackets, self._quote, self._is_escaped = at + named.end(), 1, "", False
        self._call_at = at
        self._state = self._in_call
        return True

    def _in_call(self, events: list[Event]) -> bool:
        text = self._held
        while self._scanned < min(len(text), HELD_CHARS_MAX):
            self._look_at(text[self._scanned])
            self._scanned += 1
            if self._brackets == 0:
                return self._end_call(events)
            if self._brackets > DEPTH_MAX:
                return self._give_up(events)
        return self._give_up(events) if len(text) >= HELD_CHARS_MAX else False

    def _look_at(self, character: str) -> None:
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in "'\"":
            self._quote = character
        elif character in "([{":
            self._brackets += 1
        elif character in ")]}":
            self._brackets -= 1

    def _end_call(self, events: list[Event]) -> bool:
        call = read_call(self._held[self._call_at : self._scanned])
        if call is None:
            return self._give_up(events)
        name, arguments = call
        events += [*self._prose.mark(), PartStart(PartKind.CALL, name), arguments, PART_END]
        self._held = self._held[self._scanned :]
        self._state = self._behind_call
        return True

    def _behind_call(self, events: list[Event]) -> bool:
        behind = self._held.lstrip()
        if behind.startswith("]"):
            self._held, self._state = behind[1:], self._in_text
            return True
        if not behind.startswith(","):
            return self._give_up(events) if behind else False
        inner = behind[1:].lstrip()
        return self._begin_call(inner, len(self._held) - len(inner), events)

    def _in_text(self, events: list[Event]) -> bool:
        events += self._prose.feed(self._held)
        self._held = ""
        return False

    def _give_up(self, events: list[Event]) -> bool:
        """No call here: what is held and all that follows is text."""
        self._state = self._in_text
        return self._in_text(events) or True


class _Constants(ast.NodeTransformer):
    """JSON's words are Python's here: models mix them up, and forced calls hold JSON."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(JSON_WORDS[node.id]) if node.id in JSON_WORDS else node


def _as_python(value: ast.expr) -> ast.expr:
    seen: ast.expr = _Constants().visit(value)
    return seen


def read_call(source: str) -> tuple[str, str] | None:
    """Name and arguments' JSON of `f(a=1)`; None if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's stray backslash is nobody's warning
            tree = ast.parse(source, mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args or any(word.arg is None for word in tree.keywords):
            return None
        arguments = {str(word.arg): ast.literal_eval(_as_python(word.value)) for word in tree.keywords}
        return ast.unparse(tree.func), msgspec.json.encode(arguments).decode()
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError):
        return None
