"""Anthropic's request body, typed. Blocks of every type are one shape: what a type does not have stays empty.

Owns the shapes. Unknown fields and block types pass unread: clients send what their vendor invented last week."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct, field

from router.dialects.schema import ABSENT, STOP_CHARS_MAX, Common, Stops


class Block(Struct):
    """A piece of content."""

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    content: str | list[Block] | dict[str, Any] | None = None
    source: dict[str, Any] | None = None


class AnthropicMessage(Struct):
    """One message. The role `system` may stand anywhere."""

    role: Annotated[str, Meta(max_length=32)]
    content: str | list[Block] | None = None


class AnthropicTool(Struct):
    """A tool of the client's; server tools have a `type` and no schema."""

    name: str = ""
    description: str = ""
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class Thinking(Struct):
    """enabled | disabled | adaptive."""

    type: str = ""


class OutputFormat(Struct):
    """Its schema goes to the worker as it was written."""

    type: str = ""
    schema: Raw = field(default_factory=lambda: ABSENT)


class OutputConfig(Struct):
    """What the answer must be."""

    format: OutputFormat | None = None


class MessagesRequest(Common, kw_only=True):
    """POST /v1/messages and /v1/messages/count_tokens."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=65_536)]
    system: str | list[Block] | None = None
    stop_sequences: Annotated[str, Meta(max_length=STOP_CHARS_MAX)] | Stops | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
