"""`make bench`: runs every benchmark in turn. Each prints its table last and keeps its result in bench/results.

Owns the list. `python -m bench.NAME --help` tells what one of them takes."""

from __future__ import annotations

import subprocess
import sys

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


def main() -> int:
    """Run all; the number of those that failed."""
    failed = 0
    for name, flags in BENCHES.items():
        print(f"\n==> python -m bench.{name} {' '.join(flags)}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"bench.{name}", *flags], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
