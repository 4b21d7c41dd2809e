"""What an upstream's reply says of itself: how many tokens, and whether it is an error in good clothes.

Owns the reading of usage and errors in all dialects. Never passes an upstream's words on beyond a bound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from router.errors import MESSAGE_MAX_CHARS, ErrorDetail, error_type

BUSY = (408, 429, 503, 529)  # the upstream is well, and has no room
READ_BYTES_MAX = 64 * 1024  # of an error: vLLM answered a few kB with 114 MB once
DISJOINT = ("cache_read_input_tokens", "cache_creation_input_tokens")  # beside input_tokens, in Anthropic's dialect
OURS = ErrorDetail(
    "The upstream refused the router's own key: its key_env is not set, or wrong.", "server_error", None, "upstream_key"
)


REASON = re.compile(rb'"(?:finish|stop)_reason": ?"([a-z_]{1,40})"')
REASONS = {b"length": "length", b"max_tokens": "length", b"tool_calls": "calls", b"tool_use": "calls"}
UNFINISHED = re.compile(rb'"status": ?"incomplete"')  # a response's


class Told(NamedTuple):
    """Tokens, as far as the upstream said."""

    prompt: int | None = None
    cached: int | None = None
    output: int | None = None


def figures(data: bytes, before: Told) -> Told:
    """Usage of the last event, or of the whole reply, that has any."""
    prompt, cached, output = before
    for reply in _objects(data):
        usage = reply.get("usage") or _inner(reply, "message").get("usage") or _inner(reply, "response").get("usage")
        if not isinstance(usage, dict):
            continue
        details = _inner(usage, "prompt_tokens_details") or _inner(usage, "input_tokens_details")
        read = _number(details.get("cached_tokens"))
        read = _number(usage.get("cache_read_input_tokens")) if read is None else read
        cached = cached if read is None else read
        asked = _number(usage.get("prompt_tokens"))
        if asked is None and (asked := _number(usage.get("input_tokens"))) is not None:
            # Anthropic's three are disjoint; nobody else has the other two.
            asked += sum(_number(usage.get(name)) or 0 for name in DISJOINT)
        prompt = prompt if asked is None else asked
        said = _number(usage.get("completion_tokens"))
        said = _number(usage.get("output_tokens")) if said is None else said
        output = output if said is None else said
    return Told(prompt, cached, output)


def ending(data: bytes) -> str | None:
    """Why the answer ended, in a receipt's words; None where nothing is said of it."""
    if (found := REASON.search(data)) is not None:
        return REASONS.get(found[1], "stop")
    return "length" if UNFINISHED.search(data) is not None else None


def said_wrong(data: bytes) -> str | None:
    """The error that a reply with status 200 is; None if it is none."""
    for reply in _objects(data):
        error = reply.get("error")
        if error is None and reply.get("object") == "error":  # vLLM's older form
            error = reply
        if isinstance(error, dict):
            return str(error.get("message", ""))[:MESSAGE_MAX_CHARS] or "an error without words"
        if isinstance(error, str) and error:
            return error[:MESSAGE_MAX_CHARS]
    return None


def told(status: int, body: bytes) -> ErrorDetail:
    """An upstream's refusal as ours: its words and codes, within bounds."""
    if status in (401, 403):
        return OURS
    error: dict[str, Any] = {}
    for reply in _objects(body[:READ_BYTES_MAX]):
        inner = reply.get("error")
        error = inner if isinstance(inner, dict) else reply
    message = str(error.get("message") or f"The upstream refused this request with status {status}.")
    code, param = error.get("code"), error.get("param")
    return ErrorDetail(
        message[:MESSAGE_MAX_CHARS],
        error_type(status),
        param[:100] if isinstance(param, str) else None,
        code[:100] if isinstance(code, str) else None,
    )


def _objects(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a reply: one, or one each event."""
    lines = [line[5:] for line in data.splitlines() if line.startswith(b"data:")] or [data]
    for line in lines:
        try:
            found = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue  # [DONE], or no JSON: nothing that we could read
        if isinstance(found, dict):
            yield found


def _inner(reply: dict[str, Any], name: str) -> dict[str, Any]:
    inner = reply.get(name)
    return inner if isinstance(inner, dict) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**31 else None
