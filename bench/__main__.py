"""`make bench`: runs benchmarks in turn, all or those named. Each prints its table last and keeps its result as JSON.

Owns the list. `python -m bench.NAME --help` tells what one of them takes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

RESULTS = "bench/results"
BENCHES: dict[str, tuple[str, ...]] = {
    "engine_cpu": (),
    "pacing": ("--real", "--out", f"{RESULTS}/pacing.json"),
    "fp8_error": (),
    "tiers": ("--out", f"{RESULTS}/tiers.json"),
    "step_host": ("--out", f"{RESULTS}/step_host.json"),
    "dispatcher": ("--out", f"{RESULTS}/dispatcher.json"),
    "link": ("--out", f"{RESULTS}/link.json"),
    "router": (),
    "door": (),
    "judge": ("--out", f"{RESULTS}/judge.json"),
    "policies": ("--quick",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; the number of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"which, of {', '.join(BENCHES)} (all of them)")
    wanted = parser.parse_args(argv).name or list(BENCHES)
    if unknown := sorted(set(wanted) - set(BENCHES)):
        parser.error(f"there is no {unknown[0]}; there are {', '.join(BENCHES)}")
    failed = 0
    for name in wanted:
        flags = BENCHES[name]
        print(f"\n==> python -m bench.{name} {' '.join(flags)}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"bench.{name}", *flags], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
