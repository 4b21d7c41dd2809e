"""Dialects: how a row is asked for and how its answer is read: completions, chat, Anthropic's messages.

Owns bodies and the meaning of events. Never times anything, and never sends the true class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from loadgen.prompts import Costume, words
from loadgen.traces import Row

Name = Literal["completions", "chat", "anthropic"]
Said = Literal["text", "end", "error", ""]
ANTHROPIC_VERSION = "2023-06-01"  # the one version there is; every client sends it


@dataclass(frozen=True, slots=True)
class Usage:
    """What the server counted; None: it did not say."""

    prompt: int | None
    completion: int | None
    cached: int | None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to talk to a server."""

    path: str
    headers: Mapping[str, str]
    body: Callable[[Row, list[int], Costume, str], bytes]
    says: Callable[[dict[str, Any]], Said]  # of one event of a stream
    usage: Callable[[dict[str, Any]], Usage | None]  # of an event, or of a whole answer
    is_answer: Callable[[dict[str, Any]], bool]  # whether a whole body is one
    has_done: bool  # whether a stream ends with `data: [DONE]`


def _completion(row: Row, ids: list[int], costume: Costume, model: str) -> bytes:
    """Token ids: lengths are exact."""
    prompt = row.text_input or ids
    return msgspec.json.encode({"model": model, "prompt": prompt, **_forced(row), **_streamed(costume)})


def _chat(row: Row, ids: list[int], costume: Costume, model: str) -> bytes:
    said = {"messages": row.messages or [_asking(row, ids)], **({"tools": row.tools} if row.tools else {})}
    return msgspec.json.encode({"model": model, **said, **_forced(row), **_streamed(costume)})


def _message(row: Row, ids: list[int], costume: Costume, model: str) -> bytes:
    fields = {"model": model, "messages": [_asking(row, ids)], **_forced(row), "stream": costume.is_stream}
    return msgspec.json.encode(fields)


def _asking(row: Row, ids: list[int]) -> dict[str, str]:
    return {"role": "user", "content": row.text_input or words(ids)}


def _forced(row: Row) -> dict[str, object]:
    """The recorded length, greedily: servers that know no min_tokens or ignore_eos pass them over, or end sooner."""
    length = row.output_length
    return {"max_tokens": length, "min_tokens": length, "ignore_eos": True, "temperature": 0}


def _streamed(costume: Costume) -> dict[str, object]:
    options = {"stream_options": {"include_usage": True}} if costume.is_stream else {}
    return {"stream": costume.is_stream, **options}


def _openai_says(event: dict[str, Any]) -> Said:
    if "error" in event:
        return "error"
    choice = _first(event.get("choices"))
    delta = choice.get("delta")
    found = delta if isinstance(delta, dict) else choice
    return _speaks(found, "text", "content", "reasoning_content", "tool_calls")


def _anthropic_says(event: dict[str, Any]) -> Said:
    kind, delta = event.get("type"), event.get("delta")
    found = delta if isinstance(delta, dict) else {}
    if kind == "message_stop":
        return "end"
    if kind == "error":
        return "error"
    return _speaks(found, "text", "thinking", "partial_json") if kind == "content_block_delta" else ""


def _speaks(found: dict[str, Any], *keys: str) -> Said:
    return "text" if any(isinstance(found.get(key), (str, list)) and found[key] for key in keys) else ""


def _openai_usage(body: dict[str, Any]) -> Usage | None:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return Usage(count(usage.get("prompt_tokens")), count(usage.get("completion_tokens")), cached)


def _anthropic_usage(body: dict[str, Any]) -> Usage | None:
    """Their input_tokens leave out what was cached; ours are the whole prompt."""
    message = body.get("message")
    holder: dict[str, Any] = message if isinstance(message, dict) else body
    usage = holder.get("usage")
    if not isinstance(usage, dict):
        return None
    fresh, cached = count(usage.get("input_tokens")), count(usage.get("cache_read_input_tokens"))
    made = count(usage.get("cache_creation_input_tokens")) or 0
    prompt = None if fresh is None else fresh + (cached or 0) + made
    return Usage(prompt, count(usage.get("output_tokens")), cached)


def count(value: object) -> int | None:
    """A server may say anything; only a count is one."""
    return value if type(value) is int and value >= 0 else None


def _first(choices: object) -> dict[str, Any]:
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


DIALECTS: Mapping[Name, Dialect] = {
    "completions": Dialect(
        "/v1/completions", {}, _completion, _openai_says, _openai_usage, lambda body: "choices" in body, has_done=True
    ),
    "chat": Dialect(
        "/v1/chat/completions", {}, _chat, _openai_says, _openai_usage, lambda body: "choices" in body, has_done=True
    ),
    "anthropic": Dialect(
        "/v1/messages",
        {"anthropic-version": ANTHROPIC_VERSION},
        _message,
        _anthropic_says,
        _anthropic_usage,
        lambda body: body.get("type") == "message",
        has_done=False,
    ),
}
