"""What the router reads of a body that it passes on: enough to classify, place and account, nothing more.

Owns that choice. Never refuses what only the upstream can judge: unknown and odd fields travel as they came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw, Struct

from engine.kv import keys
from engine.kv.keys import ChainKey
from engine.wire import Sampling
from policies.request import Request, RequestId, Tenant
from router.control import features
from router.dialects.schema import decode
from router.errors import RequestError
from router.language.turn import Message, Turn
from router.listener.exchange import Exchange

BLOCK_CHARS = 256  # of the prompt's JSON; about 64 tokens
CHARS_A_TOKEN = 4
ROOT = ChainKey(bytes(16))
OPENING = 2  # messages whose text is looked at: a template's beginning, a conversation's name

PRIORITIES = {  # each engine's polarity, by class: vLLM serves the smallest first, SGLang the largest
    "vllm": (0, 1, 2),
    "sglang": (2, 1, 0),
}


class PeekMessage(Struct):
    """A message. Its content stays bytes."""

    role: str = "user"
    content: Raw = Raw(b'""')


class Peek(Struct):
    """The fields of all dialects that say what kind of work this is."""

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    messages: list[PeekMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    response_format: Any = None
    user: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    background: bool = False
    completion_window: str | None = None
    metadata: dict[str, Any] | None = None
    n: int | None = None


_PEEK = msgspec.json.Decoder(Peek)
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
PROMPT_FIELDS = ("tools", "system", "instructions", "messages", "input", "prompt")  # in the order of most templates


@dataclass(frozen=True, slots=True)
class Seen:
    """A body, looked at."""

    peek: Peek
    fields: Mapping[str, Raw]

    @property
    def is_stream(self) -> bool:
        return bool(self.peek.stream)

    @property
    def tokens(self) -> int:
        """Prompt tokens, by the length of its text."""
        return max(1, sum(len(bytes(part)) for part in self.prompt()) // CHARS_A_TOKEN)

    def chain(self, salt: bytes) -> bytes:
        """A chain key for each 256 characters of the prompt: what shares a beginning shares keys, as with tokens."""
        text = b"".join(bytes(part).rstrip(b"]") for part in self.prompt())
        whole = text[: len(text) // BLOCK_CHARS * BLOCK_CHARS]
        return keys.chain(ROOT, np.frombuffer(whole, np.int32), BLOCK_CHARS // 4, salt)

    def body(self, model: str, priority: int | None) -> bytes:
        """What the upstream gets: every field as it came, but for the model's name there and a priority."""
        fields: dict[str, Any] = dict(self.fields)
        fields["model"] = model
        if priority is not None:
            fields["priority"] = priority
        return msgspec.json.encode(fields)

    def prompt(self) -> list[Raw]:
        """Its parts, in the order of most templates."""
        return [self.fields[name] for name in PROMPT_FIELDS if name in self.fields]


def look(body: bytes) -> Seen:
    """Raises RequestError 400 for what is no JSON object, or says nonsense in a field that we need."""
    peek = decode(_PEEK, body)
    try:
        return Seen(peek, _FIELDS.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError(400, "The body is not valid JSON.", code="invalid_json") from None


def describe(request_id: RequestId, exchange: Exchange, seen: Seen, model: str, tenant: Tenant) -> Request:
    """The request as the mind sees it. Raises RequestError 400 for a class that does not exist."""
    peek = seen.peek
    messages = peek.messages or []
    texts = [bytes(message.content).decode(errors="replace") for message in messages[:OPENING]]
    texts += [""] * (len(messages) - len(texts))
    form = peek.response_format
    turn = Turn(
        model=model,
        sampling=Sampling(),
        max_tokens=peek.max_completion_tokens or peek.max_output_tokens or peek.max_tokens,
        stop=(),
        is_stream=seen.is_stream,
        messages=tuple(Message(message.role, text) for message, text in zip(messages, texts, strict=True)),
        text=None if messages else "".join(bytes(part).decode(errors="replace")[:4096] for part in seen.prompt()),
        tools=tuple(peek.tools or ()),
        has_schema=isinstance(form, dict) and form.get("type") == "json_schema",
    )
    return features.describe(request_id, exchange, peek, turn, model=model, tenant=tenant)
