"""Search: how many sessions a server holds: runs at several loads, each with several seeds, until the edge is found.

Owns the order of loads and what counts as the edge. Never sends anything: it is given a way to measure a load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from loadgen.judge import PASS_SHARE, Verdict, judge
from loadgen.records import Record, Run, judged_of
from loadgen.targets import Budgets
from loadgen.traces import ClassName

POINTS_MAX = 12  # loads of one search: from 1/4 to 8 times that is three doublings and nine halvings of what is left

Measured = tuple[Run, Sequence[Record]]
Measure = Callable[[float, int], Measured]  # at a load, with a seed


class Share(msgspec.Struct, frozen=True):
    """A class's attainment with its 95 % interval, by session over all seeds."""

    met: float
    low: float
    high: float
    wanted: float


def mark(classes: Mapping[ClassName, Share], is_pass: bool) -> str:
    """In words, as a single run's verdict is: a miss that the intervals cannot tell from chance is no proof."""
    if is_pass:
        return "pass"
    return "FAIL" if any(one.high < one.wanted for one in classes.values()) else "too few to say"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured at one load, over all seeds."""

    load: float  # times the trace's own sessions
    sessions_per_s: float
    goodput_per_s: float
    offered: int
    classes: dict[ClassName, Share]
    is_pass: bool
    invalid: list[str]

    @property
    def is_sure(self) -> bool:
        """The intervals lie on one side of what is wanted: all above, or one wholly below."""
        shares = self.classes.values()
        return all(one.low >= one.wanted for one in shares) or any(one.high < one.wanted for one in shares)

    @property
    def mark(self) -> str:
        """Pass, FAIL, too few to say, or why its runs prove nothing."""
        return "; ".join(self.invalid) or mark(self.classes, self.is_pass)


class Bounds(msgspec.Struct, frozen=True):
    """Where a search looks: loads as multiples of the trace's own sessions."""

    low: float = 0.25
    high: float = 8.0
    tolerance: float = 0.1  # it ends when the failing load is at most so much above the passing one


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """A search's result: the highest load that passed below the first that failed, and what is sure about it."""

    name: str
    points: list[Point]  # by load
    seeds: int
    capacity: Point | None  # None: not even the smallest load passed
    first_failed: Point | None  # the first that did not pass, perhaps by chance; None: every load passed
    at_least: float | None  # the highest load up to which every interval lies above what is wanted
    less_than: float | None  # the lowest load where an interval lies below it


def pooled(measured: Sequence[Measured], budgets: Budgets) -> Verdict:
    """One verdict over several seeds: their sessions stay apart."""
    runs = [run for run, _ in measured]
    found = [
        msgspec.structs.replace(record, session=_apart(seed, record.session), parent=_apart(seed, record.parent))
        for seed, (_, records) in enumerate(measured)
        for record in records
    ]
    whole = msgspec.structs.replace(
        runs[0],
        duration_s=sum(run.judged_s for run in runs) + runs[0].warmup_s,
        wall_s=sum(run.wall_s for run in runs),
        client_cpu_s=sum(run.client_cpu_s for run in runs),
        is_interrupted=any(run.is_interrupted for run in runs),
        not_reached=sum(run.not_reached for run in runs),
    )
    return judge(whole, found, budgets)


def _apart(seed: int, name: str) -> str:
    return f"{seed}/{name}" if name else ""


def point(load: float, verdict: Verdict, sessions: int) -> Point:
    """A pooled verdict as a point of the curve."""
    return Point(
        load=load,
        sessions_per_s=sessions / verdict.run.judged_s,
        goodput_per_s=verdict.goodput_per_s,
        offered=verdict.offered,
        classes={
            name: Share(found.cell.attainment, found.attainment_low, found.attainment_high, PASS_SHARE[name])
            for name, found in verdict.classes.items()
        },
        is_pass=verdict.is_pass,
        invalid=verdict.invalid,
    )


def search(name: str, measure: Measure, budgets: Budgets, seeds: Sequence[int], bounds: Bounds) -> Edge:
    """Double from the low bound until a load fails or the high one passes, then halve what lies between."""
    points: dict[float, Point] = {}

    def passes(load: float) -> bool:
        measured = [measure(load, seed) for seed in seeds]
        sessions = sum(_sessions(judged_of(run, records)) for run, records in measured)
        points[load] = point(load, pooled(measured, budgets), sessions)
        return points[load].is_pass

    best, worst, load = 0.0, 0.0, bounds.low
    while len(points) < POINTS_MAX:
        if passes(load):
            best = load
        else:
            worst = load
        if not best or (worst and worst <= best * (1 + bounds.tolerance)) or (not worst and best >= bounds.high):
            break
        load = (best + worst) / 2 if worst else min(bounds.high, best * 2)
    ordered = [points[load] for load in sorted(points)]
    return Edge(
        name=name,
        points=ordered,
        seeds=len(seeds),
        capacity=points.get(best),
        first_failed=points.get(worst),
        at_least=_at_least(ordered),
        less_than=next((one.load for one in ordered if _is_surely_below(one)), None),
    )


def _sessions(records: Sequence[Record]) -> int:
    """Sessions that began; a row without one counts as one, a sub-agent as part of its caller's."""
    return len({record.parent or record.session or f"\0{record.row}" for record in records})


def _at_least(points: Sequence[Point]) -> float | None:
    found = None
    for one in points:
        if not (one.is_pass and one.is_sure):
            break
        found = one.load
    return found


def _is_surely_below(one: Point) -> bool:
    return any(share.high < share.wanted for share in one.classes.values())
