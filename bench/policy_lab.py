"""The lab of bench/policies.py: runs that are kept, loads on one ladder, capacities with paired intervals.

Owns what has been found and how it is reckoned. Knows no policy by name and no workload's file."""

from __future__ import annotations

import functools
import json
import math
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from bench.policy_runs import TEST_SEED, TUNING_SEED, Run, Side, Tallies, code_digest, joined, measure
from loadgen.judge import PASS_SHARE

ROUNDS = 1000  # of the bootstrap
NOTCH = 2.0**0.25  # between two loads of the ladder: all policies are run at the same loads, so that they are paired
NOTCHES = (-16, 24)  # loads from 1/16 to 64
LEAP = 4  # notches at a time until a load passes and another one fails

Floats = npt.NDArray[np.float64]
Curve = list[tuple[float, Tallies]]


@dataclass(frozen=True, slots=True)
class Slice:
    """How much of one workload is run."""

    case: str
    duration_s: float
    warmup_s: float
    seeds: int
    start: float  # the load where curves begin to look
    most: float = 64.0  # the load that half of a recorded trace suffices for
    workers: int = 4
    table_seeds: int = 0  # of single points, which decide nothing; 0: as many as curves have


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run."""

    name: str
    slices: tuple[Slice, ...]
    points_max: int = 12  # of one curve
    contest: tuple[str, ...] = ()  # those compared; empty: all
    tuning_loads: tuple[float, ...] = (0.7, 1.0)  # of Headway's capacity on the tuning half; none: nothing is tuned
    overload: tuple[float, ...] = (1.0, 3.0, 10.0)

    @property
    def cases(self) -> tuple[str, ...]:
        return tuple(one.case for one in self.slices)

    def slice(self, case: str) -> Slice:
        return next(one for one in self.slices if one.case == case)


@dataclass(slots=True)
class Lab:
    """Makes runs and keeps them: a line of JSON each, so that an interrupted bench goes on where it stopped."""

    scale: Scale
    folder: Path | None
    store: Path
    jobs: int = 1
    code: str = field(default_factory=code_digest)
    made: int = 0  # runs of this process
    _found: dict[str, Tallies] = field(default_factory=dict)
    _pool: Executor | None = None
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        lines = self.store.read_text().splitlines() if self.store.exists() else []
        for line in map(json.loads, lines):
            if line["code"] == self.code:
                self._found[line["run"]] = msgspec.convert(line["found"], Tallies)
        if self.jobs > 1:
            self._pool = ProcessPoolExecutor(self.jobs)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @property
    def cpu_s(self) -> float:
        """What all kept runs took."""
        return sum(found.cpu_s for found in self._found.values())

    @property
    def runs(self) -> int:
        return len(self._found)

    @property
    def requests(self) -> int:
        return sum(found.requests for found in self._found.values())

    # Runs ------------------------------------------------------------------------------------------------------------

    def one(self, run: Run) -> Tallies:
        """The run's tallies, made now or before."""
        key = json.dumps(msgspec.to_builtins(run), sort_keys=True)
        if key not in self._found:
            work = functools.partial(measure, run, self.folder)
            found = self._pool.submit(work).result() if self._pool is not None else work()
            with self._writing, self.store.open("a") as lines:
                lines.write(json.dumps({"code": self.code, "run": key, "found": msgspec.to_builtins(found)}) + "\n")
            self._found[key] = found
            self.made += 1
            rate = found.requests / max(found.cpu_s, 1e-9)
            said = f"{run.case} x{run.load:.2f} {run.side.router} + {run.side.engine} seed {run.seed}"
            print(f"{said}: {found.requests} requests, {rate:.0f} a CPU second", file=sys.stderr, flush=True)
        return self._found[key]

    def point(
        self, case: str, load: float, side: Side, *, is_tuning: bool = False, is_curve: bool = False, **options: Any
    ) -> Tallies:
        """One policy at one load, all seeds."""
        part = self.scale.slice(case)
        count = part.seeds if is_curve else part.table_seeds or part.seeds
        seeds = [TUNING_SEED + 1] if is_tuning else range(TEST_SEED + 1, TEST_SEED + count + 1)
        times = {"duration_s": part.duration_s, "warmup_s": part.warmup_s, "workers": part.workers}
        return joined(
            [self.one(Run(case=case, load=round(load, 4), side=side, seed=seed, **(times | options))) for seed in seeds]
        )

    def curve(self, case: str, side: Side, near: float, **options: Any) -> Curve:
        """Points around the largest load at which every class passes, from one `near` it on."""
        found: dict[int, Tallies] = {}

        def passes(notch: int) -> bool:
            if notch not in found:
                found[notch] = self.point(case, NOTCH**notch, side, is_curve=True, **options)
            return margin(found[notch]) >= 0.0

        top = min(NOTCHES[1], math.floor(math.log(self.scale.slice(case).most, NOTCH)))
        low, high = self._bracket(passes, min(_notch(near), top), top, found)
        while high - low > 1 and len(found) < self.scale.points_max:
            middle = (low + high) // 2
            low, high = (middle, high) if passes(middle) else (low, middle)
        return [(NOTCH**notch, found[notch]) for notch in sorted(found)]

    def _bracket(
        self, passes: Callable[[int], bool], start: int, top: int, found: dict[int, Tallies]
    ) -> tuple[int, int]:
        """A notch that passes and one that fails, by leaps; equal where the ladder or the budget ends first."""
        at, step = start, LEAP if passes(start) else -LEAP
        while (NOTCHES[0] < at if step < 0 else at < top) and len(found) < self.scale.points_max:
            before, at = at, min(top, max(NOTCHES[0], at + step))
            if passes(at) != (step > 0):
                return min(before, at), max(before, at)
        return at, at

    def each(self, work: Sequence[Callable[[], Any]]) -> list[Any]:
        """Several things, as many at once as there are processes; results in order."""
        if self._pool is None:
            return [do() for do in work]
        with ThreadPoolExecutor(self.jobs) as threads:
            return list(threads.map(lambda do: do(), work))


