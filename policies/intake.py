"""Who may tokenise now: a bounded queue per class and tenant in front of the CPU work that a client can cause for free.

Owns the places in flight and the queues. Never tokenises; most urgent class first, then the tenant with least in
flight, then age."""

from __future__ import annotations

import enum

from policies.limits import Limits
from policies.request import Request, RequestClass, RequestId

Lane = tuple[RequestClass, str]


class Place(enum.Enum):
    """What an offered request gets."""

    NOW = "now"
    QUEUED = "queued"
    NONE = "none"


class Intake:
    """Requests before they have tokens."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._running: dict[RequestId, Lane] = {}
        self._in_flight: dict[Lane, int] = {}  # lanes with somebody in flight
        self._queues: dict[Lane, dict[RequestId, None]] = {}  # lanes with somebody waiting, each oldest first

    def offer(self, request: Request, request_class: RequestClass) -> Place:
        """A place in flight if there is one and nobody of the lane waits; else in the queue, unless it is full."""
        lane = (request_class, request.tenant.id)
        if lane not in self._queues and self._has_place(lane):
            self._start(request.id, lane)
            return Place.NOW
        queue = self._queues.get(lane, {})
        if len(queue) >= self._limits.tokenise_queue_max:
            return Place.NONE
        self._queues[lane] = queue
        queue[request.id] = None
        return Place.QUEUED

    def leave(self, request: Request, request_class: RequestClass) -> None:
        """It has its tokens, or will never need them."""
        lane = self._running.pop(request.id, None)
        if lane is not None:
            self._in_flight[lane] -= 1
            if not self._in_flight[lane]:
                del self._in_flight[lane]
            return
        lane = (request_class, request.tenant.id)
        queue = self._queues.get(lane)
        if queue is not None:
            queue.pop(request.id, None)
            if not queue:
                del self._queues[lane]

    def start_next(self) -> RequestId | None:
        """Whoever may tokenise now that somebody left; None while nobody may."""
        open_lanes = [lane for lane in self._queues if self._has_place(lane)]
        if not open_lanes:
            return None
        lane = min(open_lanes, key=lambda lane: (lane[0], self._in_flight.get(lane, 0)))
        request_id = next(iter(self._queues[lane]))
        del self._queues[lane][request_id]
        if not self._queues[lane]:
            del self._queues[lane]
        self._start(request_id, lane)
        return request_id

    def _has_place(self, lane: Lane) -> bool:
        return (
            len(self._running) < self._limits.tokenising_max
            and self._in_flight.get(lane, 0) < self._limits.tokenising_per_tenant
        )

    def _start(self, request_id: RequestId, lane: Lane) -> None:
        self._running[request_id] = lane
        self._in_flight[lane] = self._in_flight.get(lane, 0) + 1
