"""Published routing rules: which worker, by counts and cached prefixes. All of them queue in the engine.

Owns the rules and their published parameters. They get what Headway's placement gets (exact cache events, the ledger,
classes), which is more than their originals see; each docstring says where a rule is from and what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.admission import admit_always
from policies.api import FleetView, Floats, Forecast, Job, Place, RouterPolicy, ignore
from policies.budget import from_params
from policies.classify import classify
from policies.events import Event, WorkerReport
from policies.formula import Weights
from policies.ordering import least_laxity
from policies.params import number, refuse_unknown
from policies.placement import lmetric_place
from policies.scene import Scene

Score = Callable[[Scene, Job, FleetView], Floats]
WEIGHTS = Weights()


def lmetric(params: Mapping[str, Any]) -> RouterPolicy:
    """(uncached tokens) x (batch size), queued in the engine: the strongest simple rule we know (arXiv 2603.15202)."""
    return _queueing(params, lmetric_place)


def round_robin(params: Mapping[str, Any]) -> RouterPolicy:
    """Each worker in turn, whatever it holds."""

    def in_turn(scene: Scene, job: Job, fleet: FleetView) -> Floats:
        del scene, job
        slots = len(fleet.worker)
        return ((np.arange(slots) - fleet.dispatched) % max(1, slots)).astype(np.float64)

    return _queueing(params, _by(in_turn))


def least_loaded(params: Mapping[str, Any]) -> RouterPolicy:
    """The worker with the fewest requests."""
    return _queueing(params, _by(_fewest))


def prefix(params: Mapping[str, Any]) -> RouterPolicy:
    """The longest cached prefix, then the fewest requests: vLLM production-stack's prefix-aware routing."""
    return _queueing(params, _by(_longest))


def cache_aware(params: Mapping[str, Any]) -> RouterPolicy:
    """SGLang's: to the longest prefix if it covers enough of the prompt, else to the fewest requests; to the fewest
    whenever the fleet is out of balance. Parameters as published: `cache_threshold` 0.5, `balance_abs` 32,
    `balance_rel` 1.1 (1.0001 in some releases). The original breaks cold ties by the smallest tree, here by load."""
    threshold = number(params, "cache_threshold", 0.5)
    absolute, relative = number(params, "balance_abs", 32.0), number(params, "balance_rel", 1.1)

    def score(scene: Scene, job: Job, fleet: FleetView) -> Floats:
        most, least = _extremes(fleet.streams[scene.serves])
        is_unbalanced = most - least > absolute and most > relative * least
        share = float(scene.met.hit[scene.serves].max()) / job.prompt.tokens if scene.serves.any() else 0.0
        if is_unbalanced or share <= threshold:
            return fleet.streams.copy()
        return _longest(scene, job, fleet)

    return _queueing(params, _by(score), knobs=("cache_threshold", "balance_abs", "balance_rel"))


def dynamo(params: Mapping[str, Any]) -> RouterPolicy:
    """NVIDIA Dynamo's KV router: `overlap` x prefill blocks to compute + blocks that decode, the smallest. Parameter:
    `overlap` 1. The original can draw by softmax at a temperature; its default, 0, is this."""
    overlap = number(params, "overlap", 1.0)
    decoding = _Decoding()

    def score(scene: Scene, job: Job, fleet: FleetView) -> Floats:
        context = np.array([decoding.tokens.get(int(worker), 0) for worker in fleet.worker], dtype=np.float64)
        return overlap * (fleet.waiting_tokens + scene.met.uncached) + context + job.prompt.tokens

    return _queueing(params, _by(score), decoding.learn, knobs=("overlap",))


@dataclass(slots=True)
class _Decoding:
    """KV tokens that each worker's residents attend to, as its frames said."""

    tokens: dict[int, int] = field(default_factory=dict)

    def learn(self, event: Event) -> None:
        if isinstance(event, WorkerReport):
            self.tokens[event.worker] = event.load.decode_context


def _queueing(
    params: Mapping[str, Any], place: Place, learn: Callable[[Event], None] = ignore, knobs: Sequence[str] = ()
) -> RouterPolicy:
    refuse_unknown(params, "promises", "tenants", *knobs)
    return RouterPolicy(classify, from_params(params), admit_always, least_laxity, place, learn)


def _by(score: Score) -> Place:
    def place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        scene = Scene.of(job, fleet, now, WEIGHTS)
        return scene.choose(score(scene, job, fleet))

    return place


def _fewest(scene: Scene, job: Job, fleet: FleetView) -> Floats:
    del scene, job
    return fleet.streams


def _longest(scene: Scene, job: Job, fleet: FleetView) -> Floats:
    del job
    return fleet.streams - 1e6 * scene.met.hit


def _extremes(values: Floats) -> tuple[float, float]:
    return (float(values.max()), float(values.min())) if len(values) else (0.0, 0.0)


ROUTERS: dict[str, Callable[[Mapping[str, Any]], RouterPolicy]] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "prefix": prefix,
    "cache_aware": cache_aware,
    "dynamo": dynamo,
    "lmetric": lmetric,
}