def _notch(load: float) -> int:
    return min(NOTCHES[1], max(NOTCHES[0], round(math.log(load, NOTCH))))


# Reckoning ------------------------------------------------------------------------------------------------------------


def shares(found: Tallies) -> dict[str, float]:
    """Attainment by class, of those that were offered."""
    return {
        name: sum(met for _, met, _ in groups) / sum(offered for *_, offered in groups)
        for name, groups in found.groups.items()
        if groups
    }


def margin(found: Tallies) -> float:
    """How far the worst class is above its bar."""
    return min((share - PASS_SHARE[name] for name, share in shares(found).items()), default=0.0)  # type: ignore[index]


@functools.cache
def _weights(who: int) -> npt.NDArray[np.int8]:
    """How often a group is drawn in each round: the same for every policy, load and seed that it appears in."""
    return np.random.default_rng(who).poisson(1.0, ROUNDS).astype(np.int8)


def drawn_margins(found: Tallies) -> Floats:
    """The margin in bootstrap samples by session."""
    margins = np.full(ROUNDS, np.inf)
    for name, groups in found.groups.items():
        if groups:
            met, offered = np.zeros(ROUNDS), np.zeros(ROUNDS)
            for who, group_met, group_offered in groups:
                met += group_met * _weights(who)
                offered += group_offered * _weights(who)
            share = np.divide(met, offered, out=np.ones(ROUNDS), where=offered > 0)
            margins = np.minimum(margins, share - PASS_SHARE[name])  # type: ignore[index]
    return margins


def crossings(curve: Curve) -> Floats:
    """Capacity in each bootstrap sample: where the margin first falls below zero, between two loads by their logs.

    Where it never does, or does at once, the curve's end."""
    loads = np.log([load for load, _ in curve])
    margins = np.stack([drawn_margins(found) for _, found in curve])
    capacity = np.full(ROUNDS, loads[-1])
    for sample in range(ROUNDS):
        below = np.flatnonzero(margins[:, sample] < 0.0)
        if len(below):
            at = int(below[0])
            near = slice(at - 1, at + 1)
            capacity[sample] = loads[0] if at == 0 else _between(loads[near], margins[near, sample])
    return np.exp(capacity)


def _between(loads: Floats, margins: Floats) -> float:
    return float(loads[0] + (loads[1] - loads[0]) * margins[0] / (margins[0] - margins[1]))


def interval(values: Floats) -> str:
    """Median and 95 %."""
    low, middle, high = np.percentile(values, [2.5, 50, 97.5])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def lower(values: Floats) -> float:
    """What is claimed."""
    return float(np.percentile(values, 2.5))


def users_p5(found: Tallies, offered_min: int) -> tuple[float | None, str]:
    """Attainment of the user at the 5th percentile, and the worst by name, of those who asked often enough."""
    rates = sorted((met / offered, user) for user, (met, offered) in found.users.items() if offered >= offered_min)
    return (rates[int(0.05 * len(rates))][0], rates[0][1]) if rates else (None, "-")
