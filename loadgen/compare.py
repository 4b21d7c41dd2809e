"""Compare: one trace, several servers or policies, or one at several loads; one table, one page.

Owns which runs are made, and the paired difference of two sides. Promises are the first side's for all."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from loadgen import formats, records, shape, targets
from loadgen.judge import ClassVerdict, Verdict, resampled
from loadgen.judged import judge_one
from loadgen.report import aligned
from loadgen.search import Bounds, Edge, Measured, pooled, search
from loadgen.session import Plan, measure, read_budgets, serving
from loadgen.targets import Budgets, target_of
from loadgen.traces import CLASSES, ClassName, Trace

GOODPUT_SHARES = (0.90, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Side:
    """One of those that are compared; `serve` is started for its runs where it is given."""

    name: str
    target: str
    serve: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is asked for."""

    plan: Plan
    sides: tuple[Side, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    is_search: bool = False
    bounds: Bounds = Bounds()  # noqa: RUF009  it is frozen


class Difference(msgspec.Struct, frozen=True):
    """How much more of a class one side met than the first, paired by session; 95 % interval."""

    more: float
    low: float
    high: float


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """All that the page shows."""

    names: list[str]
    verdicts: list[Verdict]  # over all seeds, at the trace's own load; empty in a search
    differences: list[dict[ClassName, Difference]]  # of each side to the first
    edges: list[Edge]


def compare(trial: Trial) -> Compared:
    """Make every run. Raises ValueError for a trace or a target that cannot be used."""
    trace = formats.load(trial.plan.trace, trial.plan.is_strict)
    budgets = read_budgets(trial.plan.budgets) if trial.plan.budgets else None
    edges: list[Edge] = []
    sides: list[list[Measured]] = []
    for side in trial.sides:
        with _up(side):
            if budgets is None:
                budgets = targets.ask(side.target).budgets or targets.PUBLISHED
            at = _Runs(trial, side, trace, budgets)
            if trial.is_search:
                edges.append(search(side.name, at, budgets, trial.seeds, trial.bounds))
            else:
                sides.append([at(1.0, seed) for seed in trial.seeds])
    assert budgets is not None
    return Compared(
        names=[side.name for side in trial.sides],
        verdicts=[pooled(measured, budgets) for measured in sides],
        differences=[difference(sides[0], measured, budgets) for measured in sides],
        edges=edges,
    )


@contextlib.contextmanager
def _up(side: Side) -> Iterator[None]:
    with serving(shlex.split(side.serve), side.target):
        yield


@dataclass(frozen=True, slots=True)
class _Runs:
    """Measures one side at any load. Ctrl-C ends the whole comparison; the records of every run made are kept."""

    trial: Trial
    side: Side
    trace: Trace
    budgets: Budgets

    def __call__(self, load: float, seed: int) -> Measured:
        print(f"{self.side.name}: {load:.3g} times the sessions, seed {seed}", flush=True)
        plan = replace(self.trial.plan, target=self.side.target, seed=seed)
        run, found = measure(plan, shape.at_load(self.trace, load, seed), self.budgets)
        records.write(run, found, kept_at(plan.out, self.side.name, load, seed))
        if run.is_interrupted:
            raise KeyboardInterrupt
        return run, found


def kept_at(out: Path, side: str, load: float, seed: int) -> Path:
    """Where one run's records are."""
    return out.with_name(f"{out.name}-{side}-x{load:.3g}-seed{seed}.jsonl")


def difference(first: Sequence[Measured], other: Sequence[Measured], budgets: Budgets) -> dict[ClassName, Difference]:
    """Sessions are drawn with their pair on the other side, which had the same seed, trace and moment."""
    ours, theirs = _by_session(first, budgets), _by_session(other, budgets)
    return {name: _paired(ours[name], theirs[name]) for name in CLASSES if ours.get(name) and theirs.get(name)}


def _by_session(measured: Sequence[Measured], budgets: Budgets) -> dict[ClassName, dict[str, tuple[int, int]]]:
    """Met and offered, by class and session."""
    found: dict[ClassName, dict[str, tuple[int, int]]] = {}
    for seed, (run, asked) in enumerate(measured):
        for record in records.judged_of(run, asked):
            sessions = found.setdefault(record.request_class, {})
            name = f"{seed}/{record.parent or record.session or record.row}"
            met, offered = sessions.get(name, (0, 0))
            sessions[name] = met + judge_one(record, target_of(record, budgets)).is_met, offered + 1
    return found


def _paired(ours: dict[str, tuple[int, int]], theirs: dict[str, tuple[int, int]]) -> Difference:
    names = sorted(ours.keys() | theirs.keys())
    pairs = np.array([[*ours.get(name, (0, 0)), *theirs.get(name, (0, 0))] for name in names])
    more = [_more(*sums) for sums in resampled(pairs).tolist()]
    low, high = np.percentile(more, [2.5, 97.5])
    return Difference(_more(*pairs.sum(axis=0).tolist()), float(low), float(high))


def _more(met: int, offered: int, other_met: int, other_offered: int) -> float:
    return other_met / max(other_offered, 1) - met / max(offered, 1)


def compare_text(found: Compared) -> str:
    """For the terminal."""
    parts = [_sides_text(found)] if found.verdicts else []
    return "\n\n".join([*parts, *(edge_text(edge) for edge in found.edges)])


def _sides_text(found: Compared) -> str:
    rows = [["", "class", "met of offered", "95 % interval", "more than the first", "95 %", "TTFT p99 ms", "goodput/s"]]
    for side, verdict in enumerate(found.verdicts):
        more = found.differences[side] if side else {}
        for name, one in verdict.classes.items():
            rows.append([found.names[side], name, *_side_cells(one, more.get(name)), f"{verdict.goodput_per_s:.2f}"])
    return aligned(rows)


def _side_cells(one: ClassVerdict, more: Difference | None) -> list[str]:
    ttft = one.cell.ttft_s.p99
    gap = (
        ("-", "-") if more is None else (f"{100 * more.more:+.1f}", f"{100 * more.low:+.1f} to {100 * more.high:+.1f}")
    )
    return [
        f"{one.cell.met} of {one.cell.offered} ({one.cell.attainment:.1%})",
        f"{one.attainment_low:.1%} to {one.attainment_high:.1%}",
        *gap,
        "-" if ttft is None else f"{ttft * 1e3:.0f}",
    ]


def edge_text(edge: Edge) -> str:
    """A search's result in words, and its loads as a table."""
    rows = [["sessions", "a second", "goodput/s", *(f"{name} met %" for name in CLASSES), ""]]
    for one in edge.points:
        shares = [one.classes.get(name) for name in CLASSES]
        cells = ["-" if s is None else f"{100 * s.met:.1f} ({100 * s.low:.1f} to {100 * s.high:.1f})" for s in shares]
        rows.append([f"x{one.load:.3g}", f"{one.sessions_per_s:.3f}", f"{one.goodput_per_s:.2f}", *cells, one.mark])
    return f"{headline(edge)}\n{goodputs(edge)}\n{aligned(rows)}"


def goodputs(edge: Edge) -> str:
    """What met its promise at the largest load at which every class, whatever is wanted of it, met so much."""
    said = []
    for share in GOODPUT_SHARES:
        held = [one for one in edge.points if all(found.met >= share for found in one.classes.values())]
        most = max(held, key=lambda one: one.goodput_per_s, default=None)
        said.append(f"{share:.0%}: " + ("none" if most is None else f"{most.goodput_per_s:.2f}/s at x{most.load:.3g}"))
    return f"Most goodput of the loads tried, with every class at {', at '.join(said)}"


def headline(edge: Edge) -> str:
    """The capacity in one sentence."""
    if edge.capacity is None:
        why = f" ({edge.first_failed.mark})" if edge.first_failed and edge.first_failed.mark != "FAIL" else ""
        return f"{edge.name}: not even the smallest load passed{why}"
    said = f"{edge.name}: holds {edge.capacity.sessions_per_s:.3f} sessions a second (x{edge.capacity.load:.3g})"
    said += f" over {edge.seeds} seeds"
    if edge.first_failed is None:
        return f"{said}; the largest load tried passed"
    how = "failed" if edge.first_failed.mark == "FAIL" else f"did not pass ({edge.first_failed.mark})"
    said += f"; x{edge.first_failed.load:.3g} {how}"
    sure = "none" if edge.at_least is None else f"x{edge.at_least:.3g}"
    below = "none" if edge.less_than is None else f"x{edge.less_than:.3g}"
    return f"{said}. By the 95 % intervals: surely up to {sure}, surely not from {below}"
