"""What clients ask of an answer's form reaches the worker as a grammar, and penalties and bias as they were sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.dialects import chat, completions
from router.dialects.grammars import Grammar
from router.errors import RequestError
from tests.router import desk
from tests.router.desk import run, speak

SCHEMA = '{"type": "object",  "properties": {"a": {"const": 1.50}}}'  # not to be read and written again on the way


def asked(**fields: Any) -> Grammar:
    body = json.dumps(desk.chat(**fields)).replace('"SCHEMA"', SCHEMA).encode()
    sampling = chat.turn(chat.read(body)).sampling
    return Grammar(sampling.grammar_kind, sampling.grammar)


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, ("", "")),
        ({"response_format": {"type": "text"}}, ("", "")),
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type":"object"}')),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "SCHEMA"}}}, SCHEMA),
        ({"structured_outputs": {"json": "SCHEMA"}}, SCHEMA),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes", 'n"o', "ö"]}}, ("lark", 'start: "yes" | "n\\"o" | "ö"')),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, ("lark", 'start: "x"')),
    ],
)
def test_what_is_asked_of_the_form_becomes_a_grammar(fields: dict[str, Any], grammar: Any) -> None:
    assert asked(**fields) == (("json_schema", SCHEMA) if grammar is SCHEMA else grammar)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["x"] * 257}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_served_as_it_is_asked_is_refused_with_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        asked(**fields)
    assert (refused.value.status, refused.value.detail.param) == (400, param)


def test_sampling_fields_are_carried_or_refused() -> None:
    fields = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.2, "logit_bias": {"7": -100}}
    body = {"model": "tiny", "prompt": "x", **fields}
    sampling = completions.turn(completions.read(json.dumps(body).encode())).sampling

    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -1.0, 1.2)
    assert sampling.logit_bias == ((7, -100.0),)
    for field, value in [
        ("presence_penalty", 2.1),
        ("repetition_penalty", 0),
        ("logit_bias", {"7": 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("prompt_logprobs", 1),
    ]:
        with pytest.raises(RequestError) as refused:
            completions.turn(completions.read(json.dumps(body | {field: value}).encode()))
        assert (refused.value.detail.param or "").startswith(field)


def test_a_grammar_that_no_worker_takes_is_a_400() -> None:
    def refuse(attempt: desk.Attempt) -> None:
        assert attempt.order.sampling.grammar == "(a"
        attempt.end("invalid", "the regex cannot be compiled")

    async def work() -> None:
        async with desk.desk() as d:
            d.fleet.answer = refuse
            body = desk.chat(structured_outputs={"regex": "(a"})
            answer = await d.client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400
            assert "the regex cannot be compiled" in answer.json()["error"]["message"]
            d.fleet.answer = speak("fine")
            assert (await d.client.post("/v1/chat/completions", json=desk.chat())).status_code == 200

    run(work())
