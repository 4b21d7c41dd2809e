"""Room kept for clients who were refused and come back when they were told to: by tenant and session, for ten seconds.

Owns every reservation until it is claimed, moved or missed. No client echoes anything, and nobody holds two: who is
refused again holds the last one only."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

from policies.limits import Limits
from policies.request import Request, RequestClass

Lane = tuple[str, RequestClass]  # model, class
Key = tuple[str, str]  # tenant, session or what the body hashes to
K = TypeVar("K", bound=Hashable)

EMPTY_S = 1e-9  # what rounding leaves of a sum whose parts have all gone


@dataclass(slots=True, eq=False)
class Reservation:
    """So many GPU-seconds of a lane's waiting room, once it is open."""

    key: Key
    lane: Lane
    work_s: float
    opens_at: float
    is_open: bool = False


@dataclass(slots=True)
class Counts:
    """How many were made, and how they ended."""

    made: int = 0
    kept: int = 0  # claimed in their time
    early: int = 0  # their client got in as a newcomer before it
    moved: int = 0  # their client was refused again
    missed: int = 0  # nobody came


class Reservations:
    """What of each lane's room is not for newcomers."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[Key, Reservation] = {}
        self._told_s: dict[Lane, float] = {}
        self._open_s: dict[Lane, float] = {}
        self._tenant_s: dict[tuple[str, Lane], float] = {}
        self._turns: list[tuple[float, int, Reservation]] = []  # when each opens, later when it closes
        self._pushed = 0
        self.due_at = math.inf  # nothing is to be opened or closed before
        self.counts = Counts()

    def __len__(self) -> int:
        return len(self._held)

    def told_s(self, lane: Lane) -> float:
        """GPU-seconds with which clients were told to come back."""
        return self._told_s.get(lane, 0.0)

    def open_s(self, lane: Lane) -> float:
        """GPU-seconds that newcomers may not take now."""
        return self._open_s.get(lane, 0.0)

    def make(self, request: Request, lane: Lane, work_s: float, opens_at: float, room_s: float) -> bool:
        """Keep room for a refused client, unless its tenant then held more than its share of the room."""
        key = _key(request)
        if held := self._held.get(key):
            self._drop(held)
            self.counts.moved += 1
        tenant_s = self._tenant_s.get((key[0], lane), 0.0) + work_s
        is_too_much = tenant_s > self._limits.reservation_share * room_s
        if not key[1] or is_too_much or len(self._held) >= self._limits.reservations_max:
            return False
        self._held[key] = made = Reservation(key, lane, work_s, opens_at)
        self._told_s[lane] = self.told_s(lane) + work_s
        self._tenant_s[key[0], lane] = tenant_s
        self.counts.made += 1
        self._turn_at(opens_at, made)
        return True

    def claim(self, request: Request, request_class: RequestClass, now: float) -> bool:
        """Whether room is kept for this one now; then it is its own to use."""
        held = self._held.get(_key(request)) if self._held else None
        if held is None or now < held.opens_at or held.lane != (request.model, request_class):
            return False
        self._drop(held)
        self.counts.kept += 1
        return True

    def served(self, request: Request) -> None:
        """A worker has it: what was kept for later is not needed."""
        if self._held and (held := self._held.get(_key(request))):
            self._drop(held)
            self.counts.early += 1

    def advance(self, now: float) -> None:
        """Open and close what is due."""
        while self._turns and self._turns[0][0] <= now:
            _, _, due = heapq.heappop(self._turns)
            if self._held.get(due.key) is not due:
                continue
            if due.is_open:
                self._drop(due)
                self.counts.missed += 1
            else:
                due.is_open = True
                self._open_s[due.lane] = self.open_s(due.lane) + due.work_s
                self._turn_at(due.opens_at + self._limits.reservation_s, due)
        self.due_at = self._turns[0][0] if self._turns else math.inf

    def _turn_at(self, at: float, made: Reservation) -> None:
        """One entry each. Those that were claimed are swept once they are the majority."""
        self._pushed += 1
        heapq.heappush(self._turns, (at, self._pushed, made))
        if len(self._turns) > 2 * len(self._held) + 64:
            self._turns = [turn for turn in self._turns if self._held.get(turn[2].key) is turn[2]]
            heapq.heapify(self._turns)
        self.due_at = self._turns[0][0]

    def _drop(self, held: Reservation) -> None:
        del self._held[held.key]
        _take(self._told_s, held.lane, held.work_s)
        _take(self._tenant_s, (held.key[0], held.lane), held.work_s)
        if held.is_open:
            _take(self._open_s, held.lane, held.work_s)


def _key(request: Request) -> Key:
    """A session, or the very same body again."""
    return request.tenant.id, request.session or (f"#{request.body_hash:x}" if request.body_hash else "")


def _take(sums: dict[K, float], key: K, seconds: float) -> None:
    left_s = sums.get(key, 0.0) - seconds
    if left_s > EMPTY_S:
        sums[key] = left_s
    else:
        sums.pop(key, None)
