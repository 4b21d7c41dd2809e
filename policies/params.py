"""A policy's parameters, checked: a mistake in a configuration is named, never a default in disguise.

Owns the checks and their words. Knows no policy and none of their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def refuse_unknown(params: Mapping[str, Any], *known: str) -> None:
    """Raises ValueError on a parameter that a policy does not read."""
    if unknown := sorted(set(params) - set(known)):
        raise ValueError(f"there is no {unknown[0]!r}; there are {', '.join(known)}")


def number(params: Mapping[str, Any], name: str, default: float) -> float:
    """The number called `name`. Raises ValueError when something else is there."""
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r:.40}")
    return float(value)


def table(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The table called `name`, empty when it is not given. Raises ValueError when something else is there."""
    value = params.get(name, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a table, got {value!r:.40}")
    return value
