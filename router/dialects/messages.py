"""Anthropic messages: body to Turn, and an answer back to its JSON or its stream of events.

Owns the shapes of this dialect, its errors too. Never touches sockets, tokens or policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from engine.wire import Sampling
from router.dialects.common import Dialect, joined_system, json_or_none, random_seed, stop_strings
from router.dialects.grammars import ANY_TEXT, Grammar
from router.dialects.media import Media
from router.dialects.messages_schema import AnthropicMessage, AnthropicTool, Block, MessagesRequest, OutputConfig
from router.dialects.schema import ABSENT, decode, needs_field, wrong_field
from router.errors import ErrorDetail
from router.language.turn import Ending, ErrorShape, Message, Part, PartKind, PartStart, Turn, Usage

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "calls": "tool_use"}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
OVERLOADED = 529  # Anthropic's 503
SILENT_BLOCKS = ("redacted_thinking", "server_tool_use", "container_upload")  # nothing in them is for this model

_decoder = msgspec.json.Decoder(MessagesRequest)
_json = msgspec.json.encode


def read(body: bytes) -> MessagesRequest:
    """The typed body. Raises RequestError 400."""
    return decode(_decoder, body)


def turn(request: MessagesRequest) -> Turn:
    """The Turn that a body asks for. Raises RequestError 400."""
    media = Media(request.model or "")
    messages = joined_system([*_system(request), *_conversation(request.messages, media)])
    may_call = bool(request.tools) and (request.tool_choice or {}).get("type") != "none"
    tools = [_tool(tool) for tool in request.tools or () if tool.input_schema is not None] if may_call else []
    grammar = _grammar(request.output_config)
    left = len(request.tools or ()) - len(tools) if may_call else 0
    return Turn(
        model=request.model or "",
        sampling=Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            seed=random_seed(),
            grammar_kind=grammar.kind,
            grammar=grammar.source,
        ),
        max_tokens=request.max_tokens,
        stop=stop_strings(request.stop_sequences),
        is_stream=request.stream,
        messages=tuple(messages),
        tools=tuple(tools),
        may_call=bool(tools),
        must_call=_must_call(request.tool_choice or {}),
        is_one_call=bool((request.tool_choice or {}).get("disable_parallel_tool_use")),
        is_thinking=None if request.thinking is None else request.thinking.type != "disabled",
        has_schema=grammar is not ANY_TEXT,
        media=media.counts(),
        notices=tuple(_notices(request, left)),
    )


def _notices(request: MessagesRequest, server_tools: int) -> Iterator[str]:
    if server_tools:
        yield f"server tools not run here: {server_tools}"
    if request.messages and request.messages[-1].role == "assistant":
        yield "the last message is not continued: a new answer follows it"


def _must_call(choice: dict[str, Any]) -> str | None:
    kind, name = choice.get("type", "auto"), choice.get("name")
    if kind in ("auto", "none"):
        return None
    if kind == "any":
        return ""
    if kind != "tool" or not isinstance(name, str) or not name:
        raise wrong_field("tool_choice", "its type must be auto, none, any, or tool with a name")
    return name


def _grammar(config: OutputConfig | None) -> Grammar:
    if config is None or config.format is None:
        return ANY_TEXT
    if config.format.type != "json_schema" or config.format.schema == ABSENT:
        raise wrong_field("output_config.format", "must be of type json_schema, with a schema")
    return Grammar("json_schema", bytes(config.format.schema).decode())


def _system(request: MessagesRequest) -> list[Message]:
    if not request.system:
        return []
    if isinstance(request.system, str):
        return [Message("system", request.system)]
    return [Message("system", block.text) for block in request.system if block.text]


def _conversation(messages: Sequence[AnthropicMessage], media: Media) -> Iterator[Message]:
    for number, message in enumerate(messages):
        if message.role not in ("user", "assistant", "system"):
            raise wrong_field(f"messages[{number}].role", "must be one of user, assistant, system")
        if message.content is None and message.role != "assistant":
            raise needs_field(f"messages[{number}].content")
        content = message.content or ""
        if isinstance(content, str):
            yield Message(message.role, content)
        elif message.role == "assistant":
            yield _assistant(content, media)
        else:
            yield from _said(message.role, content, media)


def _assistant(blocks: Sequence[Block], media: Media) -> Message:
    extra: dict[str, Any] = {}
    if thought := "".join(block.thinking for block in blocks if block.type == "thinking"):
        extra["reasoning_content"] = thought
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input or {}}}
        for block in blocks
        if block.type == "tool_use"
    ]
    if calls:
        extra["tool_calls"] = calls
    spoken = [block for block in blocks if block.type not in ("thinking", "tool_use")]
    return Message("assistant", "".join(_text(block, media) for block in spoken), extra or None)


def _said(role: str, blocks: Sequence[Block], media: Media) -> Iterator[Message]:
    """Results of tools become messages of their own, in the order in which they stand."""
    texts: list[str] = []
    for block in blocks:
        if block.type != "tool_result":
            texts.append(_text(block, media))
            continue
        if texts:
            yield Message(role, "\n".join(texts))
            texts = []
        yield Message("tool", _result(block, media), {"tool_call_id": block.tool_use_id})
    if texts or not blocks:
        yield Message(role, "\n".join(texts))


def _result(block: Block, media: Media) -> str:
    if isinstance(block.content, list):
        return "\n".join(_text(inner, media) for inner in block.content)
    return block.content if isinstance(block.content, str) else ""


def _text(block: Block, media: Media) -> str:
    if block.type == "text":
        return block.text
    source = block.source or {}
    if source.get("type") == "text" and isinstance(source.get("data"), str):
        return str(source["data"])
    if block.type in SILENT_BLOCKS:
        return ""
    return _result(block, media) or media.omitted(block.type if block.type.isidentifier() else "block")


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    """As templates know tools: OpenAI's shape. What a client adds for its vendor, `cache_control` say, is not shown."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


