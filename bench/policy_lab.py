"""The lab of bench/policies.py: workloads at any load, runs that are kept, capacities with their intervals.

Owns how a run is made and reckoned. Knows no policy by name."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loadgen import compose, formats
from loadgen.formats import weka
from loadgen.judge import PASS_SHARE, judge_one
from loadgen.sim.profiles import H100_8B
from loadgen.sim.world import Setting
from loadgen.simulate import judged, simulate
from loadgen.targets import PUBLISHED, target_of
from loadgen.traces import CLASSES, Tally, Trace
from policies import plugins
from policies.api import RouterPolicy

PROFILE = msgspec.structs.replace(H100_8B, block_tokens=256, blocks_total=432_000 // 256)
GRACE_S = 300.0  # the longest answers take four minutes
ROUNDS = 1000  # of the bootstrap
CROSSING = 1.15  # bisection ends when the bracket is this narrow
JITTER_S = 3.0  # Mooncake's own recorder batches arrivals in steps of 3 s

Made = tuple[RouterPolicy, str]  # a router policy, and the name of a step policy
Make = Callable[[], Made]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run."""

    workers: int
    duration_s: float
    warmup_s: float
    seeds: int
    workloads: tuple[str, ...]


# What is offered ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Workloads:
    """Traces by name and load; 1 is a guess at what the workers can do. Public ones lie under `folder`."""

    folder: Path | None
    duration_s: float

    def at(self, name: str, load: float, seed: int) -> Trace:
        """So many times the sessions, in the same time."""
        made: dict[str, Callable[[float, int], Trace]] = {
            "mix": self.mix,
            "mooncake": self._mooncake,
            "azure": self._azure,
            "weka": self._weka,
        }
        return made[name](load, seed)

    def mix(self, load: float, seed: int, background: float | None = None) -> Trace:
        mix = compose.Mix(users=24)
        other = load if background is None else background
        mix = replace(
            mix,
            chat=replace(mix.chat, sessions_per_s=mix.chat.sessions_per_s * load),
            background=replace(mix.background, sessions_per_s=mix.background.sessions_per_s * other),
            jobs=replace(mix.jobs, bursts_per_s=mix.jobs.bursts_per_s * other),
        )
        return compose.drop_over_context(compose.compose(mix, seed, self.duration_s), PROFILE.context_max)

    def _mooncake(self, load: float, seed: int) -> Trace:
        return self._dense(formats.load(self._path("conversation_trace.jsonl.zst")), load, seed)

    def _azure(self, load: float, seed: int) -> Trace:
        return self._dense(formats.load(self._path("AzureLLMInferenceTrace_conv.csv.zst")), load * 4, seed)

    def _weka(self, load: float, seed: int) -> Trace:
        path = self._path("weka_requests.csv.zst")
        sessions = weka.fitting(weka.sessions_of(path, Tally(path, strict=False)), 8, PROFILE.context_max)
        count = max(2, round(load * 0.1 * self.duration_s))
        return compose.scale(weka.slice_of(sessions, count, seed, self.duration_s), 8)

    def _path(self, name: str) -> Path:
        if self.folder is None:
            raise ValueError(f"{name} is wanted: name the folder of public traces with --traces or HEADWAY_TRACES")
        return self.folder / name

    def _dense(self, trace: Trace, load: float, seed: int) -> Trace:
        """Its arrivals in less time, cut to the duration; each seed begins elsewhere."""
        rng, rows = np.random.default_rng(seed), []
        span_s = max((row.timestamp or 0.0) for row in trace.rows) / 1e3
        begin_s = float(rng.uniform(0.0, max(0.0, span_s - self.duration_s * load))) if seed > 1 else 0.0
        for row in trace.rows:
            at_s = ((row.timestamp or 0.0) / 1e3 - begin_s + float(rng.uniform(0.0, JITTER_S))) / load
            if 0.0 <= at_s <= self.duration_s:
                rows.append(msgspec.structs.replace(row, timestamp=1e3 * at_s))
        rows.sort(key=lambda row: row.timestamp or 0.0)
        return compose.drop_over_context(replace(trace, rows=tuple(rows)), PROFILE.context_max)


