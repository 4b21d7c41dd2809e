"""The commands that talk to a server, or judge what one said: `replay`, `judge`, `faults`.

Owns their options and words."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from loadgen import options
from loadgen.dialects import DIALECTS

if TYPE_CHECKING:
    from loadgen.session import Plan

GATED = 3  # exit code: the run is good, and some class did not get its promise

REPLAY = """
mix.jsonl --target http://127.0.0.1:8080 --out out/replay
mix.jsonl --serve "headway serve --port 9000" --target http://127.0.0.1:9000
mix.jsonl --dialect anthropic --target http://127.0.0.1:8080 --out out/messages
mix.jsonl --search capacity --seeds 2 --from 1 --to 2 --target http://127.0.0.1:8080 --out out/capacity
mix.jsonl --ab first=http://127.0.0.1:8080 second=http://127.0.0.1:8080 --seeds 1 --out out/ab
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
    judged.add_argument("records", type=Path, help="the .jsonl that `replay` or `simulate` wrote")
    judged.add_argument("--budgets", type=Path, metavar="FILE", help="other promises than the run's own")
    judged.add_argument("--out", type=Path, help="base name of the reports (the records' own)")
    judged.set_defaults(run=_judge)
    _add_faults(commands)


def _add_replay(commands: options.Commands[argparse.ArgumentParser]) -> None:
    replay = options.command(commands, "replay", "run a trace against a server and judge it", REPLAY)
    replay.add_argument("trace", type=Path, help="in any format that `describe` reads")
    replay.add_argument(
        "--target", default="http://127.0.0.1:8080", metavar="URL", help="a server (http://127.0.0.1:8080)"
    )
    replay.add_argument("--serve", metavar="COMMAND", help="start this first, wait for /readyz, stop it with SIGINT")
    replay.add_argument(
        "--dialect",
        choices=tuple(DIALECTS),
        default="completions",
        help="completions sends token ids, so lengths are exact; the others send text (completions)",
    )
    replay.add_argument("--model", default="", help="the model to ask for (what the target names)")
    replay.add_argument(
        "--duration", type=options.positive, default=0.0, metavar="S", help="offer no longer (the trace's span)"
    )
    replay.add_argument("--gate", action="store_true", help="exit with 3 unless every class passes, for CI")
    replay.add_argument(
        "--warmup", type=options.not_negative, default=0.0, metavar="S", help="offered first, but not judged (0)"
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
    says = "client processes, each with its share of the sessions (one for 20,000 output tokens a second of the trace)"
    replay.add_argument("--clients", type=options.count, default=0, metavar="N", help=says)
    replay.add_argument(
        "--admin", default="", metavar="URL", help="a router's admin listener: say when it loses a worker"
    )
    replay.add_argument("--search", choices=("capacity",), help="find the most sessions that still pass")
    replay.add_argument(
        "--ab",
        nargs="+",
        metavar="NAME=URL",
        help="several targets on one page; --serve may use {name} and starts each",
    )
    replay.add_argument("--seeds", type=options.count, default=3, help="runs at each load of --search and --ab (3)")
    replay.add_argument(
        "--from", dest="low", type=options.positive, default=0.25, metavar="X", help="first load (0.25)"
    )
    replay.add_argument("--to", dest="high", type=options.positive, default=8.0, metavar="X", help="largest load (8)")
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
    from loadgen.session import carry_out

    plan = _plan(arguments)
    if arguments.search or arguments.ab:
        return _compare(arguments, plan)
    verdict = carry_out(plan)
    if verdict.invalid:
        return 1
    return GATED if arguments.gate and not verdict.is_pass else 0


def _plan(arguments: argparse.Namespace) -> Plan:
    from loadgen.session import Plan

    return Plan(
        trace=arguments.trace,
        target=arguments.target,
        out=arguments.out,
        serve=arguments.serve or "",
        model=arguments.model,
        budgets=arguments.budgets,
        seed=arguments.seed,
        speed=arguments.speed,
        duration_s=arguments.duration,
        warmup_s=arguments.warmup,
        admin=arguments.admin,
        clients=arguments.clients,
        stripped_share=round(1.0 - arguments.headers, 6),
        grace_s=arguments.grace,
        is_strict=arguments.strict,
        dialect=arguments.dialect,
    )


def _compare(arguments: argparse.Namespace, plan: Plan) -> int:
    import msgspec

    from loadgen import compare
    from loadgen.compare_html import page
    from loadgen.search import Bounds

    named = [word.partition("=")[::2] for word in arguments.ab] if arguments.ab else [("target", arguments.target)]
    if plan.admin and arguments.ab:
        raise ValueError("--admin watches one router: it does not go with --ab")
    if any(not name or not url for name, url in named) or len({name for name, _ in named}) < len(named):
        raise ValueError("--ab wants NAME=URL, each name once")
    sides = tuple(compare.Side(name, url, (arguments.serve or "").replace("{name}", name)) for name, url in named)
    seeds = tuple(range(arguments.seed, arguments.seed + arguments.seeds))
    trial = compare.Trial(plan, sides, seeds, bool(arguments.search), Bounds(arguments.low, arguments.high))
    found = compare.compare(trial)
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    title = f"{'Capacity' if arguments.search else 'Comparison'}: {plan.trace.name}"
    out.with_suffix(".html").write_text(page(found, title), encoding="utf-8")
    print(compare.compare_text(found))
    print(f"\nwrote {out.with_suffix('.html')} and .json")
    return 0


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
