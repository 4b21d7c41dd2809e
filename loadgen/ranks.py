"""Ranks: percentiles that are values which were measured.

Owns the nearest-rank rule. Never interpolates: between two latencies there was none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec


class Quantiles(msgspec.Struct, frozen=True):
    """Nearest-rank percentiles of what was seen; None when nothing was."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


def quantiles(values: Iterable[float | None]) -> Quantiles:
    """Of what was seen."""
    found = sorted(value for value in values if value is not None)
    return Quantiles(rank(found, 0.50), rank(found, 0.90), rank(found, 0.99))


def rank(ascending: Sequence[float], share: float) -> float | None:
    """The value at this share; None of nothing."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)] if ascending else None
