"""Asks the heads of the waiting room again whenever something may have changed.

Owns how often and how many are asked, and who passes first. Never decides about a head: it is told whether it went."""

from __future__ import annotations

import math
from collections.abc import Callable

from policies.actions import Action
from policies.limits import Limits
from policies.ordering import Waiting, WaitingRoom
from policies.request import RequestClass

# Who may pass first: classes that are owed their reserve, then all by urgency.
TURNS = (*((cls, True) for cls in RequestClass), *((cls, False) for cls in RequestClass))

TryHeld = Callable[[Waiting, float, list[Action]], bool]  # now: whether it went


class Pump:
    """A head that stays keeps less urgent classes back, but not those of its own class who fit where it does not."""

    def __init__(self, room: WaitingRoom, try_head: TryHeld, try_behind: TryHeld, limits: Limits) -> None:
        self._room, self._try_head, self._try_behind, self._limits = room, try_head, try_behind, limits
        self._after = self._behind_after = -math.inf
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
                head = self._room.head(model, cls, now)
                assert head is not None
                if not self._try_head(head, now, actions):
                    if is_owed:
                        break
                    self._look_behind(model, cls, now, actions)
                    return left
        return left

    def _look_behind(self, model: str, cls: RequestClass, now: float, actions: list[Action]) -> None:
        if now < self._behind_after:
            return
        self._behind_after = now + self._limits.pass_every_s
        for held in self._room.behind(model, cls, now, self._limits.pass_max):
            self._try_behind(held, now, actions)
