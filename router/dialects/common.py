"""What chat and completions have in common: the way from fields to a Turn's sampling, and SSE's frame.

Owns defaults of the API. Never reads HTTP."""

from __future__ import annotations

import secrets

from engine.wire import Sampling
from router.dialects.schema import Common, refuse_unsupported

DONE = b"data: [DONE]\n\n"


def sampling(body: Common) -> Sampling:
    """How to choose tokens. A request without a seed gets one, so that an answer can be resumed elsewhere."""
    if body.n not in (None, 1):
        raise refuse_unsupported("n", "one answer a request is served")
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),  # -1 means off as well
        min_p=body.min_p or 0.0,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        min_tokens=body.min_tokens or 0,
        ignore_eos=body.ignore_eos,
        stop_ids=tuple(body.stop_token_ids or ()),
    )


def stops(body: Common) -> tuple[str, ...]:
    """Stop strings, empty ones dropped: they would stop everything."""
    given = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return tuple(stop for stop in given if stop)


def wants_usage(body: Common) -> bool:
    """Whether a stream ends with a chunk of usage."""
    return body.stream_options is not None and body.stream_options.include_usage


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"
