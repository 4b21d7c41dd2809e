"""Parsers of answers: however the text is cut the parts are the same, none is lost, and what is no call is text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.wire import Sampling
from router.language.speech import Parser, PlainText
from router.language.turn import Part, PartEnd, PartKind, PartStart, Turn, parts_of
from router.parsers.bare_json import TAG, BareJsonCalls
from router.parsers.bracketed import MARK, BracketedCalls
from router.parsers.call_object import HELD_CHARS_MAX
from router.parsers.pythonic import DEPTH_MAX, PythonicCalls
from router.parsers.reasoning import Reasoning
from router.parsers.tagged import CLOSE, OPEN, TaggedCalls
from router.parsers.voice import Voice

NAMES = frozenset(("f", "get_weather"))
THINK = ("<think>", "</think>")
Make = Callable[[], Parser]
FAMILIES: dict[str, Make] = {
    "plain": PlainText,
    "hermes": TaggedCalls,
    "llama": lambda: BareJsonCalls(NAMES),
    "mistral": BracketedCalls,
    "pythonic": lambda: PythonicCalls(NAMES),
    "thoughts": lambda: Reasoning(THINK, PlainText(), has_begun=False),
    "open thoughts, then hermes": lambda: Reasoning(THINK, TaggedCalls(), has_begun=True),
}

SHREDS = st.sampled_from(
    [
        *(
            OPEN,
            CLOSE,
            TAG,
            MARK,
            *THINK,
            "[ARGS]",
            "[CALL_ID]",
            "<tool",
            "</",
            "[TOOL",
            "[",
            "]",
            "{",
            "}",
            '"',
            "\\",
            ";",
        ),
        *(
            ",",
            ":",
            " ",
            "\n",
            "a",
            "é",
            "<",
            "(",
            ")",
            "'",
            "f(",
            "f",
            "x=1",
            "[f(x=1)]",
            "[get_weather(city='Oslo, (N)')",
        ),
        *('{"name": "f", "arguments": {"x": 1}}', '{"name": "f", "arguments": {', '{"name":"g","parameters":{}}'),
        *(
            '{"arguments": {"x": "}"}, "name": "f"}',
            '{"name": "f", "arguments": "{}"}',
            '{"x": 1}',
            '"name"',
            "f[ARGS]{}",
        ),
        *('{"name": "f", "arguments": {"tag": "</tool_call>"}, "id": 1}', "some words", "\ud800"),
    ]
)
TEXTS = st.lists(SHREDS, max_size=12).map("".join)


def parts(parser: Parser, pieces: Sequence[str]) -> list[Part]:
    """The parts of a text that comes in pieces; events must be well formed."""
    events = [event for piece in pieces if piece for event in parser.feed(piece)]
    events += parser.flush()
    is_open = False
    for event in events:
        if isinstance(event, PartStart):
            assert not is_open
            is_open = True
        else:
            assert is_open
            is_open = not isinstance(event, PartEnd)
            assert event != ""
    assert not is_open
    return parts_of(events)


def text(said: str) -> Part:
    return Part(PartKind.TEXT, said)


def thought(said: str) -> Part:
    return Part(PartKind.REASONING, said)


def call(name: str, **arguments: Any) -> Part:
    return Part(PartKind.CALL, json.dumps(arguments), name)


@pytest.mark.parametrize("family", FAMILIES)
@given(said=TEXTS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_cut_of_a_text_gives_the_parts_of_the_whole(family: str, said: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=8)))
    pieces = [said[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    whole = parts(FAMILIES[family](), [said])
    assert parts(FAMILIES[family](), pieces) == whole
    assert parts(FAMILIES[family](), list(said)) == whole


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
@given(said=st.lists(SHREDS, max_size=40).map("".join), size=st.integers(1, 9))
@settings(max_examples=20_000, deadline=None)
def test_any_cut_of_any_text_at_length(family: str, said: str, size: int) -> None:
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    assert parts(FAMILIES[family](), pieces) == parts(FAMILIES[family](), [said])


@pytest.mark.parametrize("family", ["plain", "hermes", "llama", "mistral", "pythonic", "thoughts"])
@given(said=st.text(alphabet=st.characters(exclude_characters="<[{"), max_size=40))
@example(said="  a \n b  ")
@settings(max_examples=60, deadline=None)
def test_text_without_marks_is_left_as_it_is(family: str, said: str) -> None:
    assert "".join(part.text for part in parts(FAMILIES[family](), list(said))) == said


ARGUMENTS = st.dictionaries(
    st.text(alphabet="abc", min_size=1, max_size=3),
    st.text(max_size=8) | st.integers(-9, 9) | st.booleans() | st.lists(st.none() | st.text(max_size=3), max_size=2),
    max_size=3,
)
CALLS = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), ARGUMENTS), min_size=1, max_size=3)
WRITERS: dict[str, Callable[[list[tuple[str, dict[str, Any]]]], str]] = {
    "hermes": lambda calls: "\n".join(
        f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments})}\n{CLOSE}" for name, arguments in calls
    ),
    "llama": lambda calls: "; ".join(json.dumps({"name": name, "parameters": given}) for name, given in calls),
    "mistral": lambda calls: MARK + json.dumps([{"name": name, "arguments": given} for name, given in calls]),
    "pythonic": lambda calls: (
        "["
        + ", ".join(f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls)
        + "]"
    ),
}


@pytest.mark.parametrize("family", WRITERS)
@given(calls=CALLS, size=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_calls_are_read_back_as_they_were_written(family: str, calls: list[tuple[str, Any]], size: int) -> None:
    written = WRITERS[family](calls)
    found = parts(FAMILIES[family](), [written[at : at + size] for at in range(0, len(written), size)])
    assert [(part.kind, part.name, json.loads(part.text)) for part in found] == [
        (PartKind.CALL, name, arguments) for name, arguments in calls
    ]


CASES: list[tuple[str, str, list[Part]]] = [
    ("hermes", 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n\nDone.',
     [text("Let me see."), call("f", x=1), text("Done.")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}', [call("f", x=1)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call> ok', [call("f", x=1), text("ok")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "cut', [Part(PartKind.CALL, '{"x": "cut', "f")]),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', [Part(PartKind.CALL, '{"x":1}', "f")]),
    ("hermes", "<tool_call>no JSON</tool_call>", [text("<tool_call>no JSON</tool_call>")]),
    ("hermes", '<tool_call>{"x": 1}</tool_call>', [text('<tool_call>{"x": 1}</tool_call>')]),
    ("hermes", "I write <tool_ca", [text("I write <tool_ca")]),
    ("hermes", '{"name": "f", "arguments": {}}', [text('{"name": "f", "arguments": {}}')]),
    ("llama", '{"name": "f", "parameters": {"x": 1}}', [call("f", x=1)]),
    ("llama", TAG + '{"name": "f", "parameters": {}}', [call("f")]),
    ("llama", '{"name": "nobody", "parameters": {}}', [text('{"name": "nobody", "parameters": {}}')]),
    ("llama", ' {"answer": 42}\n', [text(' {"answer": 42}\n')]),
    ("llama", 'No: {"name": "f", "parameters": {}}', [text('No: {"name": "f", "parameters": {}}')]),
    ("mistral", 'Well. [TOOL_CALLS]f[ARGS]{"x": 1}', [text("Well."), call("f", x=1)]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]ab12[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{}', [call("f"), call("get_weather")]),
    ("mistral", "[TOOL_CALLS] none today", [text("[TOOL_CALLS] none today")]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}] bye', [call("f"), text("bye")]),
    ("pythonic", "[f(x=1, s='a]b')] then", [Part(PartKind.CALL, '{"x":1,"s":"a]b"}', "f"), text("then")]),
    ("pythonic", "[link](https://example.org)", [text("[link](https://example.org)")]),
    ("pythonic", "[f(x=open('/etc/passwd'))]", [text("[f(x=open('/etc/passwd'))]")]),
    ("pythonic", "[f(x=1), nobody()]", [Part(PartKind.CALL, '{"x":1}', "f"), text(", nobody()]")]),
    ("thoughts", "<think>\nhm\n\n</think>\n\nYes.", [thought("hm"), text("Yes.")]),
    ("thoughts", "<think>\n\n</think>\n\nYes.", [text("Yes.")]),
    ("thoughts", "<think>never ends", [thought("never ends")]),
    ("thoughts", "Say <think>x</think>", [text("Say <think>x</think>")]),
    ("open thoughts, then hermes", 'hm</think><tool_call>{"name": "f", "arguments": {}}</tool_call>',
     [thought("hm"), call("f")]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "said", "wanted"), CASES, ids=[f"{case[0]}: {case[1][:40]}" for case in CASES])
def test_what_models_write(family: str, said: str, wanted: list[Part]) -> None:
    assert parts(FAMILIES[family](), [said]) == wanted
    assert parts(FAMILIES[family](), list(said)) == wanted


@pytest.mark.parametrize("family", ["hermes", "llama", "mistral"])
def test_an_object_that_never_names_its_call_is_text_after_a_bound(family: str) -> None:
    opening = {"hermes": OPEN, "llama": "", "mistral": MARK}[family]
    said = opening + '{"x": "' + "y" * HELD_CHARS_MAX
    parser = FAMILIES[family]()
    shown = "".join(event for event in parser.feed(said) if isinstance(event, str))
    assert len(said) - len(shown) < 64
    assert "".join(part.text for part in parts(FAMILIES[family](), [said])) == said


@pytest.mark.parametrize(
    "said", ["[f(x=" + "[" * (DEPTH_MAX + 1), "[f(x='" + "y" * HELD_CHARS_MAX, "[f(x=" + "9" * 5000 + ")]"]
)
def test_a_python_call_too_deep_or_too_long_is_text(said: str) -> None:
    assert parts(FAMILIES["pythonic"](), [said]) == [text(said)]


def test_arguments_go_on_while_they_come() -> None:
    parser = TaggedCalls()
    parser.feed('<tool_call>{"name": "f", "arguments": {"x": "')
    assert list(parser.feed("long ")) == ["long "]
    assert list(parser.feed("text")) == ["text"]


@pytest.mark.parametrize(
    ("template", "voice"),
    [
        ("... <tool_call> ... </think> ...", Voice("hermes", "think")),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", Voice("mistral", "none")),
        ("<|python_tag|>", Voice("llama", "none")),
        ("[func_name1(params_name1=params_value1)]", Voice("pythonic", "none")),
        ("{{ messages }}", Voice()),
    ],
)
def test_a_template_tells_the_family(template: str, voice: Voice) -> None:
    assert Voice.of(template) == voice
    assert Voice.of(template, calls="none", thoughts="none") == Voice()


PLAIN = Turn(model="m", sampling=Sampling(), max_tokens=None, stop=(), is_stream=False)


@pytest.mark.parametrize(
    ("calls", "offered", "ids"),
    [
        ("hermes", {"may_call": True}, [7]),
        ("mistral", {"must_call": "f"}, [9]),
        ("hermes", {}, []),  # no tools: nothing it says is a call
        ("none", {"may_call": True}, []),  # it has no form for calls
        ("llama", {"may_call": True}, None),  # any object may be one
        ("pythonic", {"may_call": True}, None),
    ],
)
def test_the_token_that_begins_a_call_is_known_where_there_is_one(
    calls: str, offered: dict[str, Any], ids: list[int] | None
) -> None:
    marks = {"<tool_call>": 7, "[TOOL_CALLS]": 9}
    assert Voice(calls).call_ids(replace(PLAIN, **offered), marks.get) == ids


def test_a_mark_that_is_spelt_over_several_tokens_tells_nothing() -> None:
    assert Voice("hermes").call_ids(replace(PLAIN, may_call=True), lambda _: None) is None
