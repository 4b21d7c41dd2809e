"""`headway-loadgen plan`: a workload and a kind of machine in; replicas, the reason and the price out.

Owns the command, and the simulated runs that check its answer. Never talks to a server."""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from loadgen import fleets, formats, options, simulate
from loadgen.compose import Mix, compose
from loadgen.fleets import Checked
from loadgen.plan import Planned, asked, plan
from loadgen.plan_html import class_cells, page
from loadgen.records import Run
from loadgen.report import aligned
from loadgen.search import Measured, point, pooled
from loadgen.session import read_budgets, span_s
from loadgen.sim import hardware, profiles
from loadgen.sim.profiles import Profile
from loadgen.sim.world import Setting
from loadgen.targets import PUBLISHED, Budgets, to_plain
from loadgen.traces import Trace
from loadgen.workload import has_clock
from policies import plugins
from policies.api import PolicySpec

GRACE_S = 60.0  # after the offered time, for answers under way
TEACH = """
mix.jsonl --hardware h100 --model llama-8b
workload.toml --hardware h100 --model llama-8b --duration 60 --seeds 1 --json out/plan.json --html out/plan.html
conversation_trace.jsonl.zst --hardware h100 --model llama-8b --price 2.2 --spare 1 --closed-form
"""


class Answer(msgspec.Struct, frozen=True):
    """All that --json writes."""

    planned: Planned
    simulated: list[Checked]  # by size
    smallest: int | None  # that suffices of these, spare ones not counted
    label: str


def add(commands: options.Commands[argparse.ArgumentParser]) -> None:
    """The command."""
    says = "say how many replicas a workload needs, what binds, and what a million tokens cost by class"
    command = options.command(commands, "plan", says, TEACH)
    command.add_argument("workload", type=Path, help="a trace in any known format, or a .toml over `compose`'s mix")
    command.add_argument("--hardware", default="h100", metavar="CARD", help="whose steps were timed (h100)")
    command.add_argument("--model", default="llama-8b", help="that was timed on it (llama-8b)")
    says = (
        f"other step times than those two name: {', '.join(profiles.PROFILES)}, a profile's JSON, or the .jsonl that "
    )
    says += "bench/step_samples.py wrote"
    command.add_argument("--profile", metavar="NAME|FILE", help=says)
    command.add_argument("--budgets", type=Path, metavar="FILE", help="promises as /readyz has them (the published)")
    command.add_argument("--price", type=options.positive, default=2.5, help="of a replica an hour (2.5)")
    command.add_argument(
        "--spare", type=options.whole, default=0, help="replicas beyond what is needed, for failures (0)"
    )
    command.add_argument(
        "--duration", type=options.positive, default=3600.0, metavar="S", help="of a .toml's mix (3600)"
    )
    command.add_argument("--seeds", type=options.count, default=3, help="simulated runs of each size (3)")
    command.add_argument("--policy", default="headway", help="that the simulator places by (headway)")
    command.add_argument("--closed-form", action="store_true", help="do not ask the simulator")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    command.add_argument("--html", type=Path, metavar="FILE", help="write them drawn, as one page")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    profile = _profile(arguments)
    budgets = read_budgets(arguments.budgets) if arguments.budgets else PUBLISHED
    trace = _trace(arguments.workload, arguments.duration)
    work = asked(trace, profile.blocks_total * profile.block_tokens)
    planned = plan(work, profile, budgets, arguments.spare, arguments.price)
    print(text(planned))
    checked: list[Checked] = []
    if not arguments.closed_form:
        need = planned.replicas - planned.spare
        seeds = range(1, arguments.seeds + 1)
        checked = fleets.search(_Check(trace, profile, budgets, arguments.policy, seeds).size, need)
        said = fleets.text(checked, need, sum(one.busy for one in planned.classes.values()))
        print(f"\n{simulate.LABEL}, {arguments.policy}, {arguments.seeds} seeds\n\n{said}")
    label = simulate.LABEL if checked else "closed form"
    if arguments.html:
        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        arguments.html.write_text(page(arguments.workload.name, planned, checked, label), encoding="utf-8")
        print(f"wrote {arguments.html}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        answer = Answer(planned, checked, fleets.edge(checked)[1], label)
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(answer), indent=1))
        print(f"wrote {arguments.json}")
    return 0


