"""What chat and completions have in common: the way from fields to a Turn's sampling, and SSE's frame.

Owns what a dialect is, and defaults of the API. Never reads HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.wire import Sampling
from router.dialects.grammars import of_body
from router.dialects.schema import Common, refuse_unsupported
from router.errors import ErrorDetail, error_body
from router.turn import Encoder, ErrorShape, Turn

DONE = b"data: [DONE]\n\n"
COMMENT = b": the request waits for its first token\n\n"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one route reads a body and writes an answer."""

    read: Callable[[bytes], Any]  # raises RequestError 400
    turn: Callable[[Any], Turn]  # raises RequestError 400
    encoder: Callable[[str, str, int, Any], Encoder]  # of a request's id, model, second of creation and typed body
    errors: ErrorShape
    operation: str  # gen_ai.operation.name


def _openai_overflow(tokens: int, limit: int) -> str:
    return f"This model's maximum context length is {limit} tokens. However, your messages resulted in {tokens} tokens."


OPENAI_ERRORS = ErrorShape(lambda status, detail: (status, error_body(detail)), _openai_overflow)


def failure(detail: ErrorDetail) -> bytes:
    """OpenAI's event of a stream that ends badly."""
    return event(error_body(ErrorDetail(detail.message, "server_error", None, detail.code)))


def sampling(body: Common) -> Sampling:
    """How to choose tokens. A request without a seed gets one, so that an answer can be resumed elsewhere."""
    if body.n not in (None, 1):
        raise refuse_unsupported("n", "one answer a request is served")
    grammar = of_body(body)
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),  # -1 means off as well
        min_p=body.min_p or 0.0,
        seed=random_seed() if body.seed is None else body.seed,
        min_tokens=body.min_tokens or 0,
        ignore_eos=body.ignore_eos,
        stop_ids=tuple(body.stop_token_ids or ()),
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(body.logit_bias.items()) if body.logit_bias else (),
        grammar_kind=grammar.kind,
        grammar=grammar.source,
    )


def random_seed() -> int:
    """For a request that names none."""
    return secrets.randbits(62)


def stop_strings(given: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings, empty ones dropped: they would stop everything."""
    return tuple(stop for stop in ([given] if isinstance(given, str) else given or []) if stop)


def json_or_none(text: str) -> Any:
    """What a client or model meant as JSON; None when it is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def wants_usage(body: Common) -> bool:
    """Whether a stream ends with a chunk of usage."""
    return body.stream_options is not None and body.stream_options.include_usage


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"
