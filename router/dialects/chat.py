"""OpenAI chat completions: body to Turn, and an answer back to its JSON or its stream of events.

Owns the shapes of this dialect. Never touches sockets, tokens or policy."""

from __future__ import annotations

from typing import Any

import msgspec

from router.dialects.common import DONE, event, sampling, stops, wants_usage
from router.dialects.schema import ChatMessage, ChatRequest, Part, decode, refuse_unsupported, wrong_field
from router.errors import ErrorDetail, error_body
from router.turn import Message, Turn, Usage

ROLES = {  # what clients may say, and what templates know it as
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "function",
}

_decoder = msgspec.json.Decoder(ChatRequest)
_quote = msgspec.json.encode


def read(body: bytes) -> ChatRequest:
    """The typed body. Raises RequestError 400."""
    request = decode(_decoder, body)
    if request.response_format is not None and request.response_format.type != "text":
        raise refuse_unsupported("response_format", "only text is served")
    if request.logprobs:
        raise refuse_unsupported("logprobs", "this server returns none")
    return request


def turn(request: ChatRequest) -> Turn:
    """The Turn that a body asks for. Raises RequestError 400."""
    return Turn(
        model=request.model,
        sampling=sampling(request),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        stop=stops(request),
        is_stream=request.stream,
        wants_usage=wants_usage(request),
        messages=tuple([_message(number, message) for number, message in enumerate(request.messages)]),
        tools=tuple(request.tools or ()),
    )


# Hot: once per message; agents send hundreds. bench/router.py.
def _message(number: int, message: ChatMessage) -> Message:
    role, content = ROLES.get(message.role), message.content
    if role is None:
        raise wrong_field(f"messages[{number}].role", f"must be one of {', '.join(ROLES)}")
    extra: dict[str, Any] | None = None
    if message.tool_calls or message.name:
        extra = {"tool_calls": message.tool_calls} if message.tool_calls else {}
        extra |= {"name": message.name} if message.name else {}
    return Message(role, content if isinstance(content, str) else _joined(number, content or []), extra)


def _joined(number: int, parts: list[Part]) -> str:
    for at, part in enumerate(parts):
        if part.type not in ("text", "input_text", "refusal"):
            raise refuse_unsupported(f"messages[{number}].content[{at}].type", "this model reads text alone")
    return "".join(part.text for part in parts)


class ChatEncoder:
    """router.turn.Encoder for chat completions."""

    def __init__(self, request_id: str, model: str, created: int, *, wants_usage: bool) -> None:
        self._identity = b'{"id":%b,"created":%d,"model":%b,"object":' % (
            _quote(f"chatcmpl-{request_id}"),
            created,
            _quote(model),
        )
        self._wants_usage = wants_usage
        usage = b',"usage":null' if wants_usage else b""
        chunk = b"data: " + self._identity + b'"chat.completion.chunk"' + usage + b',"choices":[{"index":0,"delta":'
        self._before = chunk + b'{"content":'
        self._after = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        self._chunk = chunk

    def open(self) -> bytes:
        return self._chunk + b'{"role":"assistant","content":""' + self._after

    # Hot: once per flush of a stream.
    def delta(self, text: str) -> bytes:
        return b"%b%b%b" % (self._before, _quote(text), self._after)

    def close(self, reason: str, usage: Usage) -> bytes:
        last = self._chunk + b'{},"logprobs":null,"finish_reason":%b}]}\n\n' % _quote(reason)
        if not self._wants_usage:
            return last + DONE
        spent = self._identity + b'"chat.completion.chunk","choices":[],"usage":%b}' % usage_json(usage)
        return last + event(spent) + DONE

    def fail(self, message: str, code: str) -> bytes:
        return event(error_body(ErrorDetail(message, "server_error", None, code)))

    def whole(self, text: str, reason: str, usage: Usage) -> bytes:
        message = b'{"role":"assistant","content":%b,"refusal":null}' % _quote(text)
        choice = b'{"index":0,"message":%b,"logprobs":null,"finish_reason":%b}' % (message, _quote(reason))
        return b'%b"chat.completion","choices":[%b],"usage":%b}' % (self._identity, choice, usage_json(usage))


def usage_json(usage: Usage) -> bytes:
    """OpenAI's usage object: prompt_tokens includes the cached ones."""
    return (
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}'
        % (usage.prompt, usage.output, usage.prompt + usage.output, usage.cached)
    )
