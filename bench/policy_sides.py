"""Who is compared in bench/policies.py: contestants, the grids that baselines are tuned on, our terms one by one.

Owns names and parameters, as data. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from bench.policy_runs import Side
from policies.admission import admit, admit_always
from policies.api import Classified, EnginePolicy, Flow, Forecast, Job, RouterPolicy, SessionView, Verdict
from policies.builtin import headway
from policies.classify import classify
from policies.costs import StepModel
from policies.placement import lmetric_place
from policies.request import Request, RequestClass
from policies.retention import keep
from policies.step_plan import BatchView, PlanLimits, StepPlan, plan

OURS = "headway + headway"
SHIPPED = "cache_aware + static-2048, as shipped"

# Three public routers get as many tries each, on the tuning half alone; the best of each takes part as "tuned".
GRIDS: dict[str, dict[str, Side]] = {
    "lmetric": {
        f"lmetric + {engine}": Side("lmetric", engine)
        for engine in ("priority-2048", "priority-512", "priority-8192", "niyama")
    },
    "cache_aware": {
        "cache_aware 0.5 + priority-2048": Side("cache_aware", "priority-2048"),
        "cache_aware 0.3 + priority-2048": Side("cache_aware", "priority-2048", {"cache_threshold": 0.3}),
        "cache_aware 0.8 + priority-2048": Side("cache_aware", "priority-2048", {"cache_threshold": 0.8}),
        "cache_aware 0.5 + niyama": Side("cache_aware", "niyama"),
    },
    "dynamo": {
        "dynamo 1 + priority-2048": Side("dynamo", "priority-2048"),
        "dynamo 0.5 + priority-2048": Side("dynamo", "priority-2048", {"overlap": 0.5}),
        "dynamo 2 + priority-2048": Side("dynamo", "priority-2048", {"overlap": 2.0}),
        "dynamo 1 + niyama": Side("dynamo", "niyama"),
    },
}
PUBLISHED: dict[str, Side] = {
    SHIPPED: Side("cache_aware", "static-2048"),
    "round_robin + static-2048": Side("round_robin", "static-2048"),
}


def tuned_name(family: str) -> str:
    """What the winner of a grid is called among the contestants."""
    return f"{family}, tuned"


def _composed(name: str) -> Side:
    return Side(f"bench.policy_sides:{name}")


def no_late_binding(params: Mapping[str, Any]) -> RouterPolicy:
    """Every request goes to a worker at once."""
    return replace(headway(params), admit=admit_always)


class _Blocked:
    """A queue in which nobody passes a head that fits nowhere yet."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def may_pass(self, job: Job, best: Forecast, now: float) -> bool:
        del job, best, now
        return False


def no_passing(params: Mapping[str, Any]) -> RouterPolicy:
    """A blocked head holds its whole class back."""

    def decide(job: Job, forecasts: Sequence[Forecast], flow: Flow, now: float) -> Verdict:
        return admit(job, forecasts, cast(Flow, _Blocked(flow)), now)

    return replace(headway(params), admit=decide)


def no_yielding() -> EnginePolicy:
    """Agents' and jobs' decodes run in every step, whatever chat prompts wait."""
    limits = PlanLimits(yield_share=-1.0)

    def step(batch: BatchView, model: StepModel, now: float) -> StepPlan:  # nor does who has missed its deadline
        return plan(batch._replace(deadline=np.full(len(batch.due), np.inf)), model, now, limits)

    return EnginePolicy(step, keep)


def lmetric_placement(params: Mapping[str, Any]) -> RouterPolicy:
    """Ours but for the choice of the worker."""
    return replace(headway(params), place=lmetric_place)


def always_chat(params: Mapping[str, Any]) -> RouterPolicy:
    """The simplest classifier: everybody is a person who waits."""

    def say(request: Request, session: SessionView, now: float) -> Classified:
        del request, session, now
        return Classified(RequestClass.CHATBOT, "always", RequestClass.CHATBOT)

    return replace(headway(params), classify=say)


def headers_only(params: Mapping[str, Any]) -> RouterPolicy:
    """The decision table without what was remembered of sessions and siblings."""
    nothing = SessionView()
    return replace(headway(params), classify=lambda request, _, now: classify(request, nothing, now))


def _weighed(**weights: Any) -> Side:
    return Side(params={"weights": weights})


ABLATIONS: dict[str, Side] = {
    "nothing: Headway as it is": Side(),
    "the answer's end in the cost (spreading)": _weighed(spread=(0.0, 0.0, 0.0)),
    "safety in time (q90)": _weighed(sure=(0.0, 0.0, 0.0)),
    "the price of displaced cache": _weighed(reuse=0.0),
    "the tie band": _weighed(near=0.0),
    "late binding: placed at once": _composed("no_late_binding"),
    "passing a blocked head": _composed("no_passing"),
    "placement: LMetric's": _composed("lmetric_placement"),
    "decodes that make way for chat prompts": Side(engine="bench.policy_sides:no_yielding"),
    "step planner: static-2048": Side(engine="static-2048"),
    "step planner: priority-2048": Side(engine="priority-2048"),
    "step planner: niyama": Side(engine="niyama"),
}
CLASSIFIERS: dict[str, tuple[Side, dict[str, Any]]] = {
    "declared by the client": (Side(), {"labels": "declared"}),
    "Headway's, all send headers": (Side(), {"stripped": 0.0}),
    "Headway's, 20 % stripped": (Side(), {}),
    "Headway's, all stripped": (Side(), {"stripped": 1.0}),
    "headers only, 20 % stripped": (_composed("headers_only"), {}),
    "headers only, all stripped": (_composed("headers_only"), {"stripped": 1.0}),
    "always chat": (_composed("always_chat"), {}),
}
