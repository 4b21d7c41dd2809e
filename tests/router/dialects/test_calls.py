"""Forced calls, family by family: what the grammar lets a model write, its own parser reads back as the call."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from engine.compute.grammar import GrammarCompiler
from engine.wire import Sampling
from router.errors import RequestError
from router.language.turn import Message, PartKind, Turn, parts_of
from router.language.vocabulary import Vocabulary
from router.parsers.voice import Voice
from tests.router.desk import tokenizer_json

MARKS = ("[TOOL_CALLS]", "[ARGS]")
FLAG = {"type": "object", "properties": {"c": {"type": "boolean"}}, "required": ["c"], "additionalProperties": False}
SET = {
    "type": "object",
    "description": "What is set.",
    "properties": {
        "a": {"type": "integer", "description": "x" * 500},
        "b": {"$ref": "#/$defs/Flag"},
        "description": {"type": "string"},  # an argument, not words about one
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"Flag": FLAG},
}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("set", SET), ("wait", {"type": "object", "properties": {}}))
)
VOICES = {
    "none": Voice(),
    "hermes": Voice("hermes"),
    "llama": Voice("llama"),
    "mistral": Voice("mistral"),
    "mistral, marked": Voice("mistral", marks_arguments=True),
    "pythonic": Voice("pythonic"),
}
TWO = {
    "none": '<tool_call>\n{"name": "set", "arguments": {"a": 1, "b": {"c": true}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>',
    "llama": '{"name": "set", "parameters": {"a": 1, "b": {"c": true}}}\n{"name": "wait", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "set", "arguments": {"a": 1, "b": {"c": true}}}, '
    '{"name": "wait", "arguments": {}}]',
    "mistral, marked": '[TOOL_CALLS]set[ARGS]{"a": 1, "b": {"c": true}}[TOOL_CALLS]wait[ARGS]{}',
    "pythonic": '[set(a=1, b={"c": true}), wait()]',
}
TWO["hermes"] = TWO["none"]


def vocabulary() -> tuple[Vocabulary, str, int]:
    """One token a byte and the marks; its JSON; the token that ends an answer."""
    definition = tokenizer_json()
    first = max(added["id"] for added in definition["added_tokens"]) + 1
    like = definition["added_tokens"][0]
    definition["added_tokens"] += [like | {"id": first + at, "content": mark} for at, mark in enumerate(MARKS)]
    return Vocabulary(definition), json.dumps(definition), first - 1


KNOWN, JSON, END = vocabulary()


def turn(must_call: str, tools: tuple[dict[str, Any], ...] = TOOLS) -> Turn:
    return Turn("m", Sampling(), None, (), False, (Message("user", "x"),), tools, may_call=True, must_call=must_call)


def allows(settled: Turn, text: str) -> bool:
    """Whether the grammar lets a model write this and end there."""
    compiler = GrammarCompiler(JSON, len(KNOWN), [END])
    grammar = compiler.compile(settled.sampling.grammar_kind, settled.sampling.grammar)
    for token in [*KNOWN.encode_marked(text), END]:
        mask = np.zeros(grammar.mask_words, dtype=np.int32)
        grammar.fill(mask)
        if not (int(mask[token // 32]) >> (token % 32)) & 1:
            return False
        grammar.accept(token)
    return True


@pytest.mark.parametrize("family", VOICES)
def test_what_the_grammar_allows_is_read_back_as_calls(family: str) -> None:
    settled = VOICES[family].settled(turn(""), KNOWN.mark_id)
    assert allows(settled, TWO[family])
    parser = VOICES[family].parser(settled, "")
    assert parser is not None
    parts = parts_of([*parser.feed(TWO[family]), *parser.flush()])
    calls = [(part.name, json.loads(part.text)) for part in parts if part.kind is PartKind.CALL]
    assert calls == [("set", {"a": 1, "b": {"c": True}}), ("wait", {})]
    assert all(part.kind is PartKind.CALL for part in parts if part.text.strip())


@pytest.mark.parametrize("family", VOICES)
def test_nothing_else_is_allowed(family: str) -> None:
    settled = VOICES[family].settled(turn("set"), KNOWN.mark_id)
    assert not allows(settled, "It is set.")
    assert not allows(settled, "")
    assert not allows(settled, TWO[family])  # one call, and of this function
    assert not allows(settled, TWO[family].replace("1", '"one"'))


@pytest.mark.parametrize(
    ("said", "is_allowed"),
    [
        ("[set(a=1)]", True),
        ('[set(a=1, description="x")]', True),
        ('[set(a=1, b={"c": false}, description="x")]', True),
        ('[set(b={"c": true})]', False),  # a is required
        ('[set(description="x", a=1)]', False),  # in the order of the schema
        ("[set(a=1,)]", False),
        ("[set(a=1, a=1)]", False),
        ("[set()]", False),
    ],
)
def test_python_calls_hold_what_is_required_in_order(said: str, is_allowed: bool) -> None:
    assert allows(VOICES["pythonic"].settled(turn("set"), KNOWN.mark_id), said) == is_allowed


def test_marks_that_are_ordinary_text_are_spelt_as_text() -> None:
    settled = VOICES["mistral"].settled(turn(""))
    assert settled.sampling.grammar.startswith('start: "[TOOL_CALLS]" "["')
    assert VOICES["mistral"].settled(turn(""), KNOWN.mark_id).sampling.grammar.startswith(f"start: <[{END + 1}]> ")


def test_words_for_people_are_left_out_and_arguments_of_such_names_are_not() -> None:
    grammar = VOICES["hermes"].settled(turn("set")).sampling.grammar
    assert "xxx" not in grammar
    assert "What is set." not in grammar
    assert '"description": {"type": "string"}' in grammar


@pytest.mark.parametrize("name", ["not-python", "class", "", "f(x)", "é"])
def test_names_that_python_cannot_write_are_refused(name: str) -> None:
    tools = ({"type": "function", "function": {"name": name}},)
    with pytest.raises(RequestError) as refused:
        VOICES["pythonic"].settled(turn("", tools))
    assert refused.value.detail.param == "tool_choice"
    assert VOICES["hermes"].settled(turn("", tools)).sampling.grammar


def test_what_cannot_be_forced_is_refused_with_its_field() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(3000):
        deep = {"type": "object", "properties": {"x": deep}}
    regex = Sampling(grammar_kind="regex", grammar="a")
    wrong = {
        "tool_choice": [turn("nobody"), replace(turn(""), sampling=regex), turn("", ())],
        "tools": [turn("", ({"type": "function", "function": {"name": "f", "parameters": deep}},))],
    }
    for field, turns in wrong.items():
        for one in turns:
            with pytest.raises(RequestError) as refused:
                VOICES["hermes"].settled(one)
            assert (refused.value.status, refused.value.detail.param) == (400, field)
