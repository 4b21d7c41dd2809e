"""What chat and completions have in common: the way from fields to a Turn's sampling, and SSE's frame.

Owns what a dialect is, and defaults of the API. Never reads HTTP."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.wire import Sampling
from router.dialects.grammars import of_body
from router.dialects.schema import Common, refuse_unsupported
from router.errors import ErrorDetail, error_body
from router.language.forms import joined
from router.language.turn import Encoder, ErrorShape, Message, Turn, Usage

LOGPROB_MIN = -9999.0  # JSON has no infinity; OpenAI says it so
DONE = b"data: [DONE]\n\n"
_FINGERPRINT = re.compile(rb',"system_fingerprint":"weights-[0-9+a-z-]*"')
COMMENT = b": the request waits for its first token\n\n"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one route reads a body and writes an answer."""

    read: Callable[[bytes], Any]  # raises RequestError 400
    turn: Callable[[Any], Turn]  # raises RequestError 400
    encoder: Callable[[str, str, int, Any], Encoder]  # of a request's id, model, second of creation and typed body
    errors: ErrorShape
    operation: str  # gen_ai.operation.name
    voices: Callable[[str, str, int, Any], list[Encoder]] | None = None  # of a body that wants several answers
    prompts: Callable[[Any], list[Any]] | None = None  # the body once for each of its prompts; raises RequestError 400


def _openai_overflow(tokens: int, limit: int) -> str:
    return f"This model's maximum context length is {limit} tokens. However, your messages resulted in {tokens} tokens."


OPENAI_ERRORS = ErrorShape(lambda status, detail: (status, error_body(detail)), _openai_overflow)


def failure(detail: ErrorDetail) -> bytes:
    """OpenAI's event of a stream that ends badly."""
    return event(error_body(ErrorDetail(detail.message, "server_error", None, detail.code)))


def sampling(body: Common, logprobs: int = -1) -> Sampling:
    """How to choose tokens. A request without a seed gets one, so that an answer can be resumed elsewhere.
    Raises RequestError 400."""
    if body.prompt_logprobs is not None:
        raise refuse_unsupported("prompt_logprobs", "echo with logprobs at /v1/completions tells those of the prompt")
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
        logprobs=logprobs,
    )


class Tail:
    """What ends a response once all of its answers have ended: usage of all, and the end of a stream."""

    def __init__(self, identity: bytes, answers: int = 1, prompts: int = 1, *, wants_usage: bool = False) -> None:
        self._identity = identity  # the JSON of a body or chunk up to its choices
        self._choices = [b""] * answers
        self._left = answers
        self._versions: dict[int, None] = {}
        self._wants_usage = wants_usage
        self._each = answers // prompts  # answers of one prompt stand side by side
        self._usages = [Usage(0, 0, 0)] * prompts

    def computed_by(self, version: int) -> None:
        """An answer goes on by these weights."""
        self._versions[version] = None

    def close(self, index: int, usage: Usage) -> bytes:
        """One answer of a stream ended; empty unless it was the last."""
        if not self._is_last(index, usage):
            return b""
        if not self._wants_usage:
            return DONE
        return event(self._identity + b',"choices":[],"usage":%b}' % usage_json(self._usage())) + DONE

    def whole(self, index: int, choice: bytes, usage: Usage) -> bytes:
        """One answer of a body ended; empty unless it was the last."""
        self._choices[index] = choice
        if not self._is_last(index, usage):
            return b""
        body = b'%b,"choices":[%b],"usage":%b}' % (self._identity, b",".join(self._choices), usage_json(self._usage()))
        return fingerprinted(body, self._versions) if self._versions else body

    def _is_last(self, index: int, usage: Usage) -> bool:
        """A prompt counts once; cached is what was there before any of its answers."""
        which = index // self._each
        known = self._usages[which]
        cached = min(known.cached, usage.cached) if known.output else usage.cached
        output, reasoning = known.output + usage.output, known.reasoning + usage.reasoning
        self._usages[which] = Usage(usage.prompt, cached, output, reasoning)
        self._left -= 1
        return self._left == 0

    def _usage(self) -> Usage:
        """Of all answers."""
        if len(self._usages) == 1:
            return self._usages[0]
        return Usage(
            sum(usage.prompt for usage in self._usages),
            sum(usage.cached for usage in self._usages),
            sum(usage.output for usage in self._usages),
            sum(usage.reasoning for usage in self._usages),
        )


def fingerprinted(shape: bytes, versions: Iterable[int]) -> bytes:
    """JSON up to its choices or beyond, naming the weights that made them; only who was given others than at its start
    has a version."""
    name = "+".join(f"weights-{version}" for version in versions)
    plain = _FINGERPRINT.sub(b"", shape, 1)
    return plain.replace(b',"choices":[', b',"system_fingerprint":"%b","choices":[' % name.encode(), 1)


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(logprob, LOGPROB_MIN)


def usage_json(usage: Usage) -> bytes:
    """OpenAI's usage object: prompt_tokens includes the cached ones."""
    return msgspec.json.encode(
        {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.output,
            "total_tokens": usage.prompt + usage.output,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        }
    )


def random_seed() -> int:
    """For a request that names none."""
    return random.getrandbits(62)  # nobody gains by guessing it, and the kernel's own costs 5 us a request


def stop_strings(given: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings, empty ones dropped: they would stop everything."""
    return tuple(stop for stop in ([given] if isinstance(given, str) else given or []) if stop)


def joined_system(messages: Sequence[Message]) -> list[Message]:
    """Neighbouring system messages as one: templates know one at the beginning, clients send several blocks."""
    return joined(messages, "system")


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
