"""One request before all workers at once, as arrays over slots: for large fleets, and for rules that only count.

Owns the choice among many; policies/placement.py makes the same one among a few, worker by worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from policies import rendezvous
from policies.api import Bools, FleetView, Floats, Forecast, Job
from policies.formula import PASSING_MAX, Met, Weights, cost_s, forecast, let_pass, meet
from policies.request import RequestClass

# Hot: some 40 numpy calls of half a microsecond each, however many workers there are. bench/dispatcher.py.

FAR = 1e9  # seconds: dearer than any worker that may be chosen


class Scene(NamedTuple):
    """What `job` meets on each worker."""

    job: Job
    fleet: FleetView
    now: float
    weights: Weights
    serves: Bools
    met: Met[Floats]
    is_steady: Bools
    has_room: Bools

    @classmethod
    def of(cls, job: Job, fleet: FleetView, now: float, weights: Weights) -> Scene:
        """All figures but the cost, which nobody needs while a fleet is full."""
        prompt = job.prompt
        met = meet(job, fleet, fleet.hit_tokens(prompt.chain, job.request.model), np.maximum, np.minimum)
        if (silence_s := fleet.silence_s(now)) is not None:
            np.add(met.ttft_s, silence_s, out=met.ttft_s)  # a busy worker that says nothing may be stuck
        return cls(
            job=job,
            fleet=fleet,
            now=now,
            weights=weights,
            serves=fleet.serves(job.request.model, prompt.tokens, job.avoid),
            met=met,
            is_steady=met.used <= weights.pace_margin,
            has_room=fleet.room_tokens[int(job.request_class)] >= prompt.tokens + job.output.q80,
        )

    def choose(self, score: Floats) -> Sequence[Forecast]:
        """The worker with the smallest score, for policies that promise nothing: feasible whenever its KV fits."""
        if not np.count_nonzero(self.serves):
            return ()
        slot = int(np.where(self.serves, score, np.inf).argmin())
        return (self._forecast(slot, is_feasible=bool(self.has_room[slot])),)

    def best(self) -> Sequence[Forecast]:
        """Feasible first, by cost; else soonest."""
        job, fleet, weights = self.job, self.fleet, self.weights
        sure_s, sure = self.met.ttft_s * fleet.q90, weights.sure[job.request_class]
        if sure != 1.0:
            sure_s = self.met.ttft_s * fleet.q90**sure
        able = self.is_steady & self.has_room & self.serves
        feasible = (sure_s <= job.first_left_s(self.now)) & able
        asked = able if job.request_class == RequestClass.CHATBOT else feasible
        if np.count_nonzero(asked):
            score = np.where(asked, cost_s(job, fleet, self.met, weights, np.maximum), FAR)
            slot = int(score.argmin())
            if not feasible[slot]:
                if passing := self._passing(score, feasible):
                    return passing
                slot = int(np.where(feasible, score, FAR).argmin())
            if feasible[slot]:
                near = (feasible & (score <= score[slot] * (1.0 + weights.near))).nonzero()[0]
                return (self._forecast(slot if len(near) == 1 else self._own(near), is_feasible=True),)
        # One that has no room would keep it waiting while another could begin.
        able = able if np.count_nonzero(able) else self.serves
        slot = int(np.where(able, self.met.ttft_s, np.inf).argmin())
        return (self._forecast(slot, is_feasible=False),) if self.serves[slot] else ()

    def _passing(self, score: Floats, feasible: Bools) -> Sequence[Forecast]:
        """The cheapest worker where a chat prompt is in time, since longer ones there let it go first."""
        for slot in score.argsort(kind="stable")[:PASSING_MAX].tolist():
            if score[slot] >= FAR or feasible[slot]:
                break
            ahead_s, ttft_s = let_pass(self.job, self.fleet, slot, self._at(slot), self.now)
            self.met.ttft_s[slot] = ttft_s
            if ttft_s * float(self.fleet.q90[slot]) <= self.job.first_left_s(self.now):
                return (self._forecast(slot, is_feasible=True, ahead_s=ahead_s),)
        return ()

    def _own(self, slots: npt.NDArray[np.intp]) -> int:
        """The session's own of these."""
        hashes = rendezvous.weights(self.fleet.worker[slots], rendezvous.seed_of(self.job.request))
        return int(slots[int(hashes.argmax())])

    def _at(self, slot: int) -> Met[float]:
        return Met._make([figures.item(slot) for figures in self.met])

    def _forecast(self, slot: int, *, is_feasible: bool, ahead_s: float | None = None) -> Forecast:
        view, met = self.fleet.view(slot), self._at(slot)
        return forecast(self.job, view, met, self.now, self.weights, is_feasible=is_feasible, ahead_s=ahead_s)
