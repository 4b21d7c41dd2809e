"""From a configuration to the mind's reducer: the same function for the live router and for a replay.

Owns what the reducer is made of. Never reads a clock or draws a seed: both are given."""

from __future__ import annotations

import dataclasses
from collections import deque

import msgspec
import numpy as np

from policies import plugins
from policies.api import PolicySpec, RouterPolicy
from policies.builtin import BUILTINS
from policies.dispatcher import Dispatcher, Load
from policies.events import PolicyFault
from policies.limits import Limits
from policies.trust import BUILT_IN
from router.control.guard import guard
from router.settings.config import Config


def policy_spec(config: Config) -> PolicySpec:
    """The policy by name, with the promises of the configuration among its parameters."""
    params = dict(config.policy.params)
    if promises := {name: changed for name, row in _rows(config).items() if (changed := _changed(row))}:
        params["promises"] = promises
    return PolicySpec(config.policy.ref, params)


def _rows(config: Config) -> dict[str, dict[str, float | None]]:
    rows: dict[str, dict[str, float | None]] = msgspec.to_builtins(config.classes)
    return rows


def _changed(row: dict[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in row.items() if value is not None}


def load_policy(config: Config, faults: deque[PolicyFault], *, is_timed: bool) -> RouterPolicy:
    """The policy that decides. `faults` fills while one that is not ours misbehaves. Raises plugins.PolicyError."""
    return guarded(policy_spec(config), faults, is_timed=is_timed)


def guarded(spec: PolicySpec, faults: deque[PolicyFault], *, is_timed: bool) -> RouterPolicy:
    """A policy by its spec. Raises plugins.PolicyError."""
    policy = plugins.load(spec)
    return policy if spec.ref in BUILTINS else guard(policy, BUILT_IN, faults, is_timed=is_timed)


def loader(faults: deque[PolicyFault], *, is_timed: bool) -> Load:
    """How the reducer comes to another policy when the configuration changes."""
    return lambda text: guarded(PolicySpec.from_json(text), faults, is_timed=is_timed)


def build(config: Config, policy: RouterPolicy, seed: int, load: Load | None = None) -> Dispatcher:
    """The reducer. The seed is for what it draws; a recording keeps it."""
    limits = dataclasses.replace(Limits(), **msgspec.to_builtins(config.limits))
    return Dispatcher(policy, limits, np.random.default_rng(seed), load)
