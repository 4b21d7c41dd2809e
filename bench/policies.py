"""Policies against each other in the simulator: capacity with intervals, curves, 2 x 2, ablations, classes, overload.

Owns who is compared and the tables; bench/policy_lab.py makes the runs and keeps them. Losing cases stay in. Every
figure is simulated, not validated. `--quick` takes minutes; without it, hours."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bench.policy_lab import PROFILE, Lab, Make, Scale, Workloads, crossings, interval, shares
from loadgen.simulate import LABEL
from loadgen.traces import CLASSES
from policies import plugins
from policies.admission import admit_always
from policies.api import PolicySpec
from policies.builtin import headway
from policies.placement import lmetric_place

CHAT_SHARE_HELD = 0.6  # of its capacity, while the rest grows

Policies = dict[str, Make]

QUICK = Scale(4, 150.0, 30.0, 1, ("mix",))
FULL = Scale(4, 900.0, 180.0, 3, ("mix", "mooncake", "azure", "weka"))


# Who decides ----------------------------------------------------------------------------------------------------------


def _named(router: str, engine: str, **params: Any) -> Make:
    return lambda: (plugins.load(PolicySpec(router, params)), engine)


def _changed(**changes: Any) -> Make:
    return lambda: (replace(headway({}), **changes), "headway")


def _weighed(**weights: Any) -> Make:
    return _named("headway", "headway", weights=weights)


CONTEST: Policies = {
    "headway + headway": _named("headway", "headway"),
    "lmetric + priority-2048": _named("lmetric", "priority-2048"),
    "cache_aware + priority-2048": _named("cache_aware", "priority-2048"),
    "dynamo + priority-2048": _named("dynamo", "priority-2048"),
    "lmetric + niyama": _named("lmetric", "niyama"),
    "cache_aware + static-2048, as shipped": _named("cache_aware", "static-2048"),
    "round_robin + static-2048": _named("round_robin", "static-2048"),
}
QUICK_CONTEST = ("headway + headway", "lmetric + priority-2048", "cache_aware + static-2048, as shipped")
# Three baselines have knobs; each gets as many tries.
TUNING: dict[str, Policies] = {
    "lmetric": {f"lmetric + {engine}": _named("lmetric", engine) for engine in ("priority-512", "priority-8192")},
    "cache_aware": {
        f"cache_aware {threshold} + priority-2048": _named("cache_aware", "priority-2048", cache_threshold=threshold)
        for threshold in (0.3, 0.8)
    },
    "dynamo": {
        f"dynamo {overlap} + priority-2048": _named("dynamo", "priority-2048", overlap=overlap)
        for overlap in (2.0, 0.5)
    },
}
SQUARE: Policies = {
    f"{router} + {engine}": _named(router, engine)
    for router in ("headway", "lmetric")
    for engine in ("headway", "priority-2048")
}
ABLATIONS: Policies = {
    "headway": _named("headway", "headway"),
    "no spreading": _weighed(spread=(0.0, 0.0, 0.0)),
    "no safety in time": _weighed(sure=(0.0, 0.0, 0.0)),
    "no displaced cache": _weighed(reuse=0.0),
    "no tie band": _weighed(near=0.0),
    "no late binding": _changed(admit=admit_always),
    "LMetric placement": _changed(place=lmetric_place),
    "static-2048 steps": _named("headway", "static-2048"),
    "priority-2048 steps": _named("headway", "priority-2048"),
    "niyama steps": _named("headway", "niyama"),
}


# Tables ---------------------------------------------------------------------------------------------------------------

Table = tuple[str, list[list[str]]]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def capacity_tables(lab: Lab, case: str, policies: Policies, title: str) -> Iterable[Table]:
    """Capacity by policy, its ratio to Headway's, and the curves."""
    found = {name: lab.bisect(case, name, make) for name, make in policies.items()}
    capacity = {name: crossings(points) for name, points in found.items()}
    ours = capacity[next(iter(policies))]
    rows = [["policy", "capacity (95 % interval)", "first row / this one"]]
    rows += [[name, interval(values), interval(ours / values)] for name, values in capacity.items()]
    yield f"{title}: {case}, in multiples of load 1", rows
    curve = [["policy", "load", *(f"{name} met %" for name in CLASSES), "hit %", "busy %", "refused"]]
    for name, points in found.items():
        curve += [[name, f"{load:.2f}", *_figures(point)] for load, point in points]
    yield f"Attainment: {case}", curve


def _figures(point: dict[str, Any]) -> list[str]:
    by_class = shares(point)
    return [
        *(percent(by_class.get(name)) for name in CLASSES),
        percent(point["hit"]),
        percent(point["busy"]),
        str(point["refused"]),
    ]


def ablation_table(lab: Lab, case: str, load: float) -> Table:
    rows = [["without", *(f"{name} met %" for name in CLASSES), "hit %", "busy %", "refused"]]
    rows += [[name, *_figures(lab.point(case, load, f"ablation {name}", make))] for name, make in ABLATIONS.items()]
    return f"Ablations: {case} at load {load:.2f}", rows


