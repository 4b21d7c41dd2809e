"""How a model writes calls and thoughts: found in its chat template, or as configured.

Owns the list of families. Never parses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from router.parsers.bare_json import TAG, BareJsonCalls
from router.parsers.bracketed import MARK, BracketedCalls
from router.parsers.pythonic import PythonicCalls
from router.parsers.reasoning import Reasoning
from router.parsers.tagged import TaggedCalls
from router.speech import Parser, PlainText
from router.turn import Turn

AUTO, NONE = "auto", "none"

CALLS: Mapping[str, Callable[[frozenset[str]], Parser]] = {
    "hermes": lambda _: TaggedCalls(),
    "llama": BareJsonCalls,
    "mistral": lambda _: BracketedCalls(),
    "pythonic": PythonicCalls,
}
# Words in a template that only one family has; the first that is found decides.
SIGNS = {
    "<tool_call>": "hermes",
    MARK: "mistral",
    "func_name1(params_name1": "pythonic",
    TAG: "llama",
    '"parameters": dict': "llama",
}
THOUGHTS = {"think": ("<think>", "</think>"), "magistral": ("[THINK]", "[/THINK]")}
# Special tokens that a parser must see as text.
SHOWN = frozenset((TAG, MARK, "[ARGS]", "[CALL_ID]", *(mark for marks in THOUGHTS.values() for mark in marks)))


@dataclass(frozen=True, slots=True)
class Voice:
    """How one model writes what is not plain text."""

    calls: str = NONE
    thoughts: str = NONE

    @classmethod
    def of(cls, template: str, calls: str = AUTO, thoughts: str = AUTO) -> Voice:
        """From the source of a chat template, unless it is said."""
        if calls == AUTO:
            calls = next((family for sign, family in SIGNS.items() if sign in template), NONE)
        if thoughts == AUTO:
            thoughts = next((name for name, (_, close) in THOUGHTS.items() if close in template), NONE)
        return cls(calls, thoughts)

    def parser(self, turn: Turn, prompt_end: str) -> Parser | None:
        """For the answer to one turn whose prompt ends so; None when all of it is text."""
        parser: Parser | None = None
        if turn.may_call and self.calls != NONE:
            parser = CALLS[self.calls](offered(turn))
        if turn.messages and self.thoughts != NONE:
            marks = THOUGHTS[self.thoughts]
            parser = Reasoning(marks, parser or PlainText(), has_begun=prompt_end.rstrip().endswith(marks[0]))
        return parser


def offered(turn: Turn) -> frozenset[str]:
    """Names of the functions that the client offers."""
    functions = (tool.get("function") for tool in turn.tools)
    return frozenset(str(function.get("name")) for function in functions if isinstance(function, dict))
