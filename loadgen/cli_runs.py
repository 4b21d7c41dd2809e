"""The commands that talk to a server, or judge what one said: `replay`, `judge`, `faults`.

Owns their options and words."""

from __future__ import annotations

import argparse
from pathlib import Path

from loadgen import options

REPLAY = """
mix.jsonl --target http://127.0.0.1:8080 --out out/replay
mix.jsonl --serve "headway serve --port 9000" --target http://127.0.0.1:9000
"""
JUDGE = """
out/replay.jsonl --out out/again
"""
FAULTS = """
--target 127.0.0.1:8080 --listen 9999 --script '[{"at_s": 0, "delay_s": 0.05}, {"at_s": 1, "cut": true}]' --duration 2
"""


def add(commands: options.Commands[argparse.ArgumentParser]) -> None:
    """The three commands."""
    _add_replay(commands)
    judged = options.command(commands, "judge", "judge the records of an earlier run again", JUDGE)
    judged.add_argument("records", type=Path)
    judged.add_argument("--budgets", type=Path, metavar="FILE", help="other promises than the run's own")
    judged.add_argument("--out", type=Path, help="base name of the reports (the records' own)")
    judged.set_defaults(run=_judge)
    _add_faults(commands)


def _add_replay(commands: options.Commands[argparse.ArgumentParser]) -> None:
    replay = options.command(commands, "replay", "run a trace against a server and judge it", REPLAY)
    replay.add_argument("trace", type=Path)
    replay.add_argument("--target", default="http://127.0.0.1:8080", metavar="URL", help="(http://127.0.0.1:8080)")
    replay.add_argument("--serve", metavar="COMMAND", help="start this first, wait for /readyz, stop it with SIGINT")
    replay.add_argument("--model", default="", help="(what the target names)")
    replay.add_argument(
        "--duration", type=options.positive, default=0.0, metavar="S", help="offer no longer (the trace's span)"
    )
    replay.add_argument(
        "--speed", type=options.positive, default=1.0, help="divides times and gaps; it changes reuse (1)"
    )
    replay.add_argument(
        "--headers",
        type=options.share,
        default=0.8,
        metavar="SHARE",
        help="of the sessions and bursts that wear their client's headers; the others wear none (0.8)",
    )
    replay.add_argument("--seed", type=int, default=1, help="of prompts and costumes (1)")
    replay.add_argument("--grace", type=options.positive, default=30.0, metavar="S", help="wait for open answers (30)")
    replay.add_argument("--budgets", type=Path, metavar="FILE", help="JSON as /readyz has it, instead of the target's")
    replay.add_argument("--out", type=Path, default=Path("out/replay"), help="base name of the reports (out/replay)")
    replay.add_argument("--strict", action="store_true", help="stop at the first bad row")
    replay.set_defaults(run=_replay)


def _add_faults(commands: options.Commands[argparse.ArgumentParser]) -> None:
    says = "stand between a client and a server as a TCP proxy that misbehaves on schedule"
    faults = options.command(commands, "faults", says, FAULTS)
    faults.add_argument("--target", required=True, metavar="HOST:PORT", help="where it relays to")
    faults.add_argument("--listen", type=int, default=0, metavar="PORT", help="on 127.0.0.1 (any free one)")
    faults.add_argument(
        "--script",
        default="[]",
        metavar="JSON|FILE",
        help="a list of what holds from at_s on: delay_s, jitter_s, bytes_per_s, corrupt_rate, cut, half_open",
    )
    faults.add_argument("--seed", type=int, default=0, help="of jitter and corruption (0)")
    faults.add_argument("--duration", type=options.positive, metavar="S", help="end after so long (at Ctrl-C)")
    faults.set_defaults(run=_faults)


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


def _faults(arguments: argparse.Namespace) -> int:
    import asyncio

    from loadgen import faults

    is_inline = arguments.script.lstrip().startswith("[")
    script = faults.read_script(arguments.script if is_inline else Path(arguments.script).read_text(encoding="utf-8"))
    host, _, port = arguments.target.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--target {arguments.target!r} is not of the form host:port")
    proxy = faults.FaultProxy(host, int(port), script, arguments.seed, port=arguments.listen)
    asyncio.run(faults.stand(proxy, arguments.duration))
    return 0
