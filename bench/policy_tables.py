"""The tables of bench/policies.py by their worth: tuning, capacities, curves, what earns them, classes, overload.

Owns what is compared with what and the goals beside it. Makes no run itself; losing cases stay in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from bench.policy_lab import Curve, Floats, Lab, crossings, interval, lower, margin, shares, users_p5
from bench.policy_runs import LOADS, TITLES, Side, Tallies, missing
from bench.policy_sides import ABLATIONS, CLASSIFIERS, GRIDS, OURS, PUBLISHED, SHIPPED, tuned_name
from loadgen.traces import CLASSES

Labels = Literal["declared", "inferred"]
Rows = list[list[str]]

CHAT_SHARE_HELD = 0.6  # of its capacity, while the rest grows
BEYOND = 1.2  # times capacity: where a term's absence shows
USER_OFFERED_MIN = 50  # a smaller run says that it has no such user
BATCH = {"workers": 1, "duration_s": 60.0, "warmup_s": 15.0}  # a worker's backlog is all that batch's rate needs
BATCH_LOAD = 250.0  # of jobs: more than one worker can do
FIGURES = ["chat %", "agents %", "jobs %", "on line %", "smooth %", "TTFT p99 s", "users p5 %", "hit %", "busy %"]
FIGURES += ["refused"]


@dataclass(frozen=True, slots=True)
class Section:
    """A table with what a reader must know of it. `curves`: by policy, for the page's figure."""

    title: str
    note: str
    rows: Rows
    curves: dict[str, Curve] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """Makes the sections one after another; what one found, later ones use."""

    lab: Lab
    goals: Rows = field(default_factory=lambda: [["goal", "wanted", "found", "verdict"]])
    _capacity: dict[tuple[str, Labels], dict[str, Floats]] = field(default_factory=dict)
    _sides: dict[str, dict[str, Side]] = field(default_factory=dict)  # by case: who takes part

    def sections(self) -> Iterator[Section]:
        """All of them. A workload that is not there is left out, and said so."""
        if skipped := self.skipped():
            yield skipped
        for case in self._cases():
            yield from self._tuned(case)
            yield from self._capacities(case, "declared")
            if case in ("mix", "weka"):  # in the others nobody says more than one class
                yield from self._capacities(case, "inferred")
        if ("mix", "inferred") in self._capacity:
            load = float(np.median(self._capacity["mix", "inferred"][OURS]))
            yield self._square(load)
            yield from self._ablations(load)
            yield from self._classes(load)
            yield from self._overload(load)
            yield self._batch(load)
        yield Section("Goals", "Claims are lower bounds of 95 % intervals.", self.goals)

    def skipped(self) -> Section | None:
        """Which workloads cannot be run here, and why."""
        found = [(case, missing(case, self.lab.folder)) for case in self.lab.scale.cases]
        rows = [[TITLES[case], reason] for case, reason in found if reason]
        return Section("Skipped", "", [["workload", "reason"], *rows]) if rows else None

    def _cases(self) -> list[str]:
        return [case for case in self.lab.scale.cases if not missing(case, self.lab.folder)]

    # Capacity --------------------------------------------------------------------------------------------------------

    def _near(self, case: str) -> float:
        return self.lab.scale.slice(case).start

    def _tuned(self, case: str) -> Iterator[Section]:
        """Each baseline's grid on the tuning half; who wins takes part."""
        scale, lab = self.lab.scale, self.lab
        winners = {family: next(iter(grid.values())) for family, grid in GRIDS.items()}
        if scale.tuning_loads:
            told: dict[str, Any] = {"is_tuning": True, "labels": "declared"}
            ours = lab.curve(case, Side(), self._near(case), **told)
            loads = [share * float(np.median(crossings(ours))) for share in scale.tuning_loads]
            tries = [(family, name, side) for family, grid in GRIDS.items() for name, side in grid.items()]
            work = [partial(lab.point, case, load, side, **told) for *_, side in tries for load in loads]
            margins = [margin(found) for found in lab.each(work)]
            scores = {name: margins[at * len(loads) :][: len(loads)] for at, (_, name, _) in enumerate(tries)}
            rows = [["router", "parameters tried", *(f"margin at {load:.2f}" for load in loads), "taken"]]
            for family, grid in GRIDS.items():
                best = max(grid, key=lambda name: sum(scores[name]))
                winners[family] = grid[best]
                for name in grid:
                    said = [f"{100 * one:+.1f}" for one in scores[name]]
                    rows.append([family, name, *said, "yes" if name == best else ""])
            note = (
                "Equal budgets: four tries each on the tuning half (other seeds; of recorded traces the first half of "
                "their time, of Weka half of the sessions). Margin: points of the worst class over its bar. Headway's "
                "own constants were chosen by hand on other seeds of the mix and are the same everywhere."
            )
            yield Section(f"Tuning: {TITLES[case]}", note, rows)
        sides = {OURS: Side(), **{tuned_name(family): side for family, side in winners.items()}, **PUBLISHED}
        self._sides[case] = {name: side for name, side in sides.items() if name in (scale.contest or sides)}

    def _capacities(self, case: str, labels: Labels) -> Iterator[Section]:
        lab, sides = self.lab, self._sides[case]
        if labels == "inferred":  # the cost of inference: ours, the best of the others, the one as shipped
            declared = self._capacity[case, "declared"]
            best = max((name for name in sides if name not in (OURS, SHIPPED)), key=lambda n: np.median(declared[n]))
            sides = {name: side for name, side in sides.items() if name in (OURS, best, SHIPPED)}
        ours = lab.curve(case, sides[OURS], self._near(case), labels=labels)
        near = float(np.median(crossings(ours)))
        others = {name: side for name, side in sides.items() if name != OURS}
        work = [partial(lab.curve, case, side, near, labels=labels) for side in others.values()]
        curves = {OURS: ours, **dict(zip(others, lab.each(work), strict=True))}
        capacity = {name: crossings(curve) for name, curve in curves.items()}
        self._capacity[case, labels] = capacity
        rows = [["policy", "router", "engine", "capacity (95 % interval)", "Headway's / this one"]]
        for name, found in capacity.items():
            side = sides[name]
            router = f"{side.router} {' '.join(f'{k}={v}' for k, v in side.params.items())}".strip()
            ratio = _ratio(capacity[OURS], ours, found, curves[name])
            rows.append([name, router, side.engine, _bounded(found, curves[name]), ratio])
        table = "A, declared classes" if labels == "declared" else "B, inferred classes, 20 % of sessions stripped"
        note = (
            f"In {LOADS[case]}; the largest at which 99 % of chat, 95 % of agents and 99 % of jobs keep their promise."
        )
        yield Section(f"Capacity: {TITLES[case]}; {table}", note, rows, curves)
        yield Section(
            f"Attainment: {TITLES[case]}; {table}",
            "Met of what was offered, by true class. Of chat: on line is every token by its due time, smooth no gap "
            "over 200 ms, users p5 the user at the 5th percentile of those who asked 50 times.",
            [["policy", "load", *FIGURES]]
            + [[name, f"{load:.2f}", *_figures(found)] for name, curve in curves.items() for load, found in curve],
        )
        if not any(map(_is_open, curves.values())):
            self._judge_capacity(case, labels, capacity)

    def _judge_capacity(self, case: str, labels: Labels, capacity: dict[str, Floats]) -> None:
        if labels == "inferred":
            cost = capacity[OURS] / self._capacity[case, "declared"][OURS]
            self._goal(f"{case}: inferred classes against declared ones", 0.97, lower(cost), interval(cost))
            return
        tuned = {name: found for name, found in capacity.items() if name not in (OURS, *PUBLISHED)}
        if tuned:
            best = max(tuned, key=lambda name: np.median(tuned[name]))
            ratio = capacity[OURS] / tuned[best]
            self._goal(f"{case}: capacity over the best tuned ({best})", 1.5, lower(ratio), interval(ratio))
        if SHIPPED in capacity:
            ratio = capacity[OURS] / capacity[SHIPPED]
            self._goal(f"{case}: capacity over cache_aware as shipped", 2.0, lower(ratio), interval(ratio))

    def _goal(self, name: str, wanted: float, claimed: float, said: str) -> None:
        self.goals.append([name, f"at least {wanted:g}", said, "shown" if claimed >= wanted else "not shown"])

    # What earns it ---------------------------------------------------------------------------------------------------

    def _square(self, near: float) -> Section:
        """Capacities of router x engine: which half earns what."""
        lab = self.lab
        baseline = self._sides["mix"].get(tuned_name("lmetric"), Side("lmetric", "priority-2048"))
        cells = [Side(router, engine) for router in ("headway", "lmetric") for engine in ("headway", baseline.engine)]
        curves = lab.each([partial(lab.curve, "mix", side, near) for side in cells])
        both, router, engine, neither = (crossings(curve) for curve in curves)
        rows = [["router", "engine", "capacity (95 % interval)", "of Headway + Headway"]]
        for side, curve, found in zip(cells, curves, (both, router, engine, neither), strict=True):
            rows.append([side.router, side.engine, _bounded(found, curve), _ratio(found, curve, both, curves[0])])
        note = (
            f"Inferred classes. The router alone earns {interval(router / neither)} times the capacity of LMetric with "
            f"{baseline.engine}, the engine alone "
            f"{interval(engine / neither)}, both together {interval(both / neither)}."
        )
        names = [f"{side.router} + {side.engine}" for side in cells]
        return Section(f"Router x engine: {TITLES['mix']}", note, rows, dict(zip(names, curves, strict=True)))

    def _ablations(self, load: float) -> Iterator[Section]:
        lab = self.lab
        for times, word in ((1.0, "at Headway's capacity"), (BEYOND, f"at {BEYOND:g} times Headway's capacity")):
            found = lab.each([partial(lab.point, "mix", times * load, side) for side in ABLATIONS.values()])
            rows = [["without", *FIGURES]] + [
                [name, *_figures(one)] for name, one in zip(ABLATIONS, found, strict=True)
            ]
            note = f"Load {times * load:.2f}, inferred classes. What changes nothing by its absence earns nothing here."
            yield Section(f"Ablations: {TITLES['mix']}, {word}", note, rows)

    def _classes(self, load: float) -> Iterator[Section]:
        """What knowing the class is worth, and how often each is right from the third request on."""
        lab = self.lab
        work = [partial(lab.point, "mix", load, side, **told) for side, told in CLASSIFIERS.values()]
        found = dict(zip(CLASSIFIERS, lab.each(work), strict=True))
        yield Section(
            f"Who says the class: {TITLES['mix']}, load {load:.2f}",
            "The same requests and policy; only the classifier and the clients' headers differ.",
            [["classes", *FIGURES], *([name, *_figures(one)] for name, one in found.items())],
        )
        rows = [["classifier", "true class", "requests", *(f"taken for {name} %" for name in CLASSES)]]
        for name, one in found.items():
            for cls, counts in one.seen.items():
                if total := sum(counts.values()):
                    rows.append([name, cls, str(total), *(percent(counts[to] / total) for to in CLASSES)])
        yield Section("Classifier, from the third request of a session on", "Jobs have no session: all count.", rows)
        for name, most, recall in (("Headway's, all send headers", 0.5, 90), ("Headway's, all stripped", 2.0, 80)):
            self._judge_classes(name, found[name], most, recall)

    def _judge_classes(self, name: str, found: Tallies, demoted_max: float, recall_min: float) -> None:
        for cls, counts in found.seen.items():
            if not (total := sum(counts.values())):
                continue
            share = 100 * counts[cls] / total
            is_chat = cls == "chatbot+"
            wanted = f"under {demoted_max:g} % demoted" if is_chat else f"recall at least {recall_min:g} %"
            is_good = 100 - share < demoted_max if is_chat else share >= recall_min
            said = f"{100 - share:.1f} % of {total} demoted" if is_chat else f"{share:.1f} % of {total}"
            self.goals.append([f"{name}: {cls}", wanted, said, "shown" if is_good else "missed"])

    # Too much --------------------------------------------------------------------------------------------------------

    def _overload(self, load: float) -> Iterator[Section]:
        """Chat held at 0.6 of its capacity while all else grows; then all of it together."""
        lab, sides = self.lab, self._sides["mix"]
        names = [name for name in (OURS, tuned_name("lmetric"), SHIPPED) if name in sides]
        times = lab.scale.overload
        held = [(by, name) for by in times for name in names]
        work = [
            partial(lab.point, "mix", load * by, sides[name], chat_load=CHAT_SHARE_HELD * load) for by, name in held
        ]
        found = lab.each(work)
        rows = [["the rest at", "policy", *FIGURES]]
        rows += [[f"{by:g}x", name, *_figures(one)] for (by, name), one in zip(held, found, strict=True)]
        title = f"Overload: chat held at {CHAT_SHARE_HELD:g} of capacity {load:.2f}, the rest grows"
        yield Section(title, f"{TITLES['mix']}, inferred classes.", rows)
        chat = dict(zip(held, (shares(one).get("chatbot+", 0.0) for one in found), strict=True))[times[-1], OURS]
        self._goal(f"chat met % with the rest at {times[-1]:g}x", 99.4, 100 * chat, percent(chat))
        yield from self._all_over(load, names)

    def _all_over(self, load: float, names: Sequence[str]) -> Iterator[Section]:
        lab, sides = self.lab, self._sides["mix"]
        over = [(by, name) for by in lab.scale.overload for name in names]
        found = lab.each([partial(lab.point, "mix", load * by, sides[name]) for by, name in over])
        met = {key: _chat_met_per_s(one) for key, one in zip(over, found, strict=True)}
        peak = {name: max(met[by, name] for by in lab.scale.overload) for name in names}
        rows = [["all at", "policy", "chat met a second", "of its peak %", *FIGURES]]
        for (by, name), one in zip(over, found, strict=True):
            share = percent(met[by, name] / peak[name] if peak[name] else None)
            rows.append([f"{by:g}x", name, f"{met[by, name]:.2f}", share, *_figures(one)])
        yield Section(f"Overload: all grows from capacity {load:.2f}", f"{TITLES['mix']}, inferred classes.", rows)
        last = met[lab.scale.overload[-1], OURS] / max(peak[OURS], 1e-9)
        self._goal(f"chat met a second at {lab.scale.overload[-1]:g}x, of the peak", 0.9, last, f"{last:.2f}")

    def _batch(self, load: float) -> Section:
        """What is left for jobs beside chat that keeps its promises, and the worst user at capacity."""
        lab, chat_load = self.lab, CHAT_SHARE_HELD * load / self.lab.scale.slice("mix").workers
        kinds = {
            "jobs alone": {"chat_load": 0.0, "jobs_load": BATCH_LOAD},
            "chat alone": {"chat_load": chat_load, "jobs_load": 0.0},
            "both": {"chat_load": chat_load, "jobs_load": BATCH_LOAD},
        }
        found = dict(
            zip(
                kinds,
                lab.each([partial(lab.point, "mix", 0.0, Side(), **(BATCH | told)) for told in kinds.values()]),
                strict=True,
            )
        )
        rate = {name: one.tokens_per_s["data-processor"] for name, one in found.items()}
        wanted = rate["jobs alone"] * (1.0 - found["chat alone"].busy)
        rows = [["offered", "job tokens a second", "of jobs alone %", "chat requests", "chat %", "busy %"]]
        for name, one in found.items():
            chat = sum(offered for *_, offered in one.groups["chatbot+"])
            part = percent(rate[name] / max(rate["jobs alone"], 1e-9))
            rows.append(
                [name, f"{rate[name]:.0f}", part, str(chat), percent(shares(one).get("chatbot+")), percent(one.busy)]
            )
        share = rate["both"] / max(wanted, 1e-9)
        self._goal("batch beside chat, of what chat leaves of the device", 0.9, share, f"{share:.2f}")
        at_capacity = lab.point("mix", load, Side())
        p5, worst = users_p5(at_capacity, USER_OFFERED_MIN)
        said = f"{percent(p5)} %, the worst is {worst}" if p5 is not None else "no user asked 50 times"
        self._goal("users' p5 of chat met % at capacity", 95.0, 100 * (p5 or 0.0), said)
        note = f"One worker, a backlog of jobs, chat at load {chat_load:.2f}. "
        note += (
            "Tokens of prompts and answers that ended within the measured time. Busy counts every step, also that of "
        )
        note += "a single decode, so what chat is said to leave is too little, and the goal too easy."
        return Section("Batch beside chat", note, rows)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _is_open(curve: Curve) -> bool:
    """The curve ended before it crossed its bar."""
    return margin(curve[0][1]) < 0.0 or margin(curve[-1][1]) >= 0.0


def _bounded(found: Floats, curve: Curve) -> str:
    """An interval, or on which side of the curve it would be."""
    if not _is_open(curve):
        return interval(found)
    return f"under {curve[0][0]:.2f}" if margin(curve[0][1]) < 0.0 else f"over {curve[-1][0]:.2f}"


def _ratio(ours: Floats, our_curve: Curve, theirs: Floats, their_curve: Curve) -> str:
    return "-" if _is_open(our_curve) or _is_open(their_curve) else interval(ours / theirs)


def _chat_met_per_s(found: Tallies) -> float:
    return sum(met for _, met, _ in found.groups["chatbot+"]) / found.measured_s


def _figures(found: Tallies) -> list[str]:
    by_class = shares(found)
    chat = sum(offered for *_, offered in found.groups["chatbot+"])
    p5, _ = users_p5(found, USER_OFFERED_MIN)
    return [
        *(percent(by_class.get(name)) for name in CLASSES),
        percent(found.on_line["chatbot+"] / chat if chat else None),
        percent(found.smooth["chatbot+"] / chat if chat else None),
        f"{found.ttft_p99_s:.2f}" if found.ttft_p99_s else "-",
        percent(p5),
        percent(found.hit),
        percent(found.busy),
        str(found.refused),
    ]
