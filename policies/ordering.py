"""The waiting room: who is next, by class, fair share and least laxity.

Owns every held request and the tenants' accounts. Keys do not change with time, so only heads are ever re-examined;
it never decides whether the head may go."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from policies.api import Job, Key, Order
from policies.limits import Limits
from policies.request import RequestClass, RequestId
from policies.reservations import Reservations

# Hot: once per examined head; 10,000 may wait. bench/dispatcher.py.

CLASSES = tuple(RequestClass)
RESERVED, ON_TIME, LATE = -1, 0, 1  # tiers: who was told to come back, who can still make it, who cannot
AGING = 4.0  # a late request yields to one that is shorter by x seconds only if it is older by less than 4x


def least_laxity(job: Job, work_s: float, now: float) -> tuple[Key, float]:
    """Latest start first. Who cannot start in time any more is late: shortest first, with aging, until half its
    patience is gone; from then on first come, first served, before all others."""
    arrived, promise = job.request.arrived, job.promise
    latest_start = arrived + min(promise.budget.ttft_s, promise.budget.deadline_s) - work_s
    if now < latest_start:
        return (ON_TIME, latest_start), latest_start
    promoted_at = arrived + max(promise.budget.ttft_s, promise.patience_s / 2)
    if now < promoted_at:
        return (LATE, arrived + AGING * work_s), promoted_at
    return (ON_TIME, arrived), math.inf


@dataclass(slots=True, eq=False)
class Waiting:
    """A held request. `work_s`: GPU-seconds of prompt and answer, as predicted when it came."""

    job: Job
    work_s: float
    key: Key
    valid_until: float
    is_waiting: bool = True


Slot = tuple[Key, int, Waiting]  # the number breaks ties by age and keeps jobs from being compared


@dataclass(slots=True)
class Lane:
    """One class of one model: a heap per tenant."""

    heaps: dict[str, list[Slot]] = field(default_factory=dict)
    by_age: deque[Waiting] = field(default_factory=deque)
    count: int = 0
    reserved: int = 0  # of whom so many were told to come back
    work_s: float = 0.0
    stale: int = 0  # entries in heaps that do not wait any more


class Accounts:
    """GPU-seconds of uncached work that each tenant was given, by weight. Who comes back from idleness starts where
    the least served is: nobody saves up."""

    def __init__(self, tenants_max: int) -> None:
        self._tenants_max = tenants_max
        self._given_s: dict[str, float] = {}
        self._floor_s = 0.0

    def given_s(self, tenant: str) -> float:
        """What `tenant` had, never less than the floor."""
        return max(self._floor_s, self._given_s.get(tenant, 0.0))

    def is_fair(self, tenant: str, quantum_s: float) -> bool:
        """Whether `tenant` had no more than a quantum above the least served of those who waited last."""
        return self.given_s(tenant) <= self._floor_s + quantum_s

    def raise_floor(self, least_s: float) -> None:
        """The least served of those who wait had so much."""
        self._floor_s = max(self._floor_s, least_s)

    def charge(self, tenant: str, seconds: float) -> None:
        """`seconds` are by weight already; a correction may be negative."""
        had_s = self.given_s(tenant)
        self._given_s.pop(tenant, None)
        self._given_s[tenant] = had_s + seconds
        while len(self._given_s) > self._tenants_max:
            del self._given_s[next(iter(self._given_s))]


class WaitingRoom:
    """All held requests of all models."""

    def __init__(self, order: Order, limits: Limits) -> None:
        self._order = order
        self._limits = limits
        self._lanes: dict[tuple[str, RequestClass], Lane] = {}
        self._by_id: dict[RequestId, Waiting] = {}
        self._pushed = 0
        self._class_s = [0.0, 0.0, 0.0]  # given to each class, fading: for the reserve
        self.accounts = Accounts(limits.tenants_max)
        self.reservations = Reservations(limits)

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._by_id

    def models(self) -> list[str]:
        """Models that somebody waits for, in the order of their first request."""
        return list(dict.fromkeys(model for (model, _), lane in self._lanes.items() if lane.count))

    def push(self, job: Job, work_s: float, now: float) -> None:
        """Hold a request."""
        key, valid_until = self._key(job, work_s, now)
        entry = Waiting(job, work_s, key, valid_until)
        lane = self._lanes.setdefault((job.request.model, job.request_class), Lane())
        heapq.heappush(lane.heaps.setdefault(job.request.tenant.id, []), (key, self._number(), entry))
        self._by_id[job.request.id] = entry
        lane.by_age.append(entry)
        lane.count += 1
        lane.reserved += job.is_reserved
        lane.work_s += work_s

    def remove(self, request_id: RequestId) -> Waiting:
        """It goes to a worker, or leaves."""
        entry = self._by_id.pop(request_id)
        entry.is_waiting = False
        lane = self._lanes[entry.job.request.model, entry.job.request_class]
        lane.count -= 1
        lane.reserved -= entry.job.is_reserved
        lane.work_s = lane.work_s - entry.work_s if lane.count else 0.0
        lane.stale += 1
        if lane.stale > lane.count + 64:
            self._sweep(lane)
        return entry

    def head(self, model: str, request_class: RequestClass, now: float) -> Waiting | None:
        """Who is next in this lane: the most urgent head of the tenants that had least."""
        lane = self._lanes.get((model, request_class))
        if lane is None or not lane.count:
            return None
        return min(slot for _, slot in self._fair_heads(lane, now))[2]

    def behind(self, model: str, request_class: RequestClass, now: float, most: int) -> list[Waiting]:
        """The next after the head, at most `most`, of the same tenants. Their keys may be out of date."""
        lane = self._lanes.get((model, request_class))
        if lane is None or lane.count < 2:
            return []
        found = [entry for entry, _ in zip(_in_order(self._fair_heads(lane, now)), range(most + 1), strict=False)]
        return found[1:]

    def oldest(self, model: str, request_class: RequestClass) -> Job | None:
        """Who waits longest in this lane, by when it was held."""
        lane = self._lanes.get((model, request_class))
        if lane is None or not lane.count:
            return None
        while not lane.by_age[0].is_waiting:
            lane.by_age.popleft()
        return lane.by_age[0].job

    def _fair_heads(self, lane: Lane, now: float) -> list[tuple[list[Slot], Slot]]:
        """Heap and head of each tenant that had little enough to be next, or is owed a place that was kept."""
        heads = [(tenant, slot) for tenant, heap in lane.heaps.items() if (slot := self._top(lane, heap, now))]
        if len(heads) < len(lane.heaps):
            lane.heaps = {tenant: lane.heaps[tenant] for tenant, _ in heads}
        least_s = min(self.accounts.given_s(tenant) for tenant, _ in heads)
        self.accounts.raise_floor(least_s)
        near_s = least_s + self._limits.fair_quantum_s
        return [
            (lane.heaps[tenant], slot)
            for tenant, slot in heads
            if slot[0][0] == RESERVED or self.accounts.given_s(tenant) <= near_s
        ]

    def is_anyone_before(self, model: str, request_class: RequestClass, *, is_reserved: bool = False) -> bool:
        """Whether somebody of this class waits for `model`, or somebody more urgent while the class's own reserve is
        spent. Of its own class only others like it are before one who was told to come back."""
        if not self._by_id:
            return False
        lane = self._lanes.get((model, request_class))
        alike = lane.count if lane is not None else 0
        if lane is not None and (lane.reserved if is_reserved else alike):
            return True
        return self.count(model, request_class) > alike and not self.is_reserve_due(request_class)

    def count(self, model: str, request_class: RequestClass) -> int:
        """How many wait for `model`, of this class and of more urgent ones."""
        return sum(lane.count for lane in self._lanes_before(model, request_class))

    def work_s(self, model: str, request_class: RequestClass) -> float:
        """GPU-seconds that wait for `model`, of this class and of more urgent ones."""
        return sum(lane.work_s for lane in self._lanes_before(model, request_class))

    def class_count(self, model: str, request_class: RequestClass) -> int:
        """How many wait for `model` in this class alone."""
        lane = self._lanes.get((model, request_class))
        return lane.count if lane is not None else 0

    def class_work_s(self, model: str, request_class: RequestClass) -> float:
        """GPU-seconds that wait for `model` in this class alone."""
        lane = self._lanes.get((model, request_class))
        return lane.work_s if lane is not None else 0.0

    def _lanes_before(self, model: str, request_class: RequestClass) -> list[Lane]:
        return [lane for cls in CLASSES[: request_class + 1] if (lane := self._lanes.get((model, cls)))]

    def is_reserve_due(self, request_class: RequestClass) -> bool:
        """Whether the class had less than its reserved share of late: then it may pass more urgent ones."""
        return self._class_s[request_class] < self._limits.reserve[request_class] * sum(self._class_s)

    def given(self, job: Job, seconds: float) -> None:
        """A request was placed, or its cost corrected: book it to its tenant and class."""
        self.accounts.charge(job.request.tenant.id, seconds / max(job.request.tenant.weight, 1e-6))
        self._class_s[job.request_class] = max(0.0, self._class_s[job.request_class] + seconds)
        if sum(self._class_s) > 100.0:  # GPU-seconds: old shares fade by half
            self._class_s = [given_s / 2 for given_s in self._class_s]

    def _top(self, lane: Lane, heap: list[Slot], now: float) -> Slot | None:
        """The tenant's head with a key that holds now."""
        while heap:
            _, number, entry = heap[0]
            if not entry.is_waiting:
                heapq.heappop(heap)
                lane.stale -= 1
            elif entry.valid_until <= now:
                key, valid_until = self._key(entry.job, entry.work_s, now)
                # A key that holds no longer than now would be asked for ever.
                entry.key, entry.valid_until = key, valid_until if valid_until > now else math.inf
                heapq.heapreplace(heap, (entry.key, number, entry))
            else:
                return heap[0]
        return None

    def _key(self, job: Job, work_s: float, now: float) -> tuple[Key, float]:
        return ((RESERVED, job.request.arrived), math.inf) if job.is_reserved else self._order(job, work_s, now)

    def _sweep(self, lane: Lane) -> None:
        for tenant in list(lane.heaps):
            kept = [slot for slot in lane.heaps[tenant] if slot[2].is_waiting]
            heapq.heapify(kept)
            lane.heaps[tenant] = kept
            if not kept:
                del lane.heaps[tenant]
        lane.by_age = deque(entry for entry in lane.by_age if entry.is_waiting)
        lane.stale = 0

    def _number(self) -> int:
        self._pushed += 1
        return self._pushed


def _in_order(heads: list[tuple[list[Slot], Slot]]) -> Iterator[Waiting]:
    """Who waits in these heaps, smallest key first; heaps are trees, so only the next ones are looked at."""
    ahead = [(slot, 0, heap) for heap, slot in heads]
    heapq.heapify(ahead)
    while ahead:
        (_, _, entry), at, heap = heapq.heappop(ahead)
        for child in (2 * at + 1, 2 * at + 2):
            if child < len(heap):
                heapq.heappush(ahead, (heap[child], child, heap))
        if entry.is_waiting:
            yield entry
