"""Policies against each other in the simulator: tuned baselines, capacities, what earns them, classes, overload.

Owns the command and how much it runs; bench/policy_tables.py says what is compared, policy_lab.py keeps the runs.
Losing cases stay in. Every figure is simulated, not validated."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.policy_lab import Lab, Scale, Slice
from bench.policy_pages import markdown, page
from bench.policy_runs import TITLES
from bench.policy_sides import OURS, SHIPPED, tuned_name
from bench.policy_tables import Report, Section
from loadgen.simulate import LABEL

MAIN = (OURS, tuned_name("lmetric"), tuned_name("cache_aware"), tuned_name("dynamo"), SHIPPED)
# quick: 5 minutes; part: half an hour on one core; full: 3 hours on two.
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "quick",
            (Slice("mix", 150.0, 30.0, 1, 8.0),),
            contest=(OURS, tuned_name("lmetric"), SHIPPED),
            tuning_loads=(),
            overload=(1.0, 3.0),
        ),
        Scale(
            "part",
            (
                Slice("mix", 150.0, 30.0, 3, 8.0, table_seeds=1),
                Slice("mooncake", 150.0, 30.0, 1, 1.2, most=11.0),
                Slice("azure", 150.0, 30.0, 1, 1.7, most=11.0, workers=2),
                Slice("weka", 120.0, 40.0, 1, 5.0, most=16.0, workers=2),
            ),
            contest=MAIN,
            tuning_loads=(0.85,),
        ),
        Scale(
            "full",
            (
                Slice("mix", 900.0, 300.0, 3, 8.0),
                Slice("mooncake", 600.0, 120.0, 3, 1.2, most=2.8),
                Slice("azure", 600.0, 120.0, 3, 1.7, most=2.8, workers=2),
                Slice("weka", 240.0, 60.0, 3, 5.0, most=9.0, workers=2),
            ),
        ),
    )
}


def run(lab: Lab, out: Path) -> list[Section]:
    """All sections, each written as soon as it is there."""
    sections: list[Section] = []
    for section in Report(lab).sections():
        sections.append(section)
        print(f"\n{markdown([section])}", flush=True)
        said = [*about(lab), *command()]
        out.with_suffix(".html").write_text(page(sections, said))
        out.with_suffix(".md").write_text(f"{LABEL}\n\n{' '.join(said)}\n\n{markdown(sections)}\n")
        tables = [{"title": one.title, "note": one.note, "rows": one.rows} for one in sections]
        whole = {"label": LABEL, "about": said, "tables": tables}
        out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    return sections


def about(lab: Lab) -> list[str]:
    """What was run, as sentences."""
    scale = lab.scale
    return [
        f"Scale {scale.name}. " + " ".join(map(_size, scale.slices)),
        f"{lab.runs} runs of {lab.requests} requests took {lab.cpu_s / 60:.0f} CPU minutes "
        f"({lab.requests / max(lab.cpu_s, 1e-9):.0f} requests a CPU second), {lab.made} of them made by this command.",
        f"Commit {_commit()}, code {lab.code}; {platform.machine()}, {os.cpu_count()} cores.",
    ]


def _size(part: Slice) -> str:
    return (
        f"{TITLES[part.case]}: {part.workers} simulated workers, {part.duration_s:.0f} s offered, the first "
        f"{part.warmup_s:.0f} s not judged, {part.seeds} seed{'s' if part.seeds > 1 else ''} a point"
        + (f" of curves, {part.table_seeds} of other tables." if part.table_seeds else ".")
    )


def command() -> list[str]:
    """How to make it again."""
    return [f"Made by: python -m bench.policies {' '.join(sys.argv[1:])}".rstrip()]


def _seeded(scale: Scale, seeds: int) -> Scale:
    return replace(scale, slices=tuple(replace(one, seeds=seeds) for one in scale.slices)) if seeds > 0 else scale


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--scale", choices=SCALES, default="full", help="quick: 5 min; part: half an hour; full: 3 h on 2 cores"
    )
    parser.add_argument("--seeds", type=int, default=0, help="another number of seeds a point; kept runs stay")
    parser.add_argument("--quick", action="store_const", const="quick", dest="scale", help="the same as --scale quick")
    parser.add_argument("--traces", type=Path, default=os.environ.get("HEADWAY_TRACES"), help="folder of public traces")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a process each (2)")
    parser.add_argument("--out", type=Path, default=Path("out/policies"), help="OUT.html, .json, .md and .runs.jsonl")
    chosen = parser.parse_args(arguments)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(chosen.traces) if chosen.traces else None
    lab = Lab(
        _seeded(SCALES[chosen.scale], chosen.seeds),
        folder,
        chosen.out.with_suffix(".runs.jsonl"),
        jobs=max(1, chosen.jobs),
    )
    try:
        run(lab, chosen.out)
    finally:
        lab.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
