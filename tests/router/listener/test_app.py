"""The door: what a client sends wrongly gets a typed 4xx that names the field; never a 5xx, never an echo."""

from __future__ import annotations

import asyncio
import gzip
import json
import string
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.dialects import chat as chat_dialect
from router.dialects import completions
from router.errors import RequestError
from tests.router.desk import VIEW, chat, desk, run, speak

SECRET = "sk-do-not-repeat-me"

BAD_BODIES: list[tuple[str, bytes, int, str | None]] = [
    ("not json", b"{", 400, None),
    ("nothing", b"", 400, None),
    ("a list", b"[]", 400, None),
    ("not utf-8", b'{"messages": "\xff"}', 400, None),
    ("utf-16", '{"messages": []}'.encode("utf-16"), 400, None),
    ("deep nesting", b'{"metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, 400, None),
    ("deep unknown", b'{"whatever":' + b"[" * 100_000, 400, None),
    ("no messages", b"{}", 400, "messages"),
    ("no role", b'{"messages": [{"content": "x"}]}', 400, "messages[0].role"),
    ("no content", b'{"messages": [{"role": "user"}]}', 400, "messages[0].content"),
    ("null content", b'{"messages": [{"role": "developer", "content": null}]}', 400, "messages[0].content"),
    ("part without type", b'{"messages": [{"role": "user", "content": [{}]}]}', 400, "messages[0].content[0].type"),
    ("empty messages", b'{"messages": []}', 400, "messages"),
    ("bad role", b'{"messages": [{"role": "king", "content": "x"}]}', 400, "messages[0].role"),
    ("NaN", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, None),
    ("infinity", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400, None),
    ("hot", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 3}', 400, "temperature"),
    ("bool for int", b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": true}', 400, "max_tokens"),
    ("negative", b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}', 400, "max_tokens"),
    ("huge int", b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}", 400, None),
    ("n", b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000000}', 400, "n"),
    ("many stops", json.dumps(chat(stop=["a"] * 10_000)).encode(), 400, "stop"),
    ("long stop", json.dumps(chat(stop="a" * 10_000)).encode(), 400, "stop"),
    (
        "schema",
        json.dumps(chat(response_format={"type": "json_schema"})).encode(),
        400,
        "response_format.json_schema.schema",
    ),
    ("top logprobs", json.dumps(chat(logprobs=True, top_logprobs=21)).encode(), 400, "top_logprobs"),
    ("top without logprobs", json.dumps(chat(top_logprobs=2)).encode(), 400, "top_logprobs"),
    ("model", json.dumps(chat(model=SECRET)).encode(), 404, "model"),
]


@pytest.mark.parametrize(
    ("body", "status", "param"), [row[1:] for row in BAD_BODIES], ids=[row[0] for row in BAD_BODIES]
)
def test_a_bad_body_gets_a_small_typed_error(body: bytes, status: int, param: str | None) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.post("/v1/chat/completions", content=body)
            error = answer.json()["error"]
            assert answer.status_code == status
            assert len(answer.content) <= 1024
            assert answer.headers["x-headway-request"]
            assert error["type"] in ("invalid_request_error", "not_found_error")
            assert param is None or error["param"] == param
            assert SECRET not in answer.text
            assert not d.mind.offered

    run(work())


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], [-1], [2**31], [1.5], [True], ["a", 1], [[1], [9999]], [9999], {}, 7, None]
)
def test_a_bad_prompt_is_refused(prompt: Any) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.post("/v1/completions", json={"model": "tiny", "prompt": prompt})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "prompt"

    run(work())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(string.printable, max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_letters, max_size=8), inner),
    max_leaves=12,
)
NAMES = "messages prompt model stream stream_options max_tokens temperature top_p seed stop n user metadata tools"
MORE_NAMES = "response_format top_k min_p stop_token_ids logprobs min_tokens service_tier"
STEERING = "structured_outputs logit_bias repetition_penalty presence_penalty frequency_penalty"
FIELDS = st.sampled_from(f"{NAMES} {MORE_NAMES} {STEERING}".split())


def fault_of(read: Any, *arguments: Any) -> RequestError | None:
    """The RequestError of a call, if it is one; anything else that is raised passes."""
    try:
        read(*arguments)
    except RequestError as error:
        return error
    return None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(FIELDS, json_values, max_size=8))