class MessagesEncoder:
    """router.language.turn.Encoder for Anthropic messages."""

    def __init__(self, request_id: str, model: str, created: int, body: MessagesRequest) -> None:
        del created, body
        self._request_id = request_id
        self._message = {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "model": model}
        self._index = -1  # of the open block
        self._calls = 0
        self._before = b""

    def open(self, usage: Usage) -> bytes:
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = self._message | empty | {"usage": usage_fields(usage)}
        return _event("message_start", {"message": message}) + self.heartbeat()

    def start(self, part: PartStart) -> bytes:
        self._index += 1
        kind, field = DELTAS[part.kind]
        self._before = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":' % (
            self._index
        ) + b'{"type":"%b","%b":' % (kind, field)
        block = self._block(Part(part.kind, "", part.name))
        return _event("content_block_start", {"index": self._index, "content_block": block})

    # Hot: once per flush of a stream.
    def delta(self, text: str) -> bytes:
        return b"%b%b}}\n\n" % (self._before, _json(text))

    def end(self) -> bytes:
        return _event("content_block_stop", {"index": self._index})

    def heartbeat(self) -> bytes:
        return _event("ping", {})

    def close(self, ending: Ending, usage: Usage) -> bytes:
        spent = {"delta": _stop_fields(ending), "usage": usage_fields(usage)}
        return _event("message_delta", spent) + _event("message_stop", {})

    def fail(self, status: int, detail: ErrorDetail) -> bytes:
        return b"event: error\ndata: %b\n\n" % errors_body(status, detail)[1]

    def whole(self, parts: Sequence[Part], ending: Ending, usage: Usage) -> bytes:
        blocks = [self._block(part) for part in parts]
        return _json(self._message | {"content": blocks} | _stop_fields(ending) | {"usage": usage_fields(usage)})

    def _block(self, part: Part) -> dict[str, Any]:
        if part.kind is PartKind.TEXT:
            return {"type": "text", "text": part.text}
        if part.kind is PartKind.REASONING:
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        number, self._calls = self._calls, self._calls + 1
        called = {"type": "tool_use", "id": f"toolu_{self._request_id}{number:02}", "name": part.name}
        return called | {"input": _arguments(part.text)}


DELTAS = {
    PartKind.TEXT: (b"text_delta", b"text"),
    PartKind.REASONING: (b"thinking_delta", b"thinking"),
    PartKind.CALL: (b"input_json_delta", b"partial_json"),
}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments as the object that this dialect wants; what is none, cut off say, stays readable in one."""
    if not text:
        return {}
    value = json_or_none(text)
    return value if isinstance(value, dict) else {"unparsed": text}


def _stop_fields(ending: Ending) -> dict[str, str | None]:
    if ending.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": ending.stop_string}
    return {"stop_reason": STOP_REASONS[ending.reason], "stop_sequence": None}


def usage_fields(usage: Usage) -> dict[str, int]:
    """Input and cached tokens are disjoint here, and sum to the prompt."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _json({"type": name} | fields))


def errors_body(status: int, detail: ErrorDetail) -> tuple[int, bytes]:
    """Anthropic's status and body of an error."""
    status = OVERLOADED if status == 503 else status
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, _json({"type": "error", "error": {"type": kind, "message": detail.message}})


def _overflow(tokens: int, limit: int) -> str:
    return f"prompt is too long: {tokens} tokens > {limit} maximum"


ANTHROPIC_ERRORS = ErrorShape(errors_body, _overflow)
MESSAGES = Dialect(read, turn, MessagesEncoder, ANTHROPIC_ERRORS, "chat")
