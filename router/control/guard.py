"""The border to a policy that is not ours: what raises, answers nonsense or dawdles must not stop the router.

Owns how a fault is noticed. Never decides: the built-in stage answers instead, and the mind hears of it as an event."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from policies.api import Admit, Classified, Forecast, Hold, Promise, Refuse, RouterPolicy
from policies.events import Event, PolicyFault
from policies.request import RequestClass

SLOW_S = 0.005  # more than 5 ms in one call is felt by every stream
FAULTS_MAX = 64  # of one event; the dispatcher distrusts a stage at the first, so more say nothing new

Stage = Callable[..., Any]


def guard(policy: RouterPolicy, fallback: RouterPolicy, faults: deque[PolicyFault], *, is_timed: bool) -> RouterPolicy:
    """`policy`, unable to raise. A recording is replayed untimed: there the slow calls are events already."""
    watch = Watch(faults, is_timed)
    return RouterPolicy(
        classify=watch.stage("classify", policy.classify, fallback.classify, _is_classified),
        promise=watch.stage("promise", policy.promise, fallback.promise, _is_promise),
        admit=watch.stage("admit", policy.admit, fallback.admit, _is_verdict),
        order=watch.stage("order", policy.order, fallback.order, _is_key),
        place=watch.stage("place", policy.place, fallback.place, _is_forecasts),
        learn=watch.stage("learn", policy.learn, _forget, _is_nothing),
    )


class Watch:
    """Counts what one policy does wrong."""

    def __init__(self, faults: deque[PolicyFault], is_timed: bool) -> None:
        self._faults = faults
        self._is_timed = is_timed

    def stage(self, name: str, theirs: Stage, ours: Stage, is_sane: Callable[[Any], bool]) -> Stage:
        """`theirs`, with `ours` for the calls that it fails."""

        def call(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter() if self._is_timed else 0.0
            try:
                answer = theirs(*arguments, **named)
            except Exception as error:  # noqa: BLE001 -- border: somebody else's code
                self._note(name, f"raised {type(error).__name__}: {error}")
                return ours(*arguments, **named)
            if not is_sane(answer):
                self._note(name, f"answered a {type(answer).__name__} that makes no sense")
                return ours(*arguments, **named)
            if self._is_timed and (taken_s := time.perf_counter() - begun) > SLOW_S:
                self._note(name, f"took {taken_s * 1000:.1f} ms")
            return answer

        return call

    def _note(self, stage: str, reason: str) -> None:
        if len(self._faults) < FAULTS_MAX:
            self._faults.append(PolicyFault(stage, reason[:200]))


def _forget(event: Event) -> None:
    del event


def _is_nothing(answer: Any) -> bool:
    return answer is None


def _is_classified(answer: Any) -> bool:
    return isinstance(answer, Classified) and isinstance(answer.request_class, RequestClass)


def _is_promise(answer: Any) -> bool:
    return isinstance(answer, Promise) and answer.patience_s >= 0.0 and answer.budget.ttft_s >= 0.0


def _is_verdict(answer: Any) -> bool:
    return isinstance(answer, Admit | Hold | Refuse)


def _is_key(answer: Any) -> bool:
    match answer:
        case ((int(), float() | int() as value), float() | int()):
            return not math.isnan(value)  # NaN would break the heap's order
        case _:
            return False


def _is_forecasts(answer: Any) -> bool:
    return isinstance(answer, list | tuple) and all(isinstance(one, Forecast) for one in answer)