def test_any_json_is_a_turn_or_a_request_error(body: dict[str, Any]) -> None:
    """Whatever a client sends either is read or is its fault: nothing else is ever raised."""
    for dialect in (chat_dialect, completions):
        data = json.dumps(body).encode()
        fault = fault_of(lambda data=data, read=dialect: read.turn(read.read(data)))
        assert fault is None or (400 <= fault.status < 500 and len(fault.body()) <= 1024)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_turn_or_a_request_error(body: bytes) -> None:
    """The same for bytes that are no JSON at all."""
    for read in (chat_dialect.read, completions.read):
        fault = fault_of(read, body)
        assert fault is None or fault.status == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/livez", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/nothing", 404),
        ("GET", "/v1//models", 404),
        ("GET", "/v1/%6dodels", 404),
        ("GET", "/v1/models/", 404),
    ],
)
def test_what_is_not_there_is_said_in_json(method: str, path: str, status: int) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"]["message"]

    run(work())


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_wrong_method_is_told_in_the_routes_own_dialect(path: str) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.get(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert answer.json()["type"] == "error"
            assert answer.json()["error"]["type"] == "invalid_request_error"

    run(work())


def test_a_model_with_a_slash_in_its_name_is_found_as_sdks_spell_it() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.views = {"org/a b": replace(VIEW, name="org/a b")}
            url = str(d.client.base_url)
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
                assert (await client.models.retrieve("org/a b")).id == "org/a b"
            async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as client:
                assert (await client.models.retrieve("org/a b")).display_name == "org/a b"
            for odd in ("%ff", "a%00b", "%2e%2e%2fetc", "%"):
                assert (await d.client.get(f"/v1/models/{odd}")).status_code == 404

    run(work())


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/v1/models", "/v1/models/tiny"])
def test_small_routes_answer(path: str) -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.get(path)
            assert answer.status_code == 200
            assert answer.json()
            assert (await d.client.head(path)).content == b""

    run(work())


def test_a_body_over_the_routes_limit_is_refused_before_it_is_sent() -> None:
    async def work() -> None:
        async with desk() as d:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n"
            assert (await d.raw(head)).startswith(b"HTTP/1.1 413 ")
            head = head.replace(b"chat/completions", b"messages")
            assert (await d.raw(head)).startswith(b"HTTP/1.1 413 ")

    run(work())


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}, {"host": "10.0.0.1"}]
)
def test_a_foreign_page_or_host_is_refused(headers: dict[str, str]) -> None:
    async def work() -> None:
        async with desk() as d:
            assert (await d.client.get("/v1/models", headers=headers)).status_code == 403
            local = {"origin": "http://localhost:3000"}
            assert (await d.client.get("/v1/models", headers=local)).status_code == 200

    run(work())


def test_a_class_that_does_not_exist_is_a_400() -> None:
    async def work() -> None:
        async with desk() as d:
            answer = await d.client.post("/v1/chat/completions", json=chat(), headers={"x-headway-class": "urgent"})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "x-headway-class"

    run(work())


def test_a_model_that_is_null_is_one_that_is_not_named() -> None:
    async def work() -> None:
        bodies = {"/v1/chat/completions": chat(), "/v1/messages": chat(max_tokens=3), "/v1/responses": {"input": "hi"}}
        for path, body in {**bodies, "/v1/completions": {"prompt": "hi"}}.items():
            for named in ({}, {"model": None}, {"model": ""}):
                async with desk() as d:
                    asked = {name: value for name, value in body.items() if name != "model"} | named
                    answering = asyncio.create_task(d.client.post(path, json=asked))
                    speak("abc")(await d.fleet.next())
                    answer = await answering
                    assert (answer.status_code, answer.json()["model"]) == (200, "tiny")

    run(work())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/nowhere"])
def test_a_compressed_body_is_refused_with_what_to_do(path: str) -> None:
    async def work() -> None:
        async with desk() as d:
            packed = gzip.compress(json.dumps(chat()).encode())
            answer = await d.client.post(path, content=packed, headers={"content-encoding": "gzip"})
            assert answer.status_code == 415
            assert "uncompressed, without Content-Encoding" in answer.json()["error"]["message"]
            assert not d.mind.offered

    run(work())


def test_while_no_worker_ever_started_the_client_is_told_to_come_back() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.views = {}
            answer = await d.client.post("/v1/chat/completions", json=chat())
            assert answer.status_code == 503
            assert answer.headers["retry-after"]

    run(work())


@pytest.mark.parametrize("is_stream", [True, False])
def test_the_openai_sdk_works_unchanged(is_stream: bool) -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("Bonjour!", cached_tokens=4)
            async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{d.address[1]}/v1", api_key="none") as client:
                messages: Any = [{"role": "user", "content": "hi"}]
                if is_stream:
                    options: Any = {"include_usage": True}
                    stream = await client.chat.completions.create(
                        model="tiny", messages=messages, stream=True, stream_options=options
                    )
                    chunks = [chunk async for chunk in stream]
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                    usage = chunks[-1].usage
                else:
                    whole = await client.chat.completions.create(model="tiny", messages=messages)
                    text, usage = whole.choices[0].message.content or "", whole.usage
                assert text == "Bonjour!"
                assert usage is not None
                assert usage.prompt_tokens_details is not None
                assert usage.prompt_tokens_details.cached_tokens == 4
                assert [model.id async for model in client.models.list()] == ["tiny"]

    run(work())


def test_the_sync_sdk_streams_from_a_thread() -> None:
    async def work() -> None:
        async with desk() as d:
            d.fleet.answer = speak("hello")
            url = f"http://127.0.0.1:{d.address[1]}/v1"

            def ask() -> str:
                with openai.OpenAI(base_url=url, api_key="none") as client:
                    messages: Any = [{"role": "user", "content": "hi"}]
                    stream = client.chat.completions.create(model="tiny", messages=messages, stream=True)
                    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

            assert await asyncio.to_thread(ask) == "hello"

    run(work())
