"""One request in no dialect: what every dialect decodes to, and what every encoder is told.

Owns the shapes between dialects, text and relay. Knows no JSON and no HTTP. What each request makes is a Struct: a
frozen dataclass of as many fields takes twenty times as long to make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

from msgspec import Struct

from engine.kv.keys import Ids
from engine.wire import Sampling
from router.errors import ErrorDetail, Headers, RequestError


class Message(Struct, frozen=True):
    """One message as a chat template sees it. `extra` holds what only some roles have, such as tool calls."""

    role: str
    content: str
    extra: dict[str, Any] | None = None


class Turn(Struct, frozen=True):
    """What the client wants. Exactly one of messages, text and ids is its prompt."""

    model: str
    sampling: Sampling  # max_tokens is not settled here: the room left is known once the prompt is tokenised
    max_tokens: int | None
    stop: tuple[str, ...]
    is_stream: bool
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    ids: Ids | None = None
    may_call: bool = False  # tools are offered, so calls in the answer are read as such
    must_call: str | None = None  # the function that the answer must call; empty: any of the tools
    is_one_call: bool = False  # the answer ends with its first call
    is_thinking: bool | None = None  # what the client asked of a model that can do both; None: the model's habit
    has_schema: bool = False  # the answer is to be JSON of a given form
    media: tuple[tuple[str, int], ...] = ()  # what it cannot see and words stand for: how many of each kind
    has_echo: bool = False  # the answer begins with the prompt's text
    notices: tuple[str, ...] = ()  # what else was left out or changed, for x-headway-notice


class PartKind(Enum):
    """What a part of an answer is."""

    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"


class PartStart(NamedTuple):
    """From here on the answer is of this kind. `name`: of the function that is called."""

    kind: PartKind
    name: str = ""


class PartEnd(NamedTuple):
    """The part is whole. Parts follow one another and never nest."""


class Weights(NamedTuple):
    """From here on the tokens are computed by this version of the weights, as the worker was told it."""

    version: int


# An answer in no dialect: a string is more of the part that stands open; a call's strings are its arguments' JSON.
Event = PartStart | str | PartEnd | Weights
TEXT_START, PART_END = PartStart(PartKind.TEXT), PartEnd()


class Part(NamedTuple):
    """A whole part."""

    kind: PartKind
    text: str
    name: str = ""


def parts_of(events: Iterable[Event]) -> list[Part]:
    """The parts that events make up; one that was cut off by the answer's end counts as far as it came."""
    starts: list[PartStart] = []
    texts: list[list[str]] = []
    for event in events:
        if isinstance(event, PartStart):
            starts.append(event)
            texts.append([])
        elif isinstance(event, str):
            texts[-1].append(event)
    return [Part(start.kind, "".join(text), start.name) for start, text in zip(starts, texts, strict=True)]


class Usage(Struct, frozen=True):
    """Tokens of one answer. `cached` is part of `prompt`, `reasoning` of `output`."""

    prompt: int
    cached: int
    output: int
    reasoning: int = 0


class Ending(NamedTuple):
    """Why an answer ended: stop | length | calls. `stop_string`: the client's own that was met."""

    reason: str
    stop_string: str | None = None


class TokenScore(NamedTuple):
    """How likely a token was, and which were likeliest there: what each adds to the text, and its log-probability."""

    token: bytes
    logprob: float  # NaN: a text's first token has none
    top: tuple[tuple[bytes, float], ...]


@runtime_checkable
class Scoring(Protocol):
    """An encoder whose dialect can tell log-probabilities."""

    def scored(self, scores: Sequence[TokenScore]) -> None:
        """Of the tokens that the next text, or the end, is made of."""


@runtime_checkable
class Versioned(Protocol):
    """An encoder whose dialect can tell which weights made an answer."""

    def computed_by(self, version: int) -> None:
        """What comes next is of these."""


@runtime_checkable
class Echoing(Protocol):
    """An encoder whose dialect can send the prompt back."""

    def echo(self, prompt: str) -> None:
        """Before anything is opened."""


class Encoder(Protocol):
    """One answer in one dialect: a state machine that is told what happens and says which bytes that is.

    A stream is `open`, parts, then `close` or `fail`; a whole answer is `whole` alone."""

    def open(self, usage: Usage) -> bytes:
        """What comes before the first part. The prompt's figures stand, the output's do not."""

    def start(self, part: PartStart) -> bytes:
        """A part begins."""

    def delta(self, text: str) -> bytes:
        """More of the open part; never empty."""

    def end(self) -> bytes:
        """The open part is whole."""

    def heartbeat(self) -> bytes:
        """That the answer still comes. Legal in any place, before `open` too."""

    def close(self, ending: Ending, usage: Usage) -> bytes:
        """The proper end."""

    def fail(self, status: int, detail: ErrorDetail) -> bytes:
        """An end that nobody can take for a whole answer."""

    def whole(self, parts: Sequence[Part], ending: Ending, usage: Usage) -> bytes:
        """The answer as one body."""


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How a dialect says no, before an answer has begun."""

    body: Callable[[int, ErrorDetail], tuple[int, bytes]]  # status and body, from those of `router.errors`
    overflow: Callable[[int, int], str]  # words for a prompt of so many tokens over so many: agents look for them

    def refusal(self, error: RequestError) -> tuple[int, Headers, bytes]:
        """Status, headers and body of an error."""
        status, body = self.body(error.status, error.detail)
        return status, error.headers(), body
