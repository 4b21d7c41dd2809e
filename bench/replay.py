"""What `make replay` runs: a server of its own, the composed mix, the report; then real sessions, if a file is named.

Owns the default workload and its place under out/. Run: python -m bench.replay [--weka FILE] [--load 1]"""

from __future__ import annotations

import argparse
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from loadgen.cli import main as loadgen

OUT = Path("out")
DURATION_S = "100"  # and up to 30 s for what is open then: about two minutes with the server's start
CONTEXT, SCALE = "8192", "1/16"  # the embedded model's context; 256-token blocks become the embedded engine's 16
ANY_ADMIN_PORT = ("env", "HEADWAY_SERVER_ADMIN_PORT=0")  # so that a server that runs already is not in the way


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the last replay: 1 if a run was invalid."""
    arguments = _arguments(argv)
    common = ("--seed", "1", "--duration", DURATION_S, "--scale-tokens", SCALE, "--context", CONTEXT)
    mix = OUT / "mix.jsonl"
    code = _run("compose", *common, "--load", arguments.load, "--out", str(mix)) or _replay(mix, "replay")
    if arguments.weka is None:
        return code
    weka = OUT / "weka.jsonl"
    # Half the size again, since two cores compute about 350 prompt tokens a second each: the first turn of a real
    # session is long, and no one else has sent its blocks.
    slice_of = ("--weka", str(arguments.weka), "--sessions", "6", "--scale-tokens", "1/32", "--context", "4096")
    return _run("compose", *common, *slice_of, "--out", str(weka)) or _replay(weka, "replay-weka") or code


def _replay(trace: Path, name: str) -> int:
    port = str(_free_port())
    serve = shlex.join([*ANY_ADMIN_PORT, sys.executable, "-m", "router.cli", "serve", "--port", port])
    url = f"http://127.0.0.1:{port}"
    where = ("--serve", serve, "--target", url, "--out", str(OUT / name))
    return _run("replay", str(trace), "--duration", DURATION_S, *where)


def _run(*command: str) -> int:
    print(f"$ headway-loadgen {shlex.join(command)}", flush=True)
    return loadgen(command)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__)
    parser.add_argument("--load", default="1", help="multiplies the sessions (1)")
    parser.add_argument(
        "--weka", type=Path, metavar="FILE", help="weka_requests.csv.zst: a second run on real sessions"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
