"""Which KV stays: a band of the cache and a soft lease for a span of blocks, asked when the span's state changes.

Owns the order of bands. Never locks: a lease only raises a band until it ends, and allocation always succeeds."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from policies.request import RequestClass


class Band(enum.IntEnum):
    """Evicted in this order; inside a band the least recently used goes first."""

    EXPIRED = 0  # superseded, or unique to one batch item: nobody will ask again
    DATA_PROCESSOR = 1
    BACKGROUND_AGENT = 2
    CHATBOT = 3
    LEASED = 4


CLASS_BANDS = (Band.CHATBOT, Band.BACKGROUND_AGENT, Band.DATA_PROCESSOR)  # by RequestClass


@dataclass(frozen=True, slots=True)
class SpanView:
    """Blocks of one sequence with a common fate, at the moment the sequence lets go of them."""

    request_class: RequestClass
    is_shared: bool  # other sequences have used these blocks too
    is_aborted: bool
    hits: int = 0  # times that a sequence found them
    born: float = math.inf  # when they were computed, local seconds
    has_called: bool | None = None  # its answer calls a tool, so a program will be back; None: who knows


@dataclass(frozen=True, slots=True)
class KeepLimits:
    """Start values. A tool call returns within 13.6 s in 90 % of cases and 0.3 s in the median; a person within 84 s in
    the median (TraceLab), which no lease is worth."""

    abort_s: float = 10.0  # a retry costs a restore, not a prefill
    session_s: tuple[float, float, float] = (30.0, 15.0, 0.0)  # by class, behind a call of a tool, or what may be one
    shared_hits: int = 3
    shared_gaps: float = 3.0  # a prefix in demand is kept for so many of its mean gaps between hits ...
    lease_s_max: float = 300.0  # ... and no lease is longer than this


def keep(span: SpanView, now: float, limits: KeepLimits = KeepLimits()) -> tuple[Band, float]:
    """The span's band and its lease in seconds (0: none)."""
    band = CLASS_BANDS[span.request_class]
    if span.hits > limits.shared_hits and now > span.born:
        gap_s = (now - span.born) / span.hits
        return band, min(limits.shared_gaps * gap_s, limits.lease_s_max)
    if span.is_aborted:
        return band, limits.abort_s
    if span.request_class == RequestClass.DATA_PROCESSOR and not span.is_shared:
        return Band.EXPIRED, 0.0
    return band, 0.0 if span.has_called is False else limits.session_s[span.request_class]
