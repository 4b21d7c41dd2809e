"""OpenAI's Responses request body, typed. Items of every type are one shape: what a type does not have stays empty.

Owns the shapes. Unknown fields and item types pass unread: clients send what their vendor invented last week."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct, field

from router.dialects.schema import ABSENT, Common, ContentPart, Positive


class Item(Struct):
    """One item of the input: a message, a call, its output, reasoning, or something that is not for this model."""

    type: str = "message"
    role: str = ""
    content: str | list[ContentPart] | None = None
    name: str = ""
    arguments: str = ""
    call_id: str = ""
    output: str | list[ContentPart] | None = None


class TextFormat(Struct):
    """Its schema goes to the worker as it was written."""

    type: str = "text"
    schema: Raw = field(default_factory=lambda: ABSENT)


class TextConfig(Struct):
    """What the text of the answer must be."""

    format: TextFormat | None = None


class ReasoningConfig(Struct):
    """How hard to think; only `none` says something here."""

    effort: str | None = None


class ResponsesRequest(Common, kw_only=True):
    """POST /v1/responses."""

    input: str | Annotated[list[Item], Meta(min_length=1, max_length=65_536)]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
