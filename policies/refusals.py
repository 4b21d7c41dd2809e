"""The honest no: what a refused client is told, when to come back, and whether room is kept until then.

Owns how a refusal is answered. Never decides who is refused; draws chance only to spread returns."""

from __future__ import annotations

import numpy as np

from policies.actions import Reject
from policies.admission import QueueFlow, retry_after_s, room_is_full
from policies.api import Refuse
from policies.limits import Limits
from policies.lives import Live
from policies.ordering import WaitingRoom
from policies.worker import Fleet


class Refusals:
    """Looks at the waiting room and the fleet; keeps its promises in the room's reservations."""

    def __init__(self, limits: Limits, room: WaitingRoom, fleet: Fleet, rng: np.random.Generator) -> None:
        self._limits, self._room, self._fleet, self._rng = limits, room, fleet, rng

    def drain_s(self, live: Live) -> float:
        """Seconds until what waits of its class, and of more urgent ones, is done."""
        flow = QueueFlow(self._limits, self._room, self._fleet, is_next=False)
        return flow.drain_s(live.request.model, live.classified.request_class)

    def at_door(self, live: Live, live_count: int, now: float, *, is_continuing: bool) -> Refuse | None:
        """No, before anything costly is done."""
        if live_count >= self._limits.requests_max:
            return Refuse(503, "too-many-requests", "The server holds as many requests as it can.", 1.0)
        model, cls = live.request.model, live.classified.request_class
        # An outage is expected to last as long again as it has: who will have left by then is told now.
        if (away_s := self._fleet.away_s(model, now)) > live.leaves_at - now:
            return Refuse(503, "no-worker", f"No worker of this model has answered for {away_s:.0f} s.", away_s)
        flow = QueueFlow(self._limits, self._room, self._fleet, is_next=False)
        if not (live.is_reserved or flow.has_space_for(model, cls, 0.0, is_known=is_continuing)):
            return room_is_full(flow.drain_s(model, cls))
        return None

    def answer(self, live: Live, refusal: Refuse, now: float) -> Reject:
        """What its client is told."""
        after_s, is_reserved = None, False
        if refusal.start_s is not None:
            start_s = refusal.start_s + self._told_s(live)
            after_s = retry_after_s(start_s, float(self._rng.random()), self._limits)
            is_reserved = self._reserve(live, now + after_s)
        # Flex without room is the tenant's own bargain; its clients expect 429.
        is_flex = refusal.status == 503 and live.request.facts.service_tier == "flex"
        return Reject(
            request_id=live.request.id,
            request_class=live.classified.request_class,
            status=429 if is_flex else refusal.status,
            reason=refusal.reason,
            message=refusal.message,
            retry_after_s=after_s,
            is_reserved=is_reserved,
        )

    def _told_s(self, live: Live) -> float:
        """Seconds for those who were told to come back before: who is refused now comes behind them."""
        model, cls = live.request.model, live.classified.request_class
        return self._room.reservations.told_s((model, cls)) / max(1, self._fleet.count(model))

    def _reserve(self, live: Live, opens_at: float) -> bool:
        """Keep room for who comes back then."""
        request, job, cls = live.request, live.job, live.classified.request_class
        profile = self._fleet.profile(request.model)
        if profile is None:
            return False
        if job is None:
            work_s = profile.request_s(request.estimated_tokens, 0, 0)
        else:
            cached = job.prompt.tokens - job.prompt.new_tokens
            work_s = profile.request_s(job.prompt.tokens, cached, int(job.output.mean))
        room_s = self._limits.room_s[cls] * max(1, self._fleet.count(request.model))
        return self._room.reservations.make(request, (request.model, cls), work_s, opens_at, room_s)
