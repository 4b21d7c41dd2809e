"""Templates that refuse what agents send: the same words reach the model all the same, under roles that they take."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from router.errors import RequestError
from router.language.forms import forms, joined
from router.language.template import ChatTemplate
from router.language.text import Text
from router.language.turn import Message
from tests.router.desk import IN_TURN_TEMPLATE, NO_SYSTEM_TEMPLATE, TOOL_TEMPLATE, VOCABULARY
from tests.router.language.test_text import IDENTITY, prompt_of, turn

# As Qwen3.5's: `system` stands at the beginning or nowhere.
SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}{% endfor %}" + TOOL_TEMPLATE
)
# As Llama's: one call at a time.
ONE_CALL = (
    "{% for m in messages if m.tool_calls and m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls') }}"
    "{% endfor %}" + TOOL_TEMPLATE
)
STRICT = {
    "one call": ONE_CALL,
    "in turn": IN_TURN_TEMPLATE,
    "system first": SYSTEM_FIRST,
    "no system": NO_SYSTEM_TEMPLATE,
}


def called(call_id: str) -> dict[str, Any]:
    function = {"name": "look", "arguments": {"at": "it"}}
    return {"tool_calls": [{"id": call_id, "type": "function", "function": function}]}


LONG_ID = "call_0123456789abcdef0123456700"
SAID = {
    "system in the middle": [
        Message("system", "Be."),
        Message("user", "One."),
        Message("system", "Two."),
        Message("assistant", "Three."),
        Message("user", "Four."),
    ],
    "two users": [Message("user", "One."), Message("user", "Two.")],
    "a call": [
        Message("user", "One."),
        Message("assistant", "", called(LONG_ID)),
        Message("tool", "Two.", {"tool_call_id": LONG_ID}),
    ],
    "more behind a result": [
        Message("system", "Be."),
        Message("user", "One."),
        Message("assistant", "", called(LONG_ID)),
        Message("tool", "Two.", {"tool_call_id": LONG_ID}),
        Message("user", "Three."),
        Message("system", "Four."),
    ],
}


def prompt_text(source: str, messages: list[Message]) -> str:
    text = Text(VOCABULARY, ChatTemplate(source, {}))
    ids = prompt_of(text, replace(turn("x"), messages=tuple(messages))).ids
    return b"".join(VOCABULARY.token_bytes[token] or b"|" for token in ids.tolist()).decode()


@pytest.mark.parametrize("messages", SAID.values(), ids=SAID)
@pytest.mark.parametrize("source", STRICT.values(), ids=STRICT)
def test_a_strict_template_gets_every_word_in_its_order(source: str, messages: list[Message]) -> None:
    shown = prompt_text(source, messages)
    places = [shown.find(message.content) for message in messages if message.content]
    assert -1 not in places
    assert places == sorted(places)
    assert shown.count('{"name": "look", "arguments": {"at": "it"}}') == sum(bool(m.extra) for m in messages) // 2


@pytest.mark.parametrize("messages", SAID.values(), ids=SAID)
def test_a_template_that_takes_it_gets_it_as_it_was_sent(messages: list[Message]) -> None:
    asked = ChatTemplate(TOOL_TEMPLATE, {}).render(messages, ())
    assert prompt_text(TOOL_TEMPLATE, messages).replace("|", "") == "".join(
        piece.text if piece.is_client else piece.text.replace("<|im_start|>", "").replace("<|im_end|>", "")
        for piece in asked.pieces()
    )


def test_what_no_form_helps_is_refused_in_the_templates_own_first_words() -> None:
    text = Text(VOCABULARY, ChatTemplate(IN_TURN_TEMPLATE, {}))
    wanted = replace(turn("x"), messages=(Message("assistant", "One."), Message("system", "Two.")))
    with pytest.raises(RequestError, match="users and assistants in turn"):
        text.render(wanted, IDENTITY)


def test_a_call_and_its_result_still_belong_together_under_short_ids() -> None:
    short = next(forms(tuple(SAID["a call"])))
    called_by, came_back = short[1].extra, short[2].extra
    assert called_by is not None
    assert came_back is not None
    assert called_by["tool_calls"][0]["id"] == came_back["tool_call_id"]
    assert len(came_back["tool_call_id"]) == 9
    assert not list(forms((short[0], *short[1:])))  # nothing else to change


def test_several_calls_become_one_after_the_other_each_with_its_own_result() -> None:
    calls = [called(call_id)["tool_calls"][0] for call_id in ("a", "b")]
    results = [Message("tool", said, {"tool_call_id": said}) for said in ("b", "a", "stray")]
    messages = [Message("user", "One."), Message("assistant", "Two.", {"tool_calls": calls}), *results]
    shown = prompt_text(ONE_CALL, messages)
    places = [shown.find(said) for said in ("Two.", "<tool_call>", "\na|", "\nb|", "\nstray|")]
    assert -1 not in places
    assert places == sorted(places)
    assert places[2] < shown.rfind("<tool_call>") < places[3]


def test_a_body_full_of_small_messages_is_put_together_once() -> None:
    """Joined one by one, 65,000 messages of `system` copied a terabyte: the router stood still for minutes."""
    said = [Message("system", "x" * 400)] * 65_000
    (one,) = joined(said, "system")
    assert len(one.content) == 65_000 * 402 - 2
    assert [len(form) for form in forms((Message("assistant", "y"), *said))] == [2, 2]


@pytest.mark.parametrize("odd", [{"tool_calls": ["x", {"id": 7}, {}]}, {"tool_call_id": ""}, {"name": "n"}])
def test_odd_extras_pass(odd: dict[str, Any]) -> None:
    assert all(len(form) >= 2 for form in forms((Message("user", "x"), Message("assistant", "y", odd))))
