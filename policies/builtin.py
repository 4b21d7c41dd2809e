"""The policies that come with Headway: its own, and three baselines a page long to measure it against.

Owns their names. Each is a factory: parameters in, a RouterPolicy out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from policies.admission import admit, admit_always
from policies.api import FleetView, Forecast, Job, RouterPolicy
from policies.budget import from_params
from policies.classify import classify
from policies.ordering import least_laxity
from policies.placement import Scene, Weights, budget_place, choose, lmetric_place


def headway(params: Mapping[str, Any]) -> RouterPolicy:
    """Placement by remaining budget, late binding, honest refusals.

    Parameters: `promises` and `tenants` (see policies.budget), and `weights`, the factors of policies.placement."""
    weights = Weights(**params.get("weights", {}))
    return RouterPolicy(classify, from_params(params), admit, least_laxity, budget_place(weights))


def lmetric(params: Mapping[str, Any]) -> RouterPolicy:
    """(uncached tokens) x (batch size), queued in the engine: the strongest simple rule we know."""
    return RouterPolicy(classify, from_params(params), admit_always, least_laxity, lmetric_place)


def round_robin(params: Mapping[str, Any]) -> RouterPolicy:
    """Each worker in turn, whatever it holds."""
    return RouterPolicy(classify, from_params(params), admit_always, least_laxity, _in_turn)


def least_loaded(params: Mapping[str, Any]) -> RouterPolicy:
    """The worker with the fewest requests."""
    return RouterPolicy(classify, from_params(params), admit_always, least_laxity, _fewest)


def _in_turn(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
    slots = len(fleet.worker)
    distance = (np.arange(slots) - fleet.dispatched) % max(1, slots)
    return choose(Scene.of(job, fleet, now, Weights()), distance.astype(np.float64), job, fleet, now)


def _fewest(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
    return choose(Scene.of(job, fleet, now, Weights()), fleet.streams, job, fleet, now)


BUILTINS: dict[str, Callable[[Mapping[str, Any]], RouterPolicy]] = {
    "headway": headway,
    "lmetric": lmetric,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
}
