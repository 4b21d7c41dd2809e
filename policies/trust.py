"""Which policy answers: the one that was chosen, or the built-in one for a stage that has just failed.

Owns until when each stage is distrusted. Never notices a fault itself: the router's guard does, and sends an event."""

from __future__ import annotations

import math

from policies.admission import admit
from policies.api import RouterPolicy
from policies.budget import Promises
from policies.classify import classify
from policies.events import Event
from policies.ordering import least_laxity
from policies.placement import lmetric_place

BUILT_IN = RouterPolicy(classify, Promises(), admit, least_laxity, lmetric_place)
STAGES = ("classify", "promise", "admit", "order", "place", "learn")
DISTRUST_S = 10.0  # how long the built-in stage stands in for a faulty one
FAULTS_MAX = 3  # at the third fault of a stage the built-in one stays: a policy that fails so often fails again ...
FAULTS_WITHIN_S = 600.0  # ... if it came so soon: a busy machine may stop any call for 5 ms, three times in a month


class Trust:
    """A policy, and its faults so far."""

    def __init__(self, policy: RouterPolicy) -> None:
        self._policy = policy
        self._distrusted_until: dict[str, float] = {}
        self._faults: dict[str, list[float]] = {}  # the latest of each stage
        self._is_deaf = False

    def change(self, policy: RouterPolicy) -> None:
        """Another policy was chosen; nothing is held against it."""
        self._policy = policy
        self._distrusted_until.clear()
        self._faults.clear()
        self._is_deaf = False

    def policy(self, stage: str, now: float) -> RouterPolicy:
        """Who answers for `stage`."""
        return BUILT_IN if now < self._distrusted_until.get(stage, now) else self._policy

    def fault(self, stage: str, now: float) -> None:
        """The guard has just seen `stage` fail."""
        if stage not in STAGES:
            return
        recent = [at for at in self._faults.get(stage, ()) if now - at < FAULTS_WITHIN_S]
        self._faults[stage] = recent = [*recent, now][-FAULTS_MAX:]
        is_final = len(recent) == FAULTS_MAX or self._distrusted_until.get(stage) == math.inf
        self._distrusted_until[stage] = math.inf if is_final else now + DISTRUST_S
        self._is_deaf = self._distrusted_until.get("learn") == math.inf

    def learn(self, event: Event) -> None:
        """The chosen policy learns, trusted or not, until learning itself has failed too often: its fault is an event,
        too, and would be failed at for ever."""
        if not self._is_deaf:
            self._policy.learn(event)
