"""Where a request would run best: a forecast in seconds for every worker, feasible first, then cheapest.

Owns the choice among a few workers, one by one; among many policies/scene.py makes the same one by arrays. Never books
anything: the dispatcher does, for the worker it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from policies import rendezvous
from policies.api import FleetView, Forecast, Job, Place, WorkerView
from policies.formula import PASSING_MAX, Met, Weights, cost_s, forecast, has_room, let_pass, meet
from policies.request import RequestClass
from policies.scene import Scene

# Hot: once a decision; bench/dispatcher.py.

FEW = 4  # workers up to which one by one is quicker: numpy takes as long for one as for a hundred
DEFAULTS = Weights()


def budget_place(weights: Weights = DEFAULTS) -> Place:
    """Placement by remaining budget; LMetric while a worker has not measured its own step model."""

    def place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        if not fleet.is_calibrated:
            return lmetric_place(job, fleet, now)
        if len(fleet.worker) > FEW:
            return Scene.of(job, fleet, now, weights).best()
        return _best(job, fleet, now, weights)

    return place


def lmetric_place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
    """(uncached tokens queued and own) x (batch size): no unit, no knob, no model (arXiv 2603.15202)."""
    scene = Scene.of(job, fleet, now, DEFAULTS)
    return scene.choose((fleet.waiting_tokens + scene.met.uncached) * (fleet.streams + 1.0))


@dataclass(slots=True, eq=False)
class Look:
    """What a job meets on one worker."""

    slot: int
    view: WorkerView
    met: Met[float]
    is_able: bool  # residents keep their pace, and KV fits
    is_feasible: bool  # in time as well
    cost_s: float = 0.0  # of who may be chosen


COST = attrgetter("cost_s")


def _best(job: Job, fleet: FleetView, now: float, weights: Weights) -> Sequence[Forecast]:
    """Feasible first, by cost; else soonest."""
    looks = _looks(job, fleet, now, weights)
    asked = _asked(job, looks, weights)
    for look in asked[:PASSING_MAX]:
        if look.is_feasible:
            break
        ahead_s, ttft_s = let_pass(job, fleet, look.slot, look.met, now)
        look.met = look.met._replace(ttft_s=ttft_s)
        if ttft_s * look.view.q90 <= job.first_left_s(now):
            return (forecast(job, look.view, look.met, now, weights, is_feasible=True, ahead_s=ahead_s),)
    if found := _feasible(job, asked, now, weights):
        return found
    if not looks:
        return ()
    # One that has no room would keep it waiting while another could begin.
    soonest = min([look for look in looks if look.is_able] or looks, key=lambda look: look.met.ttft_s)
    return (forecast(job, soonest.view, soonest.met, now, weights, is_feasible=False),)


def _looks(job: Job, fleet: FleetView, now: float, weights: Weights) -> list[Look]:
    """Whoever serves the job's model, by slot."""
    model, left_s, sure = job.request.model, job.first_left_s(now), weights.sure[job.request_class]
    serves = fleet.serves(model, job.prompt.tokens, job.avoid).tolist()
    hits = fleet.hit_tokens(job.prompt.chain, model).tolist()
    silence = fleet.silence_s(now)
    looks = []
    for slot, is_serving in enumerate(serves):
        if is_serving:
            view = fleet.view(slot)
            met = meet(job, view, hits[slot], max, min)
            if silence is not None:
                met = met._replace(ttft_s=met.ttft_s + float(silence[slot]))
            is_able = met.used <= weights.pace_margin and has_room(job, view)
            is_feasible = is_able and met.ttft_s * view.q90**sure <= left_s
            looks.append(Look(slot, view, met, is_able, is_feasible))
    return looks


def _asked(job: Job, looks: list[Look], weights: Weights) -> list[Look]:
    """Who may be chosen, cheapest first. Where it is not feasible only a chat prompt may go: past longer ones that let
    it."""
    is_chat = job.request_class == RequestClass.CHATBOT
    asked = [look for look in looks if look.is_feasible or (is_chat and look.is_able)]
    for look in asked:
        look.cost_s = cost_s(job, look.view, look.met, weights, max)
    asked.sort(key=COST)
    return asked


def _feasible(job: Job, asked: list[Look], now: float, weights: Weights) -> Sequence[Forecast]:
    """The cheapest feasible one, or the session's own of those that cost hardly more; nothing if there is none."""
    feasible = [look for look in asked if look.is_feasible]
    if not feasible:
        return ()
    most_s = feasible[0].cost_s * (1.0 + weights.near)
    near = [look for look in feasible if look.cost_s <= most_s]
    seed = rendezvous.seed_of(job.request)
    own = near[0] if len(near) == 1 else max(near, key=lambda look: rendezvous.weight(look.view.worker, seed))
    return (forecast(job, own.view, own.met, now, weights, is_feasible=True),)
