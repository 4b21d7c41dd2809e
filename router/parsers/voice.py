"""How a model writes calls and thoughts: found in its chat template, or as configured.

Owns the list of families. Never parses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from router.dialects.calls import (
    ARGUMENTS_MARK,
    MarkId,
    Spelling,
    json_calls,
    listed_calls,
    marked_calls,
    of_tools,
    python_calls,
)
from router.dialects.schema import wrong_field
from router.language.speech import Parser, PlainText
from router.language.turn import Turn
from router.parsers.bare_json import TAG, BareJsonCalls
from router.parsers.bracketed import MARK, BracketedCalls
from router.parsers.pythonic import PythonicCalls
from router.parsers.reasoning import Reasoning
from router.parsers.tagged import OPEN, TaggedCalls

AUTO, NONE = "auto", "none"

CALLS: Mapping[str, Callable[[frozenset[str]], Parser]] = {
    "hermes": lambda _: TaggedCalls(),
    "llama": BareJsonCalls,
    "mistral": lambda _: BracketedCalls(),
    "pythonic": PythonicCalls,
}
# What a forced call is held to. A model without a form of its own is held to Hermes': it needs no training for that.
HERMES = json_calls("<tool_call>\n", "\n</tool_call>")
FORMS = {
    "hermes": HERMES,
    NONE: HERMES,
    "llama": json_calls(arguments="parameters"),
    "mistral": listed_calls(),
    "pythonic": python_calls(),
}
NAMED = marked_calls()  # of Mistral's templates that mark arguments
# Words in a template that only one family has; the first that is found decides.
SIGNS = {
    "<tool_call>": "hermes",
    MARK: "mistral",
    "func_name1(params_name1": "pythonic",
    TAG: "llama",
    '"parameters": dict': "llama",
}
OPENINGS = {"hermes": OPEN, "mistral": MARK}  # without which these families call nothing
THOUGHTS = {"think": ("<think>", "</think>"), "magistral": ("[THINK]", "[/THINK]")}
# Special tokens that a parser must see as text.
SHOWN = frozenset((TAG, MARK, "[ARGS]", "[CALL_ID]", *(mark for marks in THOUGHTS.values() for mark in marks)))


@dataclass(frozen=True, slots=True)
class Voice:
    """How one model writes what is not plain text."""

    calls: str = NONE
    thoughts: str = NONE
    marks_arguments: bool = False  # Mistral's newer form

    @classmethod
    def of(cls, template: str, calls: str = AUTO, thoughts: str = AUTO) -> Voice:
        """From the source of a chat template, unless it is said."""
        if calls == AUTO:
            calls = next((family for sign, family in SIGNS.items() if sign in template), NONE)
        if thoughts == AUTO:
            thoughts = next((name for name, (_, close) in THOUGHTS.items() if close in template), NONE)
        return cls(calls, thoughts, ARGUMENTS_MARK in template)

    def settled(self, turn: Turn, mark_id: MarkId = lambda _: None) -> Turn:
        """The turn with a grammar for the call that it must be. Raises RequestError 400.

        `mark_id`: of the model's special tokens. Who is held to a grammar does not think before it."""
        sampling = turn.sampling
        if turn.must_call is not None:
            if sampling.grammar_kind:
                raise wrong_field("tool_choice", "a forced call cannot have another form of answer beside it")
            form = NAMED if self.calls == "mistral" and self.marks_arguments else FORMS[self.calls]
            grammar = of_tools(turn.tools, turn.must_call or None, form, Spelling(mark_id), is_one=turn.is_one_call)
            sampling = msgspec.structs.replace(sampling, grammar_kind=grammar.kind, grammar=grammar.source)
        if not sampling.grammar_kind:
            return turn
        return msgspec.structs.replace(turn, sampling=sampling, is_thinking=False)

    def call_ids(self, turn: Turn, token_id: MarkId) -> list[int] | None:
        """Ids of which one begins any call in the answer; none if it cannot have one, None where that is not told by a
        single token: an object may be a call, and marks may be spelt over several."""
        if turn.must_call is None and not (turn.may_call and self.calls != NONE):
            return []
        number = token_id(OPENINGS[self.calls]) if self.calls in OPENINGS else None
        return None if number is None else [number]

    def lead(self, prompt_end: str) -> str:
        """What the end of a prompt has written of the answer's thoughts already."""
        at = prompt_end.find(THOUGHTS[self.thoughts][0]) if self.thoughts != NONE else -1
        return prompt_end[at:] if at >= 0 else ""

    def parser(self, turn: Turn, prompt_end: str) -> Parser | None:
        """For the answer to one turn whose prompt ends so; None when all of it is text."""
        if turn.must_call is not None:
            return CALLS["hermes" if self.calls == NONE else self.calls](offered(turn))
        if turn.sampling.grammar_kind:
            return None
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
