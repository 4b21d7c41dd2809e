"""OpenAI completions: a prompt of text or token ids, and an answer back to its JSON or its stream of events.

Owns the shapes of this dialect. Never touches sockets, tokens or policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from engine.keys import Ids
from router.dialects.chat import usage_json
from router.dialects.common import (
    COMMENT,
    DONE,
    OPENAI_ERRORS,
    Dialect,
    event,
    failure,
    sampling,
    stop_strings,
    wants_usage,
)
from router.dialects.schema import CompletionRequest, decode, refuse_unsupported, wrong_field
from router.errors import ErrorDetail
from router.turn import Ending, Part, PartStart, Turn, Usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's
ID_MAX = 2**31 - 1

_decoder = msgspec.json.Decoder(CompletionRequest)
_quote = msgspec.json.encode


def read(body: bytes) -> CompletionRequest:
    """The typed body. Raises RequestError 400."""
    request = decode(_decoder, body)
    if request.echo:
        raise refuse_unsupported("echo", "the prompt is not sent back")
    if request.suffix:
        raise refuse_unsupported("suffix", "text is only continued")
    if request.logprobs:
        raise refuse_unsupported("logprobs", "this server returns none")
    if request.best_of not in (None, 1):
        raise refuse_unsupported("best_of", "one answer a request is served")
    return request


def turn(request: CompletionRequest) -> Turn:
    """The Turn that a body asks for. Raises RequestError 400."""
    prompt = _single(request.prompt)
    return Turn(
        model=request.model,
        sampling=sampling(request),
        max_tokens=request.max_tokens or DEFAULT_MAX_TOKENS,
        stop=stop_strings(request.stop),
        is_stream=request.stream,
        text=prompt if isinstance(prompt, str) else None,
        ids=None if isinstance(prompt, str) else prompt,
    )


def _single(prompt: str | list[Any]) -> str | Ids:
    """A string, a list of ids, or either of them as the only element of a list."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if any(isinstance(element, (str, list)) for element in prompt):
        raise refuse_unsupported("prompt", "one prompt a request is served")
    if not prompt:
        raise wrong_field("prompt", "it holds no token")
    if not all(type(element) is int and 0 <= element <= ID_MAX for element in prompt):
        raise wrong_field("prompt", "a list must hold token ids, zero or more")
    return np.array(prompt, dtype=np.int32)


class CompletionEncoder:
    """router.turn.Encoder for completions: one text, whatever it holds."""

    def __init__(self, request_id: str, model: str, created: int, body: CompletionRequest) -> None:
        self._identity = b'{"id":%b,"created":%d,"model":%b,"object":"text_completion"' % (
            _quote(f"cmpl-{request_id}"),
            created,
            _quote(model),
        )
        self._wants_usage = wants_usage(body)
        usage = b',"usage":null' if self._wants_usage else b""
        self._before = b"data: " + self._identity + usage + b',"choices":[{"index":0,"text":'
        self._after = b',"logprobs":null,"finish_reason":null}]}\n\n'

    def open(self, usage: Usage) -> bytes:
        del usage
        return b""

    def start(self, part: PartStart) -> bytes:
        del part
        return b""

    # Hot: once per flush of a stream.
    def delta(self, text: str) -> bytes:
        return b"%b%b%b" % (self._before, _quote(text), self._after)

    def end(self) -> bytes:
        return b""

    def heartbeat(self) -> bytes:
        return COMMENT

    def close(self, ending: Ending, usage: Usage) -> bytes:
        last = self._before + b'"","logprobs":null,"finish_reason":%b}]}\n\n' % _quote(ending.reason)
        if not self._wants_usage:
            return last + DONE
        return last + event(self._identity + b',"choices":[],"usage":%b}' % usage_json(usage)) + DONE

    def fail(self, status: int, detail: ErrorDetail) -> bytes:
        del status
        return failure(detail)

    def whole(self, parts: Sequence[Part], ending: Ending, usage: Usage) -> bytes:
        text = "".join([part.text for part in parts])
        choice = b'{"index":0,"text":%b,"logprobs":null,"finish_reason":%b}' % (_quote(text), _quote(ending.reason))
        return b'%b,"choices":[%b],"usage":%b}' % (self._identity, choice, usage_json(usage))


COMPLETIONS = Dialect(read, turn, CompletionEncoder, OPENAI_ERRORS, "text_completion")
