"""Asks the heads of the waiting room again whenever something may have changed.

Owns how often and how many are asked, and who passes first. Never decides about a head: it is told whether it went."""

from __future__ import annotations

import math
from collections.abc import Callable

from policies.actions import Action
from policies.limits import Limits
from policies.ordering import WaitingRoom
from policies.request import RequestClass

# Who may pass first: classes that are owed their reserve, then all by urgency.
TURNS = (*((cls, True) for cls in RequestClass), *((cls, False) for cls in RequestClass))

TryHead = Callable[[str, RequestClass, float, list[Action]], bool]  # model, class, now: whether the head went


class Pump:
    """A head that stays keeps less urgent classes back."""

    def __init__(self, room: WaitingRoom, try_head: TryHead, limits: Limits) -> None:
        self._room, self._try_head, self._limits = room, try_head, limits
        self._after = -math.inf
        self.wanted_at = math.inf  # when it should run again by itself

    def run(self, now: float, actions: list[Action]) -> None:
        """Ask, at most `pump_max` heads and not more often than every `reexamine_s`."""
        self.wanted_at = math.inf
        if not len(self._room):
            return
        if now < self._after:
            self.wanted_at = self._after
            return
        self._after = now + self._limits.reexamine_s
        left = self._limits.pump_max
        for model in self._room.models():
            left = self._ask(model, left, now, actions)
        if left <= 0:
            self.wanted_at = self._after

    def _ask(self, model: str, left: int, now: float, actions: list[Action]) -> int:
        """First who is owed a reserve, as long as it is; then by class. Returns how many may still be asked."""
        for cls, is_owed in TURNS:
            while left > 0 and self._room.class_count(model, cls):
                if is_owed and not self._room.is_reserve_due(cls):
                    break
                left -= 1
                if not self._try_head(model, cls, now, actions):
                    if is_owed:
                        break
                    return left
        return left