# Running --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lab:
    """Makes runs and keeps them: a line of JSON each, so that an interrupted bench goes on where it stopped."""

    scale: Scale
    workloads: Workloads
    store: Path
    found: dict[str, dict[str, Any]]

    def point(self, case: str, load: float, policy: str, make: Make, **options: Any) -> dict[str, Any]:
        """One policy at one load, all seeds: met and offered by class and session."""
        key = json.dumps([case, round(load, 4), policy, options], sort_keys=True)
        if key not in self.found:
            parts = [self._run(case, load, make, seed, options) for seed in range(1, self.scale.seeds + 1)]
            self.found[key] = _joined(parts)
            with self.store.open("a") as lines:
                lines.write(json.dumps({"key": key, **self.found[key]}) + "\n")
        return self.found[key]

    def _run(self, case: str, load: float, make: Make, seed: int, options: dict[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()
        router, engine = make()
        held = options.get("chat_load")
        trace = self.workloads.at(case, load, seed) if held is None else self.workloads.mix(held, seed, load)
        setting = Setting(
            router=router,
            engine=plugins.load_engine(engine),
            profiles=(PROFILE,) * self.scale.workers,
            seed=seed,
            duration_s=self.scale.duration_s,
            grace_s=GRACE_S,
            is_oracle=options.get("is_oracle", False),
            stripped_share=options.get("stripped", 0.2),
        )
        world = simulate(trace, setting)
        records = judged(world.records, self.scale.warmup_s)
        sessions: dict[str, dict[str, list[int]]] = {name: {} for name in CLASSES}
        seen: dict[str, dict[str, int]] = {name: {} for name in CLASSES}
        for record in records:
            one = judge_one(record, target_of(record, PUBLISHED))
            tally = sessions[record.request_class].setdefault(record.session or f"#{record.row}", [0, 0])
            tally[0] += one.is_met
            tally[1] += 1
            if record.turn >= 2 and record.assigned_class:
                counts = seen[record.request_class]
                counts[record.assigned_class] = counts.get(record.assigned_class, 0) + 1
        done = [record for record in records if record.outcome == "done"]
        wall_s = time.perf_counter() - begun
        print(f"{case} x{load:.2f} seed {seed}: {len(world.records)} requests in {wall_s:.0f} s", file=sys.stderr)
        return {
            "sessions": {name: sorted(found.values()) for name, found in sessions.items()},
            "seen": seen,
            "refused": sum(record.outcome == "refused" for record in records),
            "output_tokens": {name: sum(len(r.token_s) for r in done if r.request_class == name) for name in CLASSES},
            "hit": sum(r.cached_tokens or 0 for r in done) / max(1, sum(r.input_tokens for r in done)),
            "busy": sum(worker.busy_s for worker in world.workers) / len(world.workers) / max(world.now, 1e-9),
            "seconds": wall_s,
        }

    def bisect(self, case: str, policy: str, make: Make, **options: Any) -> list[tuple[float, dict[str, Any]]]:
        """Points around the largest load at which every class passes."""
        points: dict[float, dict[str, Any]] = {}

        def passes(load: float) -> bool:
            points[load] = self.point(case, load, policy, make, **options)
            return margin(points[load]) >= 0.0

        low = high = 1.0
        while passes(high) and high < 64.0:
            low, high = high, high * 2.0
        while low == high and not passes(low / 2.0) and low > 0.05:
            low = high = low / 2.0
        low = low / 2.0 if low == high else low
        while high / low > CROSSING:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if passes(middle) else (low, middle)
        return sorted(points.items())


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Seeds together."""
    whole = dict(parts[0])
    whole["sessions"] = {name: [pair for part in parts for pair in part["sessions"][name]] for name in CLASSES}
    whole["seen"] = {
        name: {to: sum(part["seen"][name].get(to, 0) for part in parts) for to in CLASSES} for name in CLASSES
    }
    for name in ("hit", "busy"):
        whole[name] = sum(part[name] for part in parts) / len(parts)
    whole["refused"] = sum(part["refused"] for part in parts)
    return whole


# Reckoning ------------------------------------------------------------------------------------------------------------


def shares(point: dict[str, Any]) -> dict[str, float]:
    """Attainment by class, of those that were offered."""
    return {
        name: sum(met for met, _ in found) / sum(offered for _, offered in found)
        for name, found in point["sessions"].items()
        if found
    }


def margin(point: dict[str, Any]) -> float:
    """How far the worst class is above its bar."""
    return min(share - PASS_SHARE[name] for name, share in shares(point).items())  # type: ignore[index]


def drawn_margins(point: dict[str, Any], seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The margin in bootstrap samples by session. Equal seeds draw the same sessions: policies are paired by load."""
    margins = np.full(ROUNDS, np.inf)
    for number, (name, found) in enumerate(point["sessions"].items()):
        if found:
            pairs = np.array(found, dtype=np.float64)
            picks = np.random.default_rng([seed, number]).integers(0, len(pairs), size=(ROUNDS, len(pairs)))
            share = pairs[picks, 0].sum(axis=1) / pairs[picks, 1].sum(axis=1)
            margins = np.minimum(margins, share - PASS_SHARE[name])  # type: ignore[index]
    return margins


def crossings(points: list[tuple[float, dict[str, Any]]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Capacity in each bootstrap sample: where the margin first falls below zero, between two loads by their logs."""
    loads = np.log([load for load, _ in points])
    margins = np.stack([drawn_margins(point, round(1000 * load)) for load, point in points])
    capacity = np.full(ROUNDS, loads[-1])
    for sample in range(ROUNDS):
        below = np.flatnonzero(margins[:, sample] < 0.0)
        if len(below):
            at = int(below[0])
            capacity[sample] = (
                loads[0] if at == 0 else _between(loads[at - 1 : at + 1], margins[at - 1 : at + 1, sample])
            )
    return np.exp(capacity)


def _between(loads: Any, margins: Any) -> float:
    return float(loads[0] + (loads[1] - loads[0]) * margins[0] / (margins[0] - margins[1]))


def interval(values: Any) -> str:
    low, middle, high = np.percentile(values, [2.5, 50, 97.5])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
