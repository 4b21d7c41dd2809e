"""One request in no dialect: what every dialect decodes to, and what every encoder is told.

Owns the shapes between dialects, text and relay. Knows no JSON and no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from engine.keys import Ids
from engine.wire import Sampling


class Message(NamedTuple):
    """One message as a chat template sees it. `extra` holds what only some roles have, such as tool calls."""

    role: str
    content: str
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What the client wants. Exactly one of messages, text and ids is its prompt."""

    model: str
    sampling: Sampling  # max_tokens is not settled here: the room left is known once the prompt is tokenised
    max_tokens: int | None
    stop: tuple[str, ...]
    is_stream: bool
    wants_usage: bool  # a last chunk with usage
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. `cached` is part of `prompt`."""

    prompt: int
    cached: int
    output: int


class Encoder(Protocol):
    """One answer in one dialect: a state machine that is told what happens and says which bytes that is.

    A stream is `open`, any number of `delta`, then `close` or `fail`; a whole answer is `whole` alone."""

    def open(self) -> bytes:
        """What comes before the first text."""

    def delta(self, text: str) -> bytes:
        """More text; never empty."""

    def close(self, reason: str, usage: Usage) -> bytes:
        """The proper end. `reason`: stop | length."""

    def fail(self, message: str, code: str) -> bytes:
        """An end that nobody can take for a whole answer."""

    def whole(self, text: str, reason: str, usage: Usage) -> bytes:
        """The answer as one body."""
