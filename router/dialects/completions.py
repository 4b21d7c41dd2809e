"""OpenAI completions: a prompt of text or token ids, and an answer back to its JSON or its stream of events.

Owns the shapes of this dialect. Never touches sockets, tokens or policy."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import accumulate
from math import isnan
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from engine.kv.keys import Ids
from router.dialects.common import (
    COMMENT,
    OPENAI_ERRORS,
    Dialect,
    Tail,
    failure,
    fingerprinted,
    finite,
    sampling,
    stop_strings,
    wants_usage,
)
from router.dialects.schema import ANSWERS_MAX, CompletionRequest, decode, refuse_unsupported, wrong_field
from router.errors import ErrorDetail
from router.language.turn import Encoder, Ending, Part, PartStart, TokenScore, Turn, Usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's
ID_MAX = 2**31 - 1

_decoder = msgspec.json.Decoder(CompletionRequest)
_quote = msgspec.json.encode


def read(body: bytes) -> CompletionRequest:
    """The typed body. Raises RequestError 400."""
    request = decode(_decoder, body)
    if request.suffix:
        raise refuse_unsupported("suffix", "text is only continued")
    if request.best_of not in (None, request.n or 1):
        raise refuse_unsupported("best_of", "every answer is sent, so it must equal n")
    return request


def turn(request: CompletionRequest) -> Turn:
    """The Turn that a body asks for. Raises RequestError 400."""
    prompt = _checked(request.prompt)
    logprobs = -1 if request.logprobs is None else request.logprobs
    return Turn(
        model=request.model or "",
        sampling=replace(sampling(request, logprobs), prompt_logprobs=request.echo and logprobs >= 0),
        max_tokens=request.max_tokens or DEFAULT_MAX_TOKENS,
        stop=stop_strings(request.stop),
        is_stream=request.stream,
        text=prompt if isinstance(prompt, str) else None,
        ids=None if isinstance(prompt, str) else prompt,
        has_echo=request.echo,
    )


def prompts(request: CompletionRequest) -> list[CompletionRequest]:
    """The body once for each prompt: strings or lists of ids in a list are a prompt each."""
    given = request.prompt
    if isinstance(given, str) or not given or not all(isinstance(one, (str, list)) for one in given):
        return [request]
    if len(given) * (request.n or 1) > ANSWERS_MAX:
        raise wrong_field("prompt", f"{len(given)} prompts are over {ANSWERS_MAX} answers; ask in several requests")
    return [_with_prompt(request, one) for one in given]


def _with_prompt(request: CompletionRequest, prompt: str | list[Any]) -> CompletionRequest:
    single = copy(request)
    single.prompt = prompt
    return single


def _checked(prompt: str | list[Any]) -> str | Ids:
    """A string or a list of ids."""
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise wrong_field("prompt", "it holds no token")
    if not all(type(element) is int and 0 <= element <= ID_MAX for element in prompt):
        raise wrong_field("prompt", "a list must hold strings, lists of token ids, or token ids, zero or more")
    return np.array(prompt, dtype=np.int32)


class CompletionEncoder:
    """router.language.turn.Encoder for completions: one text, whatever it holds."""

    def __init__(self, identity: bytes, body: CompletionRequest, tail: Tail, index: int) -> None:
        self._index = index
        self._echoed = ""
        self._tail = tail
        usage = b',"usage":null' if wants_usage(body) else b""
        self._before = b'data: %b%b,"choices":[{"index":%d,"text":' % (identity, usage, index)
        self._after = b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._scores: list[TokenScore] = []
        self._offset = 0  # of the next scored token in the text

    def echo(self, prompt: str) -> None:
        """The answer's text begins with this."""
        self._echoed = prompt

    def computed_by(self, version: int) -> None:
        """In `system_fingerprint` from here on."""
        self._before = fingerprinted(self._before, [version])
        self._tail.computed_by(version)

    def open(self, usage: Usage) -> bytes:
        del usage
        return self.delta(self._echoed) if self._echoed else b""

    def start(self, part: PartStart) -> bytes:
        del part
        return b""

    # Hot: once per flush of a stream.
    def delta(self, text: str) -> bytes:
        if self._scores:
            scores = (self._before, _quote(text), self._take_scores())
            return b'%b%b,"logprobs":%b,"finish_reason":null}]}\n\n' % scores
        return b"%b%b%b" % (self._before, _quote(text), self._after)

    def scored(self, scores: Sequence[TokenScore]) -> None:
        self._scores += scores

    def _take_scores(self) -> bytes:
        """OpenAI's logprobs of a completion."""
        scores, self._scores = self._scores, []
        if not scores:
            return b"null"
        tokens = [_spelt(score.token) for score in scores]
        ends = list(accumulate(map(len, tokens), initial=self._offset))
        self._offset = ends.pop()
        top = [
            None if isnan(score.logprob) else {_spelt(token): finite(logprob) for token, logprob in score.top}
            for score in scores
        ]
        logprobs = [None if isnan(score.logprob) else finite(score.logprob) for score in scores]
        return _quote({"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": ends})

    def end(self) -> bytes:
        return b""

    def heartbeat(self) -> bytes:
        return COMMENT

    def close(self, ending: Ending, usage: Usage) -> bytes:
        last = (self._before, self._take_scores(), _quote(ending.reason))
        return b'%b"","logprobs":%b,"finish_reason":%b}]}\n\n' % last + self._tail.close(self._index, usage)

    def fail(self, status: int, detail: ErrorDetail) -> bytes:
        del status
        return failure(detail)

    def whole(self, parts: Sequence[Part], ending: Ending, usage: Usage) -> bytes:
        text = "".join([self._echoed, *(part.text for part in parts)])
        choice = (self._index, _quote(text), self._take_scores(), _quote(ending.reason))
        said = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % choice
        return self._tail.whole(self._index, said, usage)


def _spelt(token: bytes) -> str:
    return token.decode(errors="replace")


def voices(request_id: str, model: str, created: int, body: CompletionRequest) -> list[Encoder]:
    """An encoder for each answer that a body wants."""
    named = (_quote(f"cmpl-{request_id}"), created, _quote(model))
    identity = b'{"id":%b,"created":%d,"model":%b,"object":"text_completion"' % named
    asked = len(prompts(body))
    count = asked * (body.n or 1)
    tail = Tail(identity, count, asked, wants_usage=wants_usage(body))
    return [CompletionEncoder(identity, body, tail, index) for index in range(count)]


def encoder(request_id: str, model: str, created: int, body: CompletionRequest) -> Encoder:
    """The one of a body that wants one answer."""
    return voices(request_id, model, created, body)[0]


COMPLETIONS = Dialect(read, turn, encoder, OPENAI_ERRORS, "text_completion", voices, prompts)
