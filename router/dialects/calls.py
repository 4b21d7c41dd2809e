"""How each family of models writes tool calls, as the grammar that a forced call is held to.

Owns the notations around JSON and in place of it. Reads no answers: `router/parsers` do. Compiles nothing."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.dialects.grammars import Grammar
from router.dialects.schema import refuse_unsupported, wrong_field

# Separators of calls as chat templates show them to a model: it need not guess, and no token is spent on white space.
AS_TEMPLATES_WRITE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
SAID_TO_PEOPLE = ("description", "title", "$schema", "$comment")
CALLS_MARK, ARGUMENTS_MARK = "[TOOL_CALLS]", "[ARGS]"
_PYTHON_NAME = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)

Function = Mapping[str, Any]  # of a tool: name, parameters
MarkId = Callable[[str], int | None]  # of a special token; None: no such token


@dataclass(frozen=True, slots=True)
class Spelling:
    """Texts as terms of lark. A mark that is a special token is named by its id: no text can spell it."""

    mark_id: MarkId = lambda _: None

    def __call__(self, text: str) -> str:
        number = self.mark_id(text)
        return json.dumps(text, ensure_ascii=False) if number is None else f"<[{number}]>"


@dataclass(frozen=True, slots=True)
class CallForm:
    """`rules`: lark's for one call of any of these functions, the first of them named `call`."""

    rules: Callable[[Sequence[Function], Spelling], str]
    begin: tuple[str, ...] = ()
    between: str = "\n"
    end: str = ""


def of_tools(
    tools: Sequence[dict[str, Any]], choice: str | None, form: CallForm, spell: Spelling, *, is_one: bool = False
) -> Grammar:
    """An answer that is nothing but tool calls: at least one, exactly one where `is_one`. `choice`: a function's name,
    None any of `tools`.

    Raises RequestError 400 when there is no such function, or none that can be written so."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), dict)]
    wanted = [function for function in functions if choice is None or function.get("name") == choice]
    if not wanted:
        raise wrong_field("tool_choice", "it names none of the tools")
    begin = " ".join(map(spell, form.begin))
    more = "" if choice is not None or is_one else f" ({spell(form.between)} call)*"  # a named function is called once
    try:
        return Grammar("lark", f"start: {begin} call{more} {spell(form.end)}\n{form.rules(wanted, spell)}\n")
    except RecursionError:
        raise wrong_field("tools", "a schema is nested too deeply") from None


def json_calls(before: str = "", after: str = "", arguments: str = "arguments") -> CallForm:
    """One JSON object a call, with words around it."""

    def rules(functions: Sequence[Function], spell: Spelling) -> str:
        lines = [f"call: {spell(before)} ({_either('object', functions)}) {spell(after)}"]
        lines += [f"object{number}: {_json(_object(function, arguments))}" for number, function in enumerate(functions)]
        return "\n".join(lines)

    return CallForm(rules)


def listed_calls() -> CallForm:
    """Mistral's older one: a mark, then one JSON list of all calls."""
    return CallForm(json_calls().rules, (CALLS_MARK, "["), ", ", "]")


def marked_calls() -> CallForm:
    """Mistral's newer one: for each call a mark, its name, a mark, its arguments."""

    def rules(functions: Sequence[Function], spell: Spelling) -> str:
        heads = [f"{spell(CALLS_MARK)} {spell(_name(function))} {spell(ARGUMENTS_MARK)}" for function in functions]
        lines = [f"call: {_either('call', functions)}"]
        for number, (head, function) in enumerate(zip(heads, functions, strict=True)):
            lines += [f"call{number}: {head} object{number}", f"object{number}: {_json(_parameters(function))}"]
        return "\n".join(lines)

    return CallForm(rules, between="")


def python_calls() -> CallForm:
    """Llama 4's: a list of Python calls. Values are JSON, whose true, false and null are read as Python's."""

    def rules(functions: Sequence[Function], spell: Spelling) -> str:
        lines = [f"call: {_either('call', functions)}"]
        for number, function in enumerate(functions):
            lines += _python_rules(f"{number}", function, spell)
        return "\n".join(lines)

    return CallForm(rules, ("[",), ", ", "]")


def _python_rules(number: str, function: Function, spell: Spelling) -> Iterator[str]:
    """Rule `first_k` writes arguments from the k-th on where none was written, `next_k` where one was."""
    name, parameters = _name(function), _parameters(function)
    properties = parameters.get("properties")
    arguments = list(properties.items()) if isinstance(properties, dict) else []
    required = parameters.get("required")
    for word in (name, *(argument for argument, _ in arguments)):
        if not _PYTHON_NAME.fullmatch(word) or keyword.iskeyword(word):
            raise refuse_unsupported("tool_choice", "a tool or argument has a name that Python cannot write")
    shared = _shared(parameters)
    yield f"call{number}: {spell(name + '(')} first{number}_0 {spell(')')}"
    for at, (argument, schema) in enumerate(arguments):
        is_needed = isinstance(required, list) and argument in required
        value, rest = f"value{number}_{at}", f"next{number}_{at + 1}"
        skipped = "" if is_needed else f" | first{number}_{at + 1}"
        yield f"first{number}_{at}: {spell(argument + '=')} {value} {rest}{skipped}"
        written = f"{spell(f', {argument}=')} {value}"
        yield f"next{number}_{at}: {written if is_needed else f'({written})?'} {rest}"
        yield f"{value}: {_json((schema if isinstance(schema, dict) else {}) | shared)}"
    for rule in ("first", "next"):
        yield f'{rule}{number}_{len(arguments)}: ""'


def _either(rule: str, functions: Sequence[Function]) -> str:
    return " | ".join(f"{rule}{number}" for number in range(len(functions)))


def _object(function: Function, arguments: str) -> dict[str, Any]:
    parameters = _parameters(function)
    return {
        "type": "object",
        "properties": {"name": {"const": function.get("name")}, arguments: parameters},
        "required": ["name", arguments],
        "additionalProperties": False,
        **_shared(parameters),
    }


def _shared(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What references of a schema point to, from its root."""
    return {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}


def _name(function: Function) -> str:
    return str(function.get("name"))


def _parameters(function: Function) -> dict[str, Any]:
    parameters = function.get("parameters")
    return _lean(parameters) if isinstance(parameters, dict) and parameters else {"type": "object"}


def _lean(schema: Any) -> Any:
    """Without what a grammar has no use for: of Claude Code's tools that is most."""
    if isinstance(schema, list):
        return [_lean(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in ("const", "enum") else _lean(value)
        for key, value in schema.items()
        if not (key in SAID_TO_PEOPLE and isinstance(value, str))  # an argument may have such a name
    }


def _json(schema: Mapping[str, Any]) -> str:
    is_flat = schema.get("type") in ("string", "integer", "number", "boolean", "null")
    return f"%json {json.dumps(schema if is_flat else {**schema, 'x-guidance': AS_TEMPLATES_WRITE})}"
