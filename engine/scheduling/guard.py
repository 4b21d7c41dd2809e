"""The border to a step policy that is not ours: what raises, answers nonsense or dawdles must not end the worker.

Owns how a fault is noticed and when ours stays instead. Plans nothing: Headway's own policy answers for the other's
failed calls, within the same limits."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from policies.api import EnginePolicy
from policies.builtin import ENGINES, headway_engine
from policies.plugins import load_engine
from policies.retention import Band
from policies.step_plan import BatchView, PlanLimits, StepPlan

log = logging.getLogger(__name__)

SLOW_S = 0.005  # of a step of 10 to 50 ms
FAULTS_MAX = 3  # of one function within FAULTS_WITHIN_S: then ours stays until the policy is changed
FAULTS_WITHIN_S = 600.0  # a busy machine stops any call for 5 ms now and then


def load(ref: str, limits: PlanLimits) -> EnginePolicy:
    """The step policy called `ref`; a stranger's behind a guard. Raises PolicyError."""
    ours = headway_engine(limits)
    if ref == "headway":
        return ours
    policy = load_engine(ref)
    return policy if ref in ENGINES else guard(policy, ours)


def guard(policy: EnginePolicy, ours: EnginePolicy, clock: Callable[[], float] = time.perf_counter) -> EnginePolicy:
    """`policy`, unable to raise."""
    plan: Any = Watch("plan", policy.plan, ours.plan, _is_plan, clock).call
    keep: Any = Watch("keep", policy.keep, ours.keep, _is_kept, clock).call
    return EnginePolicy(plan, keep)


class Watch:
    """One function of a stranger, and its faults of late."""

    def __init__(
        self,
        name: str,
        theirs: Callable[..., Any],
        ours: Callable[..., Any],
        is_sane: Callable[..., bool],
        clock: Callable[[], float],
    ) -> None:
        self._name, self._theirs, self._ours, self._is_sane, self._clock = name, theirs, ours, is_sane, clock
        self._faults: list[float] = []

    def call(self, *arguments: Any) -> Any:
        """Their answer if it makes sense, else ours."""
        if len(self._faults) == FAULTS_MAX:
            return self._ours(*arguments)
        begun = self._clock()
        try:
            answer = self._theirs(*arguments)
            is_sane = self._is_sane(answer, *arguments)
        except Exception as error:  # noqa: BLE001 -- border: somebody else's code
            return self._fail(f"raised {type(error).__name__}: {error}", arguments)
        if not is_sane:
            return self._fail("made no sense", arguments)
        if (taken_s := self._clock() - begun) > SLOW_S:
            self._note(f"took {taken_s * 1000:.1f} ms")  # an answer all the same
        return answer

    def _fail(self, reason: str, arguments: tuple[Any, ...]) -> Any:
        self._note(reason)
        return self._ours(*arguments)

    def _note(self, reason: str) -> None:
        now = self._clock()
        self._faults = [*(at for at in self._faults if now - at < FAULTS_WITHIN_S), now]
        stays = "; Headway's own stays from here on" if len(self._faults) == FAULTS_MAX else ""
        log.error("the step policy's %s %s%s", self._name, reason[:200], stays)


def _is_plan(answer: Any, batch: BatchView, *_: Any) -> bool:
    """Each row once, decodes that decode, chunks of what is pending; and something, if there is something to do."""
    if not isinstance(answer, StepPlan) or not isinstance(answer.decodes, np.ndarray):
        return False
    rows, free = len(batch.pending), ~batch.is_blocked
    decodes, chunks = answer.decodes.tolist(), answer.chunks
    chosen = [*decodes, *(chunk.row for chunk in chunks)]
    if not all(isinstance(row, int | np.integer) and 0 <= row < rows and free[row] for row in chosen):
        return False
    return (
        len(set(chosen)) == len(chosen)
        and all(batch.is_decoding[row] for row in decodes)
        and all(not batch.is_decoding[row] and 0 < tokens <= batch.pending[row] for row, tokens in chunks)
        and (bool(chosen) or not free.any())
    )


def _is_kept(answer: Any, *_: Any) -> bool:
    match answer:
        case (Band(), float() | int() as seconds):
            return not math.isnan(seconds)
        case _:
            return False
