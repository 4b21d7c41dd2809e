"""What upstreams say of themselves: tokens in every dialect, load in two engines' words, errors in several shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.upstreams.loads import Load, read_load
from router.upstreams.replies import Told, figures, said_wrong, told


def sse(*events: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Told()),
        (b"no json", Told()),
        (sse({"choices": [], "usage": None}), Told()),
        (sse({"usage": {"prompt_tokens": 9, "completion_tokens": 2}}), Told(9, None, 2)),
        (sse({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}), Told(9, 4, None)),
        (
            sse({"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}),
            Told(5, None, 1),
        ),
        (
            sse({"usage": {"input_tokens": 5, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 3}}),
            Told(28, 20, None),
        ),
        (
            sse(
                {
                    "response": {
                        "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 6}, "output_tokens": 8}
                    }
                }
            ),
            Told(7, 6, 8),
        ),
        (sse({"usage": {"prompt_tokens": -1, "completion_tokens": "many"}}), Told()),
        (sse({"usage": {"completion_tokens": 1}}, {"usage": {"completion_tokens": 2}}), Told(None, None, 2)),
    ],
)
def test_tokens_are_read_in_every_dialect(data: bytes, expected: Told) -> None:
    assert figures(data, Told()) == expected


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (b"", None),
        (b"process_cpu_seconds 1\n", None),
        (b'vllm:num_requests_running{m="x"} 3.0\nvllm:num_requests_waiting{m="x"} 2\n', Load(3, 2, 0.0)),
        (b'vllm:num_requests_running{e="0"} 3\nvllm:num_requests_running{e="1"} 4\n', Load(7, 0, 0.0)),
        (b"vllm:num_requests_running 1\nvllm:kv_cache_usage_perc 0.25\n", Load(1, 0, 0.25)),
        (b"sglang:num_running_reqs 5\nsglang:num_queue_reqs 6\nsglang:token_usage 0.5\n", Load(5, 6, 0.5)),
        (b"vllm:num_requests_running NaN\nvllm:num_requests_running e\n", None),
        (b"vllm:num_requests_running 1\nvllm:kv_cache_usage_perc e\n", Load(1, 0, 0.0)),
        (b"vllm:num_requests_running -1\nvllm:kv_cache_usage_perc 7e9\n", Load(0, 0, 1.0)),
    ],
)
def test_load_is_read_in_both_engines_words(metrics: bytes, expected: Load | None) -> None:
    assert read_load(metrics) == expected


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b'{"choices": []}', None),
        (b'{"error": null, "choices": []}', None),
        (b'{"error": {"message": "out of memory"}}', "out of memory"),
        (b'{"error": {}}', "an error without words"),
        (b'{"error": "plain"}', "plain"),
        (b'{"object": "error", "message": "older"}', "older"),
        (b'event: error\ndata: {"type": "error", "error": {"message": "Overloaded"}}\n\n', "Overloaded"),
    ],
)
def test_an_error_with_status_200_is_known(reply: bytes, words: str | None) -> None:
    assert said_wrong(reply) == words


def test_a_refusal_keeps_words_code_and_field_and_never_speaks_of_our_key() -> None:
    detail = told(400, b'{"error": {"message": "too long", "code": "context_length_exceeded", "param": "messages"}}')

    assert (detail.message, detail.code, detail.param) == ("too long", "context_length_exceeded", "messages")
    assert "sk-1" not in str(told(401, b'{"error": {"message": "sk-1 is no key"}}'))
