"""OpenAI responses: body to Turn, and an answer back to its JSON or its stream of numbered events.

Owns the shapes of this dialect. Keeps no response: what would need one kept is refused with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from router.dialects.chat import ROLES
from router.dialects.common import (
    COMMENT,
    OPENAI_ERRORS,
    Dialect,
    joined_system,
    json_or_none,
    sampling,
    stop_strings,
)
from router.dialects.grammars import ANY_OBJECT, ANY_TEXT, Grammar
from router.dialects.media import Media, part_text
from router.dialects.responses_schema import Item, ResponsesRequest, TextConfig
from router.dialects.schema import ABSENT, ContentPart, decode, needs_field, refuse_unsupported, wrong_field
from router.errors import ErrorDetail
from router.language.turn import Ending, Message, Part, PartKind, PartStart, Turn, Usage

_decoder = msgspec.json.Decoder(ResponsesRequest)
_json = msgspec.json.encode


def read(body: bytes) -> ResponsesRequest:
    """The typed body. Raises RequestError 400."""
    request = decode(_decoder, body)
    if request.store:
        raise refuse_unsupported(
            "store", "responses are not kept here; send store: false and the whole input each turn"
        )
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name):
            raise refuse_unsupported(name, "responses are not kept here; send the whole input each turn")
    if request.background:
        raise refuse_unsupported("background", "responses are not kept here, so nobody could ask for it later")
    return request


def turn(request: ResponsesRequest) -> Turn:
    """The Turn that a body asks for. Raises RequestError 400."""
    media = Media(request.model or "")
    offered = request.tools or () if request.tool_choice != "none" else ()
    tools = tuple(_tool(tool) for tool in offered if tool.get("type") == "function")
    grammar = _grammar(request.text)
    wanted = sampling(request)
    notices: list[str] = []
    messages = _messages(request, media, notices)
    if left := len(offered) - len(tools):
        notices.append(f"tools not run here: {left}")
    return Turn(
        model=request.model or "",
        sampling=msgspec.structs.replace(wanted, grammar_kind=grammar.kind, grammar=grammar.source)
        if grammar is not ANY_TEXT
        else wanted,
        max_tokens=request.max_output_tokens,
        stop=stop_strings(request.stop),
        is_stream=request.stream,
        messages=messages,
        tools=tools,
        may_call=bool(tools),
        must_call=_must_call(request.tool_choice),
        is_one_call=request.parallel_tool_calls is False,
        is_thinking=None if request.reasoning is None or request.reasoning.effort != "none" else False,
        has_schema=grammar is not ANY_TEXT,
        media=media.counts(),
        notices=tuple(notices),
    )


def _messages(request: ResponsesRequest, media: Media, notices: list[str]) -> tuple[Message, ...]:
    begun = [Message("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        return (*begun, Message("user", request.input))
    return tuple(joined_system([*begun, *_conversation(request.input, media, notices)]))


def _conversation(items: Sequence[Item], media: Media, notices: list[str]) -> Iterator[Message]:
    """What one assistant said stands in several items here, and in one message in a template."""
    said: list[Item] = []
    for number, item in enumerate(items):
        if item.type in ("reasoning", "function_call") or (item.type == "message" and item.role == "assistant"):
            said.append(item)
            continue
        if said:
            yield _assistant(said, media)
            said = []
        if item.type == "message":
            yield _message(number, item, media)
        elif item.type == "function_call_output":
            yield Message("tool", _text(item.output, media), {"tool_call_id": item.call_id})
        elif item.type == "item_reference":
            raise refuse_unsupported(f"input[{number}]", "items are not kept here; send them whole")
        else:
            notices.append(f"input[{number}] not read")
    if said:
        yield _assistant(said, media)


def _message(number: int, item: Item, media: Media) -> Message:
    role = ROLES.get(item.role)
    if role is None:
        raise wrong_field(f"input[{number}].role", f"must be one of {', '.join(ROLES)}")
    if item.content is None:
        raise needs_field(f"input[{number}].content")
    return Message(role, _text(item.content, media))


def _assistant(items: Sequence[Item], media: Media) -> Message:
    extra: dict[str, Any] = {}
    if thought := "".join(_text(item.content, media) for item in items if item.type == "reasoning"):
        extra["reasoning_content"] = thought
    calls = [_call(item) for item in items if item.type == "function_call"]
    if calls:
        extra["tool_calls"] = calls
    text = "".join(_text(item.content, media) for item in items if item.type == "message")
    return Message("assistant", text, extra or None)


def _call(item: Item) -> dict[str, Any]:
    value = json_or_none(item.arguments)
    function = {"name": item.name, "arguments": value if isinstance(value, dict) else item.arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _text(content: str | list[ContentPart] | None, media: Media) -> str:
    return content if isinstance(content, str) else "".join(part_text(part, media) for part in content or ())


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """As templates know tools: chat's shape."""
    named = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": named}


def _must_call(choice: str | dict[str, Any] | None) -> str | None:
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        return ""
    name = choice.get("name") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(name, str) or not name:
        raise wrong_field("tool_choice", "must be auto, none, required, or name a function")
    return name


def _grammar(text: TextConfig | None) -> Grammar:
    wanted = text.format if text is not None else None
    if wanted is None or wanted.type == "text":
        return ANY_TEXT
    if wanted.type == "json_object":
        return Grammar("json_schema", ANY_OBJECT)
    if wanted.type != "json_schema" or wanted.schema == ABSENT:
        raise wrong_field("text.format", "must be text, json_object, or json_schema with a schema")
    return Grammar("json_schema", bytes(wanted.schema).decode())


