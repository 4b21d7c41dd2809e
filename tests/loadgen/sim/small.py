"""A small simulated house: two slow workers with little memory, and a trace that fills them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loadgen.compose import Mix, compose, drop_over_context, scale
from loadgen.sim.profiles import Profile, Theta
from loadgen.sim.world import Recorder, Setting, World
from loadgen.traces import Trace
from policies import plugins
from policies.api import PolicySpec

SMALL = Profile(
    name="small",
    theta=Theta(4e-3, 2e-4, 1e-3, 2e-7, 1e-8, 1e-4),
    block_tokens=16,
    blocks_total=600,
    context_max=8192,
    sequences_max=16,
)


def mix(duration_s: float = 40.0, load: float = 4.0, seed: int = 1) -> Trace:
    """All three classes at a sixteenth of their tokens."""
    return drop_over_context(scale(compose(replace(Mix(), users=4), seed, duration_s, load), 16), 4096)


def world(trace: Trace, recorder: Recorder | None = None, *, policy: str = "headway", **changes: Any) -> World:
    """Two small workers under `policy`; `changes` are of the Setting."""
    router = plugins.load(PolicySpec(policy))
    setting = Setting(router=router, engine=None, profiles=(SMALL, SMALL), duration_s=40.0, grace_s=1e6)
    return World(trace, replace(setting, **changes), recorder)
