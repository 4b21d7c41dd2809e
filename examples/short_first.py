"""Shortest predicted work first inside each class, with aging: more answers a minute, long ones wait longer.

Owns the order of the waiting room alone. A key must not change with time: work less the arrival, weighed, orders two
requests alike whenever they are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from policies.api import Job, Key, RouterPolicy
from policies.builtin import headway
from policies.params import number


def short_first(params: Mapping[str, Any]) -> RouterPolicy:
    """Parameter: `aging` 0.05, seconds of work that a second of waiting is worth; all others are Headway's."""
    aging = number(params, "aging", 0.05)
    if not aging > 0.0:
        raise ValueError("aging must be more than 0, or long requests never run")
    ours = headway({name: value for name, value in params.items() if name != "aging"})

    def order(job: Job, work_s: float, now: float) -> tuple[Key, float]:
        del now
        return (0, work_s + aging * job.request.arrived), math.inf

    return replace(ours, order=order)
