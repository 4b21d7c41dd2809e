"""The command line: `headway-loadgen compose`, `describe`, `convert`, `replay`, `simulate`, `plan`, `judge`, `faults`.

Owns the entry and the exit codes: 0 done, 1 the run is invalid or failed, 2 misused, 3 `--gate` found a miss."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from loadgen import cli_runs, cli_traces, plan_cli, simulate
from loadgen.traces import TraceError

TEACH = """\
examples:
  headway-loadgen compose --seed 1 --duration 100 --scale-tokens 1/32 --out mix.jsonl
  headway-loadgen describe mix.jsonl --html out/mix.html
  headway-loadgen replay mix.jsonl --target http://127.0.0.1:8080 --out out/replay
  headway-loadgen simulate mix.jsonl --workers 4 --policy headway,lmetric

A trace is JSON lines; every Mooncake trace is one as it stands (.zst and .gz too). The true class in it is the
yardstick and is never sent. Every command has examples of its own: headway-loadgen COMMAND --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """The `headway-loadgen` command. Returns the exit code."""
    arguments = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TraceError, ValueError, OSError) as error:
        print(f"headway-loadgen: {_plain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


def _plain(error: Exception) -> str:
    """An error of the system without its number: the file, and what is wrong with it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    whole = argparse.ArgumentParser(
        prog="headway-loadgen",
        description="Judge an OpenAI-compatible server with a trace of interactive, agent and batch requests.",
        epilog=TEACH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    cli_traces.add(commands)
    cli_runs.add(commands)
    simulate.add_command(commands)
    plan_cli.add(commands)
    return whole


if __name__ == "__main__":
    sys.exit(main())
