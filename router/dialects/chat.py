"""OpenAI chat completions: body to Turn, and an answer back to its JSON or its stream of events.

Owns the shapes of this dialect. Never touches sockets, tokens or policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from router.dialects.common import (
    COMMENT,
    OPENAI_ERRORS,
    Dialect,
    Tail,
    failure,
    fingerprinted,
    finite,
    json_or_none,
    sampling,
    stop_strings,
    wants_usage,
)
from router.dialects.media import Media, part_text
from router.dialects.schema import ChatMessage, ChatRequest, decode, needs_field, wrong_field
from router.errors import ErrorDetail
from router.language.turn import Encoder, Ending, Message, Part, PartKind, PartStart, TokenScore, Turn, Usage

ROLES = {  # what clients may say, and what templates know it as
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "function",
}

SPEAKERS = ("user", "system")
FINISH = {"stop": "stop", "length": "length", "calls": "tool_calls"}

_decoder = msgspec.json.Decoder(ChatRequest)
_quote = msgspec.json.encode


def read(body: bytes) -> ChatRequest:
    """The typed body. Raises RequestError 400."""
    request = decode(_decoder, body)
    if request.top_logprobs and not request.logprobs:
        raise wrong_field("top_logprobs", "it needs logprobs")
    return request


def turn(request: ChatRequest) -> Turn:
    """The Turn that a body asks for. Raises RequestError 400."""
    media = Media(request.model or "")
    messages = tuple([_message(number, message, media) for number, message in enumerate(request.messages)])
    tools = tuple(request.tools or ()) if request.tool_choice != "none" else ()
    return Turn(
        model=request.model or "",
        sampling=sampling(request, (request.top_logprobs or 0) if request.logprobs else -1),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        stop=stop_strings(request.stop),
        is_stream=request.stream,
        messages=messages,
        tools=tools,
        may_call=bool(tools),
        must_call=_must_call(request.tool_choice),
        is_one_call=request.parallel_tool_calls is False,
        is_thinking=_is_thinking(request),
        has_schema=request.response_format is not None and request.response_format.type != "text",
        media=media.counts(),
    )


def _must_call(choice: str | dict[str, Any] | None) -> str | None:
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        return ""
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
        raise wrong_field("tool_choice", "must be auto, none, required, or name a function")
    return name


def _is_thinking(request: ChatRequest) -> bool | None:
    wanted = (request.chat_template_kwargs or {}).get("enable_thinking")
    if isinstance(wanted, bool):
        return wanted
    return None if request.reasoning_effort is None else request.reasoning_effort != "none"


# Hot: once per message; agents send hundreds. bench/router.py.
def _message(number: int, message: ChatMessage, media: Media) -> Message:
    role, content = ROLES.get(message.role), message.content
    if role is None:
        raise wrong_field(f"messages[{number}].role", f"must be one of {', '.join(ROLES)}")
    if content is None and role in SPEAKERS:
        raise needs_field(f"messages[{number}].content")  # as OpenAI; an answer's or a tool's may be empty
    text = content if isinstance(content, str) else "".join([part_text(part, media) for part in content or ()])
    if message.tool_calls or message.name or message.tool_call_id or message.reasoning_content:
        return Message(role, text, _extra(message))
    return Message(role, text)


def _extra(message: ChatMessage) -> dict[str, Any]:
    extra: dict[str, Any] = {"tool_calls": [_call(call) for call in message.tool_calls]} if message.tool_calls else {}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name):
            extra[name] = value
    return extra


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments as the object that they spell: templates of Hugging Face write it as JSON themselves."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(text := function.get("arguments"), str):
        return call
    value = json_or_none(text)
    return call | {"function": function | {"arguments": value if isinstance(value, dict) else text}}


class ChatEncoder:
    """router.language.turn.Encoder for chat completions."""

    def __init__(self, request_id: str, identity: bytes, body: ChatRequest, tail: Tail, *, index: int) -> None:
        self._call_prefix = f"call_{request_id}{index:03}" if index else f"call_{request_id}"
        self._index = index
        self._tail = tail
        usage = b',"usage":null' if wants_usage(body) else b""
        self._chunk = b'data: %b%b,"choices":[{"index":%d,"delta":' % (identity, usage, index)
        self._unfinished = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        self._scores: list[TokenScore] = []
        self._calls = 0
        self._before, self._after = b"", b""  # around a delta of the open part

    def computed_by(self, version: int) -> None:
        """In `system_fingerprint` from here on."""
        self._chunk = fingerprinted(self._chunk, [version])
        self._before = fingerprinted(self._before, [version])
        self._tail.computed_by(version)

    def open(self, usage: Usage) -> bytes:
        del usage
        return self._chunk + b'{"role":"assistant","content":""' + self._unfinished

    def start(self, part: PartStart) -> bytes:
        self._after = self._unfinished
        if part.kind is PartKind.TEXT:
            self._before = self._chunk + b'{"content":'
        elif part.kind is PartKind.REASONING:
            self._before = self._chunk + b'{"reasoning_content":'
        else:
            return self._start_call(part.name)
        return b""

    def _start_call(self, name: str) -> bytes:
        index, self._calls = self._calls, self._calls + 1
        called = b'{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":""}}' % (
            index,
            _quote(self._call_id(index)),
            _quote(name),
        )
        self._before = self._chunk + b'{"tool_calls":[{"index":%d,"function":{"arguments":' % index
        self._after = b"}}]" + self._unfinished
        return self._chunk + b'{"tool_calls":[%b]' % called + self._unfinished

    # Hot: once per flush of a stream.
    def delta(self, text: str) -> bytes:
        if self._scores:
            after = self._after.replace(b'"logprobs":null', b'"logprobs":%b' % self._take_scores())
            return b"%b%b%b" % (self._before, _quote(text), after)
        return b"%b%b%b" % (self._before, _quote(text), self._after)

    def scored(self, scores: Sequence[TokenScore]) -> None:
        self._scores += scores

    def _take_scores(self) -> bytes:
        scores, self._scores = self._scores, []
        return scores_json(scores) if scores else b"null"

    def end(self) -> bytes:
        return b""

    def heartbeat(self) -> bytes:
        return COMMENT

    def close(self, ending: Ending, usage: Usage) -> bytes:
        finish = (self._chunk, self._take_scores(), _quote(FINISH[ending.reason]))
        return b'%b{},"logprobs":%b,"finish_reason":%b}]}\n\n' % finish + self._tail.close(self._index, usage)

    def fail(self, status: int, detail: ErrorDetail) -> bytes:
        del status
        return failure(detail)

    def whole(self, parts: Sequence[Part], ending: Ending, usage: Usage) -> bytes:
        calls = [part for part in parts if part.kind is PartKind.CALL]
        text = "".join([part.text for part in parts if part.kind is PartKind.TEXT])
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if reasoning := "".join([part.text for part in parts if part.kind is PartKind.REASONING]):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [self._whole_call(number, call) for number, call in enumerate(calls)]
        choice = (self._index, _quote(message), self._take_scores(), _quote(FINISH[ending.reason]))
        said = b'{"index":%d,"message":%b,"logprobs":%b,"finish_reason":%b}' % choice
        return self._tail.whole(self._index, said, usage)

    def _whole_call(self, index: int, call: Part) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.text}
        return {"id": self._call_id(index), "type": "function", "function": function}

    def _call_id(self, index: int) -> str:
        return f"{self._call_prefix}{index:02}"


def scores_json(scores: Sequence[TokenScore]) -> bytes:
    """OpenAI's logprobs of a chat."""
    content = [
        _score(score.token, score.logprob) | {"top_logprobs": [_score(token, logprob) for token, logprob in score.top]}
        for score in scores
    ]
    return _quote({"content": content, "refusal": None})


def _score(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(token)}


def voices(request_id: str, model: str, created: int, body: ChatRequest) -> list[Encoder]:
    """An encoder for each answer that a body wants."""
    kind = b"chat.completion.chunk" if body.stream else b"chat.completion"
    named = (_quote(f"chatcmpl-{request_id}"), created, _quote(model), _quote(kind.decode()))
    identity = b'{"id":%b,"created":%d,"model":%b,"object":%b' % named
    count = body.n or 1
    tail = Tail(identity, count, wants_usage=wants_usage(body))
    return [ChatEncoder(request_id, identity, body, tail, index=index) for index in range(count)]


def encoder(request_id: str, model: str, created: int, body: ChatRequest) -> Encoder:
    """The one of a body that wants one answer."""
    return voices(request_id, model, created, body)[0]


CHAT = Dialect(read, turn, encoder, OPENAI_ERRORS, "chat", voices)
