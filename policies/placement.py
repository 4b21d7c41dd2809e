"""Where a request would run best: a forecast in seconds for every worker at once, feasible first, then cheapest.

Owns the formula and its few factors. Never books anything: the dispatcher does, for the worker it takes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from policies.api import Bools, FleetView, Floats, Forecast, Job, Place
from policies.request import RequestClass, WorkerId

# Hot: once per decision over all workers. Budget 50 us a decision at 64 workers; bench/dispatcher.py.

Z90 = 1.2816
MIN_SHARE = 0.15  # of each step is left for prefill however many decode: the step planner sees to it
PASSING_MAX = 4  # workers that are looked at again, cheapest first, where a prompt would be late behind all others
FAR = 1e9  # seconds: dearer than any feasible worker
GOLDEN, ODD = -0x61C8864680B583EB, -0x40A7B892E31B1A47  # multipliers of splitmix64, as signed 64-bit numbers


@dataclass(frozen=True, slots=True)
class Weights:
    """The factors of the cost, all start values."""

    spread: tuple[float, float, float] = (0.15, 0.02, 0.0)  # price of a second of TTFT: 0 packs onto cache holders
    sure: tuple[float, float, float] = (1.0, 0.41, 0.0)  # in units of log q90: P >= 0.9, 0.7, 0.5 of being in time
    pace_margin: float = 0.9  # of the tightest TPOT
    reuse: float = 0.5  # probability that a displaced block would have been asked for again
    near: float = 0.05  # costs within 5 % are equal: the session's own hash chooses, alike in every router


def budget_place(weights: Weights = Weights()) -> Place:
    """Placement by remaining budget; LMetric while a worker has not measured its own step model."""

    def place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        if not fleet.is_calibrated:
            return lmetric_place(job, fleet, now)
        return Scene.of(job, fleet, now, weights).best(job, fleet, now, weights) if len(fleet.worker) else ()

    return place


def lmetric_place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
    """(uncached tokens queued and own) x (batch size): no unit, no knob, no model (arXiv 2603.15202)."""
    scene = Scene.of(job, fleet, now, Weights())
    score = (fleet.waiting_tokens + scene.uncached) * (fleet.streams + 1.0)
    return choose(scene, score, job, fleet, now)


def choose(scene: Scene, score: Floats, job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
    """The worker with the smallest score, for policies that promise nothing: feasible whenever its KV fits."""
    if not scene.serves.any():
        return ()
    slot = int(np.where(scene.serves, score, np.inf).argmin())
    return (scene.forecast(slot, job, fleet, now, is_feasible=bool(scene.has_room[slot])),)


class Scene(NamedTuple):
    """One job before all workers: arrays over slots."""

    serves: Bools
    hit: Floats
    uncached: Floats
    own_s: Floats
    context_s: Floats
    ttft_s: Floats
    share: Floats
    step_s: Floats
    is_steady: Bools
    has_room: Bools

    @classmethod
    def of(cls, job: Job, fleet: FleetView, now: float, weights: Weights) -> Scene:
        """What `job` would meet on each worker."""
        number, prompt, tokens = job.request_class, job.prompt, float(job.prompt.tokens)
        hit = np.minimum(fleet.hit_tokens(prompt.chain, job.request.model), tokens - 1.0)
        uncached = tokens - hit
        own_s = uncached * (fleet.row_s + fleet.chunk_context_s * (tokens - 0.5 * uncached))
        context_s = fleet.decode_context_s * tokens  # what each step pays for attending to this prompt
        step_s = fleet.step_s[number] + context_s
        pace_s = np.minimum(fleet.pace_s[number], job.promise.budget.tpot_s)
        used = step_s / pace_s
        share = np.maximum(1.0 - used, MIN_SHARE)
        ttft_s = fleet.residual * ((fleet.ahead_s[number] + own_s) / share + step_s)
        if (silence_s := fleet.silence_s(now)) is not None:
            ttft_s += silence_s  # a busy worker that says nothing may be stuck
        return cls(
            serves=fleet.serves(job.request.model, prompt.tokens, job.avoid),
            hit=hit,
            uncached=uncached,
            own_s=own_s,
            context_s=context_s,
            ttft_s=ttft_s,
            share=share,
            step_s=step_s,
            is_steady=used <= weights.pace_margin,
            has_room=fleet.room_tokens[number] >= tokens + job.output.q80,
        )

    def best(self, job: Job, fleet: FleetView, now: float, weights: Weights) -> Sequence[Forecast]:
        """Feasible first, by cost; else soonest."""
        number = job.request_class
        sure_s = (
            self.ttft_s * fleet.q90 if weights.sure[number] == 1.0 else self.ttft_s * fleet.q90 ** weights.sure[number]
        )
        able = self.is_steady & self.has_room & self.serves
        feasible = (sure_s <= job.first_left_s(now)) & able
        # A head that is asked again mostly finds nobody: then no cost is needed.
        if np.count_nonzero(able if number == RequestClass.CHATBOT else feasible):
            score = self._cost_s(job, fleet, weights)
            score[~able] = FAR
            slot = int(score.argmin())
            if not feasible[slot] and (passing := self._passing(score, feasible, job, fleet, now)):
                return passing
            score[~feasible] = FAR
            slot = int(score.argmin())
        if np.count_nonzero(feasible):
            near = (score <= score[slot] * (1.0 + weights.near)).nonzero()[0]
            chosen = slot if len(near) == 1 else _rendezvous(job, fleet.worker[near], near)
            return (self.forecast(chosen, job, fleet, now, is_feasible=True),)
        # One that has no room would keep it waiting while another could begin.
        slot = int(np.where(able if able.any() else self.serves, self.ttft_s, np.inf).argmin())
        return (self.forecast(slot, job, fleet, now, is_feasible=False),) if self.serves[slot] else ()

    def _passing(
        self, score: Floats, feasible: Bools, job: Job, fleet: FleetView, now: float
    ) -> Sequence[Forecast] | None:
        """The cheapest worker where a chat prompt is in time, since longer ones there let it go first."""
        if job.request_class != RequestClass.CHATBOT:
            return None
        for slot in score.argsort(kind="stable")[:PASSING_MAX].tolist():
            if score[slot] >= FAR or feasible[slot]:
                return None
            # As if it had just come: what it has waited does not choose who is before it, only whether it is in time.
            ahead_s = fleet.ahead_of(slot, now + job.promise.budget.ttft_s - float(self.own_s[slot]), now)
            after_s = float(fleet.ahead_s[RequestClass.CHATBOT, slot]) - ahead_s
            self.ttft_s[slot] -= fleet.residual[slot] * after_s / self.share[slot]
            if self.ttft_s[slot] * fleet.q90[slot] <= job.first_left_s(now):
                return (self.forecast(slot, job, fleet, now, is_feasible=True, ahead_s=ahead_s),)
        return None

    def _cost_s(self, job: Job, fleet: FleetView, weights: Weights) -> Floats:
        """GPU seconds of prompt and answer, what computing again the displaced cache will cost, and mild spreading."""
        output = job.output.mean
        displaced = np.maximum(self.uncached + (output - fleet.free_tokens), 0.0)
        displaced *= fleet.row_s
        displaced *= weights.reuse
        displaced += self.own_s
        displaced += output * (fleet.sequence_s + self.context_s)
        if spread := weights.spread[job.request_class]:
            displaced += spread * (self.ttft_s + output * self.step_s)
        return displaced

    def forecast(
        self, slot: int, job: Job, fleet: FleetView, now: float, *, is_feasible: bool, ahead_s: float | None = None
    ) -> Forecast:
        """The figures of one slot, as plain numbers."""
        own_s, ttft_s = float(self.own_s[slot]), float(self.ttft_s[slot])
        answer_s = job.output.mean * float(fleet.sequence_s[slot] + self.context_s[slot])
        return Forecast(
            worker=WorkerId(int(fleet.worker[slot])),
            hit_tokens=int(self.hit[slot]),
            own_s=own_s,
            ahead_s=float(fleet.ahead_s[int(job.request_class), slot]) if ahead_s is None else ahead_s,
            ttft_s=ttft_s,
            tpot_s=float(self.step_s[slot]),
            cost_s=own_s + answer_s,
            probability=in_time(ttft_s, float(fleet.q90[slot]), job.first_left_s(now)),
            is_feasible=is_feasible,
            is_steady=bool(self.is_steady[slot]),
            is_alone=not fleet.streams[slot],
            has_room=bool(self.has_room[slot]),
            staged=int(fleet.staged[slot]),
        )


def in_time(predicted_s: float, q90: float, left_s: float) -> float:
    """P(duration <= left) for a lognormal with this median and this 90th percentile of actual / predicted."""
    if left_s <= 0.0:
        return 0.0
    if math.isinf(left_s):
        return 1.0
    sigma = math.log(max(q90, 1.001)) / Z90
    return 0.5 * math.erfc(-math.log(left_s / max(predicted_s, 1e-9)) / (sigma * math.sqrt(2.0)))


def _rendezvous(job: Job, workers: npt.NDArray[np.int64], slots: npt.NDArray[np.intp]) -> int:
    """Highest hash of (session, worker): spreads, yet sends a session to the same place from every router."""
    mixed = workers + 1  # 64-bit integers wrap around; int64 saves the cast to unsigned
    mixed *= GOLDEN
    mixed ^= zlib.crc32((job.request.session or job.request.id).encode())
    mixed ^= mixed >> 29
    mixed *= ODD
    return int(slots[int(mixed.argmax())])
