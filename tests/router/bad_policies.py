"""Policies of strangers, each wrong in one way, for the guard's tests.

Owns their faults. Everything else about them is the built-in policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from policies.api import Classified, Forecast, RouterPolicy, SessionView
from policies.builtin import headway
from policies.request import Request


def raises_at_place(params: Mapping[str, Any]) -> RouterPolicy:
    def place(*_: Any) -> Sequence[Forecast]:
        raise ValueError("no idea")

    return replace(headway(params), place=place)


def nonsense_at_classify(params: Mapping[str, Any]) -> RouterPolicy:
    def classify(*_: Any) -> Classified:
        return "chatbot+"  # type: ignore[return-value]

    return replace(headway(params), classify=classify)


def nan_at_order(params: Mapping[str, Any]) -> RouterPolicy:
    def order(*_: Any) -> tuple[tuple[int, float], float]:
        return (0, float("nan")), 1.0

    return replace(headway(params), order=order)


def slow_at_classify(params: Mapping[str, Any]) -> RouterPolicy:
    policy = headway(params)

    def classify(request: Request, session: SessionView, now: float) -> Classified:
        time.sleep(0.006)
        return policy.classify(request, session, now)

    return replace(policy, classify=classify)


def raises_at_learn(params: Mapping[str, Any]) -> RouterPolicy:
    def learn(_: Any) -> None:
        raise KeyError("event")

    return replace(headway(params), learn=learn)
