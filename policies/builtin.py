"""The policies that come with Headway, by name: its own, and the baselines to measure it against.

Owns the names. Each is a factory: parameters in, a RouterPolicy (or an EnginePolicy) out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from policies.admission import admit
from policies.api import EnginePolicy, RouterPolicy
from policies.baselines.engines import ENGINES as BASELINES
from policies.baselines.routers import ROUTERS
from policies.budget import from_params
from policies.classify import classify
from policies.formula import Weights
from policies.ordering import least_laxity
from policies.params import number, refuse_unknown, table
from policies.placement import budget_place
from policies.request import RequestClass
from policies.retention import keep
from policies.step_plan import PlanLimits, plan


def headway(params: Mapping[str, Any]) -> RouterPolicy:
    """Placement by remaining budget, late binding, honest refusals.

    Parameters: `promises` and `tenants` (see policies.budget), and `weights`, the factors of policies.placement."""
    refuse_unknown(params, "promises", "tenants", "weights")
    weights = _weights(table(params, "weights"))
    return RouterPolicy(classify, from_params(params), admit, least_laxity, budget_place(weights))


def _weights(given: Mapping[str, Any]) -> Weights:
    """The factors of placement with what was given in their place. Raises ValueError."""
    defaults = Weights()
    refuse_unknown(given, *(one.name for one in fields(defaults)))
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if not isinstance(getattr(defaults, name), tuple):
            changes[name] = number(given, name, 0.0)
        elif isinstance(value, list | tuple) and len(value) == len(RequestClass):
            changes[name] = tuple(number({name: one}, name, 0.0) for one in value)
        else:
            raise ValueError(f"{name} must be {len(RequestClass)} numbers, one for each class")
    return replace(defaults, **changes)


DEFAULT_PLAN = PlanLimits()


def headway_engine(limits: PlanLimits = DEFAULT_PLAN) -> EnginePolicy:
    """Steps as large as the tightest line allows, KV kept in class bands."""
    return EnginePolicy(functools.partial(plan, limits=limits), keep)


BUILTINS: dict[str, Callable[[Mapping[str, Any]], RouterPolicy]] = {"headway": headway, **ROUTERS}
ENGINES: dict[str, Callable[[], EnginePolicy]] = {"headway": headway_engine, **BASELINES}
