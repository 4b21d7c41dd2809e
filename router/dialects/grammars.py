"""From what a client says an answer must be to the grammar that the engine holds it to.

Owns the two notations that go to a worker (a JSON schema, lark). Compiles nothing: a worker does, under its limits."""

from __future__ import annotations

import json
from typing import NamedTuple

import msgspec

from router.dialects.schema import ABSENT, Common, ResponseFormat, StructuredOutputs, refuse_unsupported, wrong_field

ANY_OBJECT = '{"type":"object"}'


class Grammar(NamedTuple):
    """`kind` as in engine.wire.Sampling; empty: any text."""

    kind: str
    source: str


ANY_TEXT = Grammar("", "")


def of_body(body: Common) -> Grammar:
    """The grammar that a body asks for. Raises RequestError 400."""
    given = [_of_format(body.response_format), _of_extension(body.structured_outputs)]
    asked = [grammar for grammar in given if grammar is not ANY_TEXT]
    if len(asked) > 1:
        raise wrong_field("structured_outputs", "it cannot stand beside response_format")
    return asked[0] if asked else ANY_TEXT


def _of_format(wanted: ResponseFormat | None) -> Grammar:
    if wanted is None or wanted.type == "text":
        return ANY_TEXT
    if wanted.type == "json_object":
        return Grammar("json_schema", ANY_OBJECT)
    if wanted.type != "json_schema":
        raise refuse_unsupported("response_format.type", "text, json_object and json_schema are served")
    if wanted.json_schema is None or wanted.json_schema.schema == ABSENT:
        raise wrong_field("response_format.json_schema.schema", "it is missing")
    return Grammar("json_schema", _text(wanted.json_schema.schema))


def _of_extension(wanted: StructuredOutputs | None) -> Grammar:
    if wanted is None:
        return ANY_TEXT
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) not in (None, ABSENT)]
    if len(given) != 1:
        raise wrong_field("structured_outputs", "it must hold one of json, regex, choice and grammar")
    if wanted.json != ABSENT:
        return Grammar("json_schema", _text(wanted.json))
    if wanted.choice is not None:
        return Grammar("lark", "start: " + " | ".join(_literal(text) for text in wanted.choice))
    return Grammar("regex", wanted.regex) if wanted.regex is not None else Grammar("lark", wanted.grammar or "")


def _text(raw: msgspec.Raw) -> str:
    return bytes(raw).decode()


def _literal(text: str) -> str:
    """A text as lark writes it."""
    return json.dumps(text, ensure_ascii=False)