def class_tables(lab: Lab, load: float) -> Iterable[Table]:
    """What inferred classes cost against declared ones, and how often each is right from the third request on."""
    make = CONTEST["headway + headway"]
    rows = [["classes", *(f"{name} met %" for name in CLASSES), "hit %", "busy %", "refused"]]
    told = {
        "declared": {"is_oracle": True},
        "headers": {"stripped": 0.0},
        "20 % stripped": {},
        "all stripped": {"stripped": 1.0},
    }
    points = {name: lab.point("mix", load, "classes", make, **options) for name, options in told.items()}
    yield (
        f"Declared and inferred classes: mix at load {load:.2f}",
        rows + [[n, *_figures(p)] for n, p in points.items()],
    )
    rows = [["clients", "true class", "requests", *(f"taken for {name} %" for name in CLASSES)]]
    for name in ("headers", "all stripped"):
        for cls, counts in points[name]["seen"].items():
            total = sum(counts.values())
            if total:
                rows.append([name, cls, str(total), *(percent(counts.get(to, 0) / total) for to in CLASSES)])
    yield "Classifier, from the third request of a session on", rows


def overload_table(lab: Lab, load: float) -> Table:
    """Chat held at 0.6 of its capacity while all else grows; then all of it together."""
    rows = [["offered", "policy", *(f"{name} met %" for name in CLASSES), "hit %", "busy %", "refused"]]
    names = ("headway + headway", "lmetric + priority-2048")
    for times in (1, 3, 10):
        for name in names:
            point = lab.point("mix", load * times, f"held {name}", CONTEST[name], chat_load=CHAT_SHARE_HELD * load)
            rows.append([f"chat x0.6, the rest x{times}", name, *_figures(point)])
    for times in (1, 3):
        for name in names:
            point = lab.point("mix", load * times, f"over {name}", CONTEST[name])
            rows.append([f"all x{times}", name, *_figures(point)])
    return f"Overload: mix, load 1 is {load:.2f}", rows


def markdown(tables: Iterable[Table]) -> str:
    parts = []
    for title, rows in tables:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * len(rows[0]))
        parts.append(f"### {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def page(tables: list[Table], scale: Scale) -> str:
    """One page, nothing fetched."""
    body = []
    for title, (head, *rows) in tables:
        cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body.append(f"<h2>{escape(title)}</h2><table><tr>{heads}</tr>{cells}</table>")
    style = "body{font:15px system-ui;margin:2em auto;max-width:70em}td,th{padding:.2em .8em;text-align:left}"
    said = (
        f"{scale.workers} x {PROFILE.name}: {PROFILE.source}; {scale.duration_s:.0f} s, {scale.warmup_s:.0f} s of them"
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>Policies: {LABEL}</title><style>{style}</style>"
        f"<h1>Policies: {LABEL}</h1><p>{escape(said)} not judged, {scale.seeds} seeds.</p>{''.join(body)}"
    )


def tables_of(lab: Lab, *, is_quick: bool) -> Iterable[Table]:
    """All tables, in the order of their worth."""
    names = QUICK_CONTEST if is_quick else tuple(CONTEST)
    contest = {name: CONTEST[name] for name in names}
    tuned = {} if is_quick else {name: make for tries in TUNING.values() for name, make in tries.items()}
    for case in lab.scale.workloads:
        yield from capacity_tables(lab, case, contest | tuned, "Capacity")
    ours = lab.bisect("mix", names[0], CONTEST[names[0]])
    load = float(np.median(crossings(ours)))
    square = [["router + engine", *(f"{name} met %" for name in CLASSES), "hit %", "busy %", "refused"]]
    square += [[name, *_figures(lab.point("mix", load, name, make))] for name, make in SQUARE.items()]
    yield f"Router x engine: mix at Headway's capacity, {load:.2f}", square
    yield ablation_table(lab, "mix", load)
    yield from class_tables(lab, load)
    yield overload_table(lab, load)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a mix alone, three policies: minutes")
    parser.add_argument("--traces", type=Path, default=os.environ.get("HEADWAY_TRACES"), help="folder of public traces")
    parser.add_argument("--out", type=Path, default=Path("out/policies"), help="OUT.html, .json, .md and .runs.jsonl")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    if not arguments.traces:
        scale = replace(scale, workloads=("mix",))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    store = arguments.out.with_name(f"{arguments.out.name}.{'quick' if arguments.quick else 'full'}.runs.jsonl")
    lines = store.read_text().splitlines() if store.exists() else []
    found = {line["key"]: line for line in map(json.loads, lines)}
    folder = Path(arguments.traces) if arguments.traces else None
    lab = Lab(scale, Workloads(folder, scale.duration_s), store, found)
    tables: list[Table] = []
    for table in tables_of(lab, is_quick=arguments.quick):
        tables.append(table)
        print(f"\n{markdown([table])}", flush=True)
        arguments.out.with_suffix(".html").write_text(page(tables, scale))
        arguments.out.with_suffix(".md").write_text(f"{LABEL}\n\n{markdown(tables)}\n")
        arguments.out.with_suffix(".json").write_text(json.dumps({"label": LABEL, "tables": tables}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
