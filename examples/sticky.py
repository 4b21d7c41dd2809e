"""Sessions stay where they began, as long as that worker can keep the promise.

Owns where sessions were placed, bounded, and learns it from events alone: the one place where a policy may change
something. Headway's own placement decides for everybody else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from policies.api import FleetView, Forecast, Job, RouterPolicy
from policies.builtin import headway
from policies.events import Event, Offered, WorkerLost, WorkerReport
from policies.request import RequestId, WorkerId

SESSIONS_MAX = 10_000


@dataclass(slots=True)
class Homes:
    """Which worker answered a session last."""

    worker: dict[str, WorkerId] = field(default_factory=dict)
    _asked: dict[RequestId, str] = field(default_factory=dict)

    def learn(self, event: Event) -> None:
        if isinstance(event, Offered) and event.request.session:
            _put(self._asked, event.request.id, event.request.session)
        elif isinstance(event, WorkerReport):
            for request_id, _ in event.first_tokens:
                if session := self._asked.pop(request_id, ""):
                    _put(self.worker, session, event.worker)
        elif isinstance(event, WorkerLost):
            self.worker = {session: home for session, home in self.worker.items() if home != event.worker}


def sticky(params: Mapping[str, Any]) -> RouterPolicy:
    """Parameters are Headway's."""
    ours, homes = headway(params), Homes()

    def place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        best = ours.place(job, fleet, now)
        home = homes.worker.get(job.request.session)
        if not best or home is None or best[0].worker == home or home == job.avoid:
            return best
        there = ours.place(job, _Only(fleet, home), now)
        return there if there and there[0].is_feasible else best

    return replace(ours, place=place, learn=homes.learn)


class _Only:
    """A fleet of which one worker serves."""

    def __init__(self, fleet: FleetView, worker: WorkerId) -> None:
        self._fleet = fleet
        self._only = worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fleet, name)

    def serves(self, model: str, tokens: int, avoid: WorkerId | None) -> Any:
        return self._fleet.serves(model, tokens, avoid) & (self._fleet.worker == self._only)


def _put(book: dict[Any, Any], key: Any, value: Any) -> None:
    book.pop(key, None)
    book[key] = value
    while len(book) > SESSIONS_MAX:
        del book[next(iter(book))]
