"""`headway-loadgen simulate`: a trace against N simulated workers, policy by policy, judged as a replay is.

Owns the command. Its figures are simulated and say so; equal arguments give equal reports, byte for byte."""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadgen import options, records, targets, traces
from loadgen.judge import Verdict
from loadgen.records import Incident, Record, Run
from loadgen.report import simulated
from loadgen.session import publish, read_budgets, span_s, version
from loadgen.sim import hardware
from loadgen.sim.profiles import Profile
from loadgen.sim.script import Failure
from loadgen.sim.world import Setting, World
from loadgen.targets import PUBLISHED, Budgets
from loadgen.traces import Trace
from policies import plugins
from policies.api import PolicySpec
from policies.limits import Limits

LABEL = "simulated, not validated"
AGGREGATE = "aggregate workers: rates, no steps"
WORKERS_MAX, AGGREGATE_MAX = 256, 1024
REQUESTS_PER_WORKER = 64  # open ones in the bound of a large fleet


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for, but for the policies."""

    trace: Path
    workers: int
    engine: str
    profile: Profile
    budgets: Budgets
    budgets_from: str
    duration_s: float
    warmup_s: float
    grace_s: float
    load: float
    seed: int
    stripped_share: float
    is_oracle: bool
    is_fused: bool
    is_aggregate: bool
    failures: tuple[Failure, ...]
    out: Path


SAYS = "run a trace against simulated workers and judge each policy"
TEACH = """
mix.jsonl --workers 4 --policy headway,lmetric
mix.jsonl --workers 8 --load 4 --fail kill:w1@5:2 --duration 10 --out out/loss
"""


def add_command(commands: options.Commands[argparse.ArgumentParser]) -> None:
    """The command's words."""
    command = options.command(commands, "simulate", SAYS, TEACH)
    command.add_argument("trace", type=Path, help="what `compose` or `convert` wrote, or a Mooncake file")
    command.add_argument("--workers", type=options.count, default=4, metavar="N", help="(4)")
    command.add_argument("--policy", default="headway", metavar="NAME[,NAME]", help="built-in, installed or mod:attr")
    command.add_argument("--engine", default="headway", metavar="NAME", help="the workers' step policy (headway)")
    command.add_argument("--profile", default="8b-h100", metavar="NAME|FILE", help="how fast a worker is (8b-h100)")
    command.add_argument(
        "--load", type=options.positive, default=1.0, help="session starts come so many times as fast (1)"
    )
    command.add_argument(
        "--duration", type=options.not_negative, default=0.0, metavar="S", help="offer no longer (the trace's span)"
    )
    command.add_argument("--warmup", type=options.not_negative, default=0.0, metavar="S", help="not judged (0)")
    command.add_argument("--grace", type=options.positive, default=60.0, metavar="S", help="wait for open answers (60)")
    command.add_argument(
        "--headers", type=options.share, default=0.8, metavar="SHARE", help="of sessions with headers (0.8)"
    )
    command.add_argument("--oracle", action="store_true", help="clients declare their true class")
    command.add_argument("--fail", action="append", default=[], metavar="WHAT", help="kill:w1@120:30, stall:w0@50:2")
    command.add_argument("--seed", type=int, default=1, help="of prompts, costumes and ties (1)")
    command.add_argument("--unfused", action="store_true", help="compute every decode step by itself: same, slower")
    command.add_argument("--aggregate", action="store_true", help="up to 1,024 workers as rates instead of steps")
    command.add_argument("--budgets", type=Path, metavar="FILE", help="JSON as /readyz has it (the published ones)")
    command.add_argument("--out", type=Path, default=Path("out/simulate"), help="base name of reports (out/simulate)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Simulate each policy in turn. 0: every run is valid."""
    most = AGGREGATE_MAX if arguments.aggregate else WORKERS_MAX
    if not 1 <= arguments.workers <= most:
        raise ValueError(f"{arguments.workers} workers: from 1 to {most}")
    if arguments.aggregate and arguments.engine != "headway":
        raise ValueError("aggregate workers plan no steps, so no step policy can be chosen")
    plan = Plan(
        trace=arguments.trace,
        workers=arguments.workers,
        engine=arguments.engine,
        profile=hardware.named(arguments.profile),
        budgets=read_budgets(arguments.budgets) if arguments.budgets else PUBLISHED,
        budgets_from=str(arguments.budgets or "the published defaults"),
        duration_s=arguments.duration,
        warmup_s=arguments.warmup,
        grace_s=arguments.grace,
        load=arguments.load,
        seed=arguments.seed,
        stripped_share=round(1.0 - arguments.headers, 6),
        is_oracle=arguments.oracle,
        is_fused=not arguments.unfused,
        is_aggregate=arguments.aggregate,
        failures=tuple(Failure.parse(text) for text in arguments.fail),
        out=arguments.out,
    )
    if plan.is_aggregate and plan.profile.host_blocks:
        raise ValueError("aggregate workers have no host pool: leave host_blocks out of the profile")
    trace = traces.read(plan.trace)
    verdicts = {name: _one(plan, trace, name) for name in arguments.policy.split(",")}
    print(f"\n{label(plan)}\n\n{simulated(verdicts)}")
    return 1 if any(verdict.invalid for verdict in verdicts.values()) else 0


def setting(plan: Plan, policy: str, duration_s: float) -> Setting:
    """One policy's setting. Raises ValueError for a name that nobody knows."""
    if bad := [failure for failure in plan.failures if failure.worker >= plan.workers]:
        raise ValueError(f"there is no worker w{bad[0].worker}")
    return Setting(
        router=plugins.load(PolicySpec(policy)),
        engine=plugins.load_engine(plan.engine),
        profiles=(plan.profile,) * plan.workers,
        seed=plan.seed,
        duration_s=duration_s,
        grace_s=plan.grace_s,
        load=plan.load,
        stripped_share=plan.stripped_share,
        is_oracle=plan.is_oracle,
        is_fused=plan.is_fused,
        is_aggregate=plan.is_aggregate,
        limits=fleet_limits(plan.workers),
        failures=plan.failures,
    )


def fleet_limits(workers: int) -> Limits:
    """A live router's bounds, or a large fleet's share of them."""
    limits = Limits()
    most = max(limits.requests_max, REQUESTS_PER_WORKER * workers)
    return replace(limits, workers_max=max(limits.workers_max, workers), requests_max=most)


def simulate(trace: Trace, chosen: Setting) -> World:
    """Run to the end. Most of what it makes lives long: collecting garbage meanwhile cost a tenth of the time."""
    world = World(trace, chosen)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        world.run()
    finally:
        if was_enabled:
            gc.enable()
    return world


def judged(found: Sequence[Record], warmup_s: float) -> list[Record]:
    """Records by row, without those of the warm-up."""
    kept = [one for one in found if one.intended_s is None or one.intended_s >= warmup_s]
    return sorted(kept, key=lambda one: one.row)


def label(plan: Plan) -> str:
    """What every report of it is headed."""
    return f"{LABEL}; {AGGREGATE}" if plan.is_aggregate else LABEL


def _one(plan: Plan, trace: Trace, policy: str) -> Verdict:
    duration_s = plan.duration_s or span_s(trace, plan.load)
    begun = time.perf_counter()
    world = simulate(trace, setting(plan, policy, duration_s))
    wall_s = time.perf_counter() - begun
    found = judged(world.records, plan.warmup_s)
    said = Run(
        target=f"{label(plan)}: {policy} x {plan.engine}, {plan.workers} x {plan.profile.name} ({plan.profile.source})",
        model=plan.profile.name,
        trace_name=plan.trace.name,
        trace_digest=hashlib.sha256(traces.encode(trace)).hexdigest()[:12],
        trace_notes=trace.header.notes,
        trace_bad_rows=trace.bad_count,
        seed=plan.seed,
        speed=plan.load,
        stripped_share=plan.stripped_share,
        duration_s=duration_s - plan.warmup_s,
        wall_s=world.now,
        started="virtual time",
        machine="simulated",
        version=version(),
        client_cpu_s=0.0,
        not_reached=world.not_reached,
        budgets=targets.to_plain(plan.budgets),
        budgets_from=plan.budgets_from,
        incidents=sorted(Incident(*told) for failure in plan.failures for told in failure.told()),
    )
    name = policy.replace(":", "-").replace(".", "-")
    out = plan.out.with_name(f"{plan.out.name}-{name}")
    records.write(said, found, out.with_suffix(".jsonl"))
    print(f"{policy}: {len(world.records)} requests in {wall_s:.1f} s", file=sys.stderr)
    return publish(said, found, plan.budgets, out)
