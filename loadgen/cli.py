"""The command line: `headway-loadgen compose`, `describe`, `replay`, `judge`.

Owns the words, the options and the exit codes: 0 done, 1 the run is invalid or failed, 2 misused."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from loadgen.traces import TraceError

TEACH = """\
examples:
  headway-loadgen compose --seed 1 --duration 100 --scale-tokens 1/16 --context 8192 --out mix.jsonl
  headway-loadgen describe mix.jsonl
  headway-loadgen replay mix.jsonl --target http://127.0.0.1:8080 --out out/replay
  headway-loadgen replay mix.jsonl --serve "headway serve --port 9000" --target http://127.0.0.1:9000
  headway-loadgen compose --weka weka_requests.csv.zst --sessions 8 --scale-tokens 1/16 --out weka.jsonl
  headway-loadgen judge out/replay.jsonl --out out/again

A trace is JSON lines; every Mooncake trace is one as it stands (.zst and .gz too). The true class in it is the
yardstick and is never sent. `replay` writes OUT.json, OUT.jsonl and OUT.html."""


def main(argv: Sequence[str] | None = None) -> int:
    """The `headway-loadgen` command. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (TraceError, ValueError, OSError) as error:
        print(f"headway-loadgen: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headway-loadgen",
        description="Judge an OpenAI-compatible server with a trace of interactive, agent and batch requests.",
        epilog=TEACH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_compose(commands)
    _add_replay(commands)
    described = commands.add_parser("describe", help="print what is in a trace, by class")
    described.add_argument("trace", type=Path)
    described.add_argument("--strict", action="store_true", help="stop at the first bad row")
    described.set_defaults(run=_describe)
    judged = commands.add_parser("judge", help="judge recorded requests again, and write the reports")
    judged.add_argument("records", type=Path, help="the .jsonl that replay wrote")
    judged.add_argument("--out", type=Path, help="base name of the reports (default: beside the records)")
    judged.add_argument("--budgets", type=Path, metavar="FILE", help="judge by these budgets instead")
    judged.set_defaults(run=_judge)
    return parser


def _add_compose(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compose = commands.add_parser(
        "compose", help="make a seeded trace with all three classes, or a slice of real input"
    )
    compose.add_argument("-o", "--out", type=Path, required=True, help=".jsonl, .jsonl.gz or .jsonl.zst")
    compose.add_argument("--seed", type=int, default=1, help="same seed, same bytes (1)")
    compose.add_argument("--duration", type=_positive, default=100.0, metavar="S", help="offered seconds (100)")
    compose.add_argument("--load", type=_positive, default=1.0, help="multiplies the sessions, never the clocks (1)")
    compose.add_argument("--users", type=int, default=12, help="with a Zipf skew: the first sends most (12)")
    compose.add_argument("--weka", type=Path, metavar="FILE", help="a slice of weka_requests.csv.zst instead of a mix")
    compose.add_argument("--sessions", type=int, default=8, help="of the Weka slice (8)")
    compose.add_argument(
        "--scale-tokens",
        type=_divisor,
        default=16,
        metavar="1/N",
        help="divide tokens and block size alike, so that the hit rate holds (1/16)",
    )
    compose.add_argument("--context", type=int, default=8192, help="sessions that exceed it go whole, counted (8192)")
    compose.set_defaults(run=_compose)


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    replay = commands.add_parser("replay", help="run a trace against a server and judge it")
    replay.add_argument("trace", type=Path)
    replay.add_argument("--target", default="http://127.0.0.1:8080", metavar="URL", help="(http://127.0.0.1:8080)")
    replay.add_argument("--serve", metavar="COMMAND", help="start this first, wait for /readyz, stop it with SIGINT")
    replay.add_argument("--model", default="", help="(what the target names)")
    replay.add_argument(
        "--duration", type=_positive, default=0.0, metavar="S", help="offer no longer (the trace's span)"
    )
    replay.add_argument("--speed", type=_positive, default=1.0, help="divides times and gaps; it changes reuse (1)")
    replay.add_argument(
        "--headers",
        type=_share,
        default=0.8,
        metavar="SHARE",
        help="of the sessions and bursts that wear their client's headers; the others wear none (0.8)",
    )
    replay.add_argument("--seed", type=int, default=1, help="of prompts and costumes (1)")
    replay.add_argument("--grace", type=_positive, default=30.0, metavar="S", help="wait for open answers (30)")
    replay.add_argument("--budgets", type=Path, metavar="FILE", help="JSON as /readyz has it, instead of the target's")
    replay.add_argument("--out", type=Path, default=Path("out/replay"), help="base name of the reports (out/replay)")
    replay.add_argument("--strict", action="store_true", help="stop at the first bad row")
    replay.set_defaults(run=_replay)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def _divisor(text: str) -> int:
    one, slash, divisor = text.partition("/")
    if one != "1" or (slash and not divisor.isdecimal()) or int(divisor or 1) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not of the form 1/16")
    return int(divisor or 1)


def _compose(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from loadgen import weka
    from loadgen.compose import Mix, compose, drop_over_context, scale
    from loadgen.describe import describe
    from loadgen.traces import write

    divisor, seed, duration_s = arguments.scale_tokens, arguments.seed, arguments.duration
    if arguments.weka:
        sessions, left_out = weka.load(arguments.weka)
        fitting = weka.fitting(sessions, divisor, arguments.context)
        trace = weka.slice_of(fitting, arguments.sessions, seed, duration_s, left_out)
        print(
            f"{len(fitting)} of {len(sessions)} sessions fit {arguments.context} tokens at 1/{divisor}; "
            f"{left_out} rows of sub-agents are left out"
        )
    else:
        trace = compose(replace(Mix(), users=arguments.users), seed, duration_s, arguments.load)
    trace = drop_over_context(scale(trace, divisor), arguments.context)
    write(trace, arguments.out)
    print(describe(trace))
    print(f"wrote {arguments.out}")
    return 0


def _describe(arguments: argparse.Namespace) -> int:
    from loadgen.describe import describe
    from loadgen.traces import read

    print(describe(read(arguments.trace, arguments.strict)))
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from loadgen.session import Plan, carry_out

    verdict = carry_out(
        Plan(
            trace=arguments.trace,
            target=arguments.target,
            out=arguments.out,
            serve=arguments.serve or "",
            model=arguments.model,
            budgets=arguments.budgets,
            seed=arguments.seed,
            speed=arguments.speed,
            duration_s=arguments.duration,
            stripped_share=round(1.0 - arguments.headers, 6),
            grace_s=arguments.grace,
            is_strict=arguments.strict,
        )
    )
    return 1 if verdict.invalid else 0


def _judge(arguments: argparse.Namespace) -> int:
    from loadgen import records
    from loadgen.session import publish, read_budgets
    from loadgen.targets import parse_budgets

    run, found = records.read(arguments.records)
    budgets = read_budgets(arguments.budgets) if arguments.budgets else parse_budgets(run.budgets)
    publish(run, found, budgets, arguments.out or arguments.records.with_suffix(""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