def _profile(arguments: argparse.Namespace) -> Profile:
    if arguments.profile is None:
        return hardware.load(arguments.hardware, arguments.model)
    return hardware.named(arguments.profile)


def _trace(path: Path, duration_s: float) -> Trace:
    if path.suffix != ".toml":
        trace = formats.load(path)
        if not has_clock(trace.rows):
            raise ValueError(f"{path}: all sessions begin at 0: it says nothing of load; `compose --weka` draws starts")
        return trace
    with path.open("rb") as file:
        return compose(read_mix(tomllib.load(file)), seed=1, duration_s=duration_s)


def read_mix(changes: dict[str, Any]) -> Mix:
    """`compose`'s mix with these keys changed, nested as its dataclasses are. Raises ValueError naming a wrong one."""
    plain: dict[str, Any] = msgspec.to_builtins(Mix())
    return msgspec.convert(_merged(plain, changes, ""), Mix)


def _merged(plain: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(plain)
    for name, value in changes.items():
        if name not in plain:
            raise ValueError(f"the workload has no {where}{name}; there are {', '.join(plain)}")
        old = plain[name]
        if isinstance(old, dict) != isinstance(value, dict):
            raise ValueError(f"{where}{name} is {'a table' if isinstance(old, dict) else 'one value'}")
        merged[name] = _merged(old, value, f"{where}{name}.") if isinstance(old, dict) else value
    return merged


def text(planned: Planned) -> str:
    """The plan in words, reasons first."""
    bounds = planned.bounds
    spare = f", {planned.spare} of them spare" if planned.spare else ""
    rows = [
        ["", "per s", "hit %", "prefill ms", "decode ms", "busy replicas", "load it bears", "per 1M tokens", "output"]
    ]
    rows += [[name, *class_cells(one)] for name, one in planned.classes.items()]
    return "\n".join(
        [
            f"{planned.replicas} replica{'s' * (planned.replicas != 1)}{spare}: {bounds.binding} binds",
            f"  compute {bounds.compute:.2f}, KV memory {bounds.kv:.2f}, decode pace {bounds.pace:.2f} replicas",
            f"  a tenth more of the input held: {planned.if_hit_10_more:.2f}; a tenth more load: "
            f"{planned.if_load_10_more:.2f} (now {bounds.most:.2f})",
            "",
            aligned(rows),
            "",
            f"a replica decodes {planned.batch} sequences within the pace, and keeps {planned.kv_tokens:,} tokens",
            f"at {planned.price_per_hour:g} a replica and hour; step times: {planned.source}",
        ]
    )


@dataclass(frozen=True, slots=True)
class _Check:
    """Simulates fleets of several sizes under the same promises."""

    trace: Trace
    profile: Profile
    budgets: Budgets
    policy: str
    seeds: Sequence[int]

    def size(self, workers: int) -> Checked:
        """One size, over all seeds."""
        runs = []
        for seed in self.seeds:
            print(f"simulating {workers} replicas, seed {seed}", end="", file=sys.stderr, flush=True)
            begun = time.perf_counter()
            runs.append(self.run(workers, seed))
            print(f": {len(runs[-1][1])} requests in {time.perf_counter() - begun:.1f} s", file=sys.stderr)
        found = point(1.0, pooled(runs, self.budgets), 0)
        return Checked(workers, all(one.met >= one.wanted for one in found.classes.values()), found.classes)

    def run(self, workers: int, seed: int) -> Measured:
        """One run in virtual time."""
        duration_s = span_s(self.trace, 1.0)
        setting = Setting(
            router=plugins.load(PolicySpec(self.policy)),
            engine=plugins.load_engine("headway"),
            profiles=(self.profile,) * workers,
            seed=seed,
            duration_s=duration_s,
            grace_s=GRACE_S,
        )
        world = simulate.simulate(self.trace, setting)
        run = Run(
            target=simulate.LABEL,
            model=self.profile.name,
            trace_name="",
            trace_digest="",
            seed=seed,
            speed=1.0,
            stripped_share=setting.stripped_share,
            duration_s=duration_s,
            wall_s=world.now,
            started="virtual time",
            machine="simulated",
            version="",
            client_cpu_s=0.0,
            budgets=to_plain(self.budgets),
        )
        return run, simulate.judged(world.records, 0.0)