class ResponsesEncoder:
    """router.language.turn.Encoder for responses."""

    def __init__(self, request_id: str, model: str, created: int, body: ResponsesRequest) -> None:
        self._request_id = request_id
        self._response = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": created,
            "model": model,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tools": body.tools or [],
            "tool_choice": body.tool_choice or "auto",
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "store": False,
            "background": False,
            "previous_response_id": None,
        }
        self._sequence = 0
        self._items: list[dict[str, Any]] = []  # whole ones
        self._open: PartStart | None = None
        self._texts: list[str] = []  # of the open part
        self._delta = b""

    def open(self, usage: Usage) -> bytes:
        del usage
        begun = self._state("in_progress", [], None)
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def start(self, part: PartStart) -> bytes:
        self._open = part
        item, place = self._item(Part(part.kind, "", part.name), "in_progress"), self._place()
        self._delta = _json(place | CONTENT[part.kind])[1:-1]
        added = self._event("response.output_item.added", {"output_index": len(self._items), "item": item})
        if part.kind is PartKind.CALL:
            return added
        return added + self._event(
            "response.content_part.added", place | {"content_index": 0, "part": _part(part.kind, "")}
        )

    # Hot: once per flush of a stream.
    def delta(self, text: str) -> bytes:
        assert self._open is not None
        self._texts.append(text)
        name, self._sequence = DELTAS[self._open.kind], self._sequence + 1
        numbers = (name, name, self._sequence - 1, self._delta, _json(text))
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b,"delta":%b}\n\n' % numbers

    def end(self) -> bytes:
        assert self._open is not None
        part = Part(self._open.kind, "".join(self._texts), self._open.name)
        place, item = self._place(), self._item(part, "completed")
        said = [self._event(DONE[part.kind], place | CONTENT[part.kind] | {FIELDS[part.kind]: part.text})]
        if part.kind is not PartKind.CALL:
            whole = {"content_index": 0, "part": _part(part.kind, part.text)}
            said.append(self._event("response.content_part.done", place | whole))
        said.append(self._event("response.output_item.done", {"output_index": len(self._items), "item": item}))
        self._items.append(item)
        self._texts.clear()
        self._open = None
        return b"".join(said)

    def heartbeat(self) -> bytes:
        return COMMENT

    def close(self, ending: Ending, usage: Usage) -> bytes:
        kind = "incomplete" if ending.reason == "length" else "completed"
        return self._event(f"response.{kind}", self._state(kind, self._items, usage))

    def fail(self, status: int, detail: ErrorDetail) -> bytes:
        del status
        state = self._state("failed", self._items, None)
        state["response"]["error"] = {"code": detail.code or "server_error", "message": detail.message}
        return self._event("response.failed", state)

    def whole(self, parts: Sequence[Part], ending: Ending, usage: Usage) -> bytes:
        for part in parts:
            self._items.append(self._item(part, "completed"))
        kind = "incomplete" if ending.reason == "length" else "completed"
        return _json(self._state(kind, self._items, usage)["response"])

    def _state(self, status: str, items: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        response: dict[str, Any] = self._response | {"status": status, "output": items}
        response["usage"] = None if usage is None else usage_fields(usage)
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return {"response": response}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._item_id(self._open.kind), "output_index": len(self._items)}

    def _item_id(self, kind: PartKind) -> str:
        return f"{IDS[kind]}_{self._request_id}{len(self._items):02}"

    def _item(self, part: Part, status: str) -> dict[str, Any]:
        named = {"id": self._item_id(part.kind), "type": ITEMS[part.kind], "status": status}
        if part.kind is PartKind.CALL:
            call_id = f"call_{self._request_id}{len(self._items):02}"
            return named | {"call_id": call_id, "name": part.name, "arguments": part.text}
        content = [_part(part.kind, part.text)] if part.text or status == "completed" else []
        if part.kind is PartKind.REASONING:
            return named | {"summary": [], "content": content}
        return named | {"role": "assistant", "content": content}

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        data = _json({"type": name, "sequence_number": number} | fields)
        return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


TEXT, REASONING, CALL = PartKind
IDS = {TEXT: "msg", REASONING: "rs", CALL: "fc"}
ITEMS = {TEXT: "message", REASONING: "reasoning", CALL: "function_call"}
FIELDS = {TEXT: "text", REASONING: "text", CALL: "arguments"}
CONTENT: dict[PartKind, dict[str, Any]] = {
    TEXT: {"content_index": 0, "logprobs": []},
    REASONING: {"content_index": 0},
    CALL: {},
}
DELTAS = {
    TEXT: b"response.output_text.delta",
    REASONING: b"response.reasoning_text.delta",
    CALL: b"response.function_call_arguments.delta",
}
DONE = {
    TEXT: "response.output_text.done",
    REASONING: "response.reasoning_text.done",
    CALL: "response.function_call_arguments.done",
}


def _part(kind: PartKind, text: str) -> dict[str, Any]:
    if kind is PartKind.REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def usage_fields(usage: Usage) -> dict[str, Any]:
    """This dialect's names; input_tokens includes the cached ones."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.output,
    }


RESPONSES = Dialect(read, turn, ResponsesEncoder, OPENAI_ERRORS, "chat")
