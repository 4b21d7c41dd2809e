"""The commands that make and show traces: `compose`, `describe`, `convert`.

Owns their options and words. Nothing here talks to a server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from loadgen import options
from loadgen.traces import CLASSES, Tally, Trace, TraceError

COMPOSE = """
--seed 1 --duration 100 --scale-tokens 1/16 --context 8192 --out mix.jsonl
--weka weka_requests.csv.zst --sessions 8 --scale-tokens 1/16 --out weka.jsonl
--servegen servegen-data.tar.zst --set deepseek-r1 --start 40000 --rate 2 --scale-tokens 1 --out reason.jsonl
"""
DESCRIBE = """
mix.jsonl
conversation_trace.jsonl.zst --cache 5120000 25600000 --json out/mooncake.json --html out/mooncake.html
weka-kv-cache-tester-traces.tar.zst
servegen-data.tar.zst
"""
CONVERT = """
AzureLLMInferenceTrace_code.csv.zst --class data-processor --users 12 --out code.jsonl.zst
weka_requests.csv.zst --sample 0.02 --cap-gap 60 --scale-tokens 1/16 --to aiperf --out aiperf.jsonl
conversation_trace.jsonl.zst --jitter 3 --sample 0.1 --out chat.jsonl
mix.jsonl code.jsonl.zst --load 2 0.5 --out both.jsonl
"""


def add(commands: options.Commands[argparse.ArgumentParser]) -> None:
    """The three commands."""
    _add_compose(commands)
    _add_describe(commands)
    _add_convert(commands)


def _add_compose(commands: options.Commands[argparse.ArgumentParser]) -> None:
    says = "make a seeded trace with all three classes, or draw one from real sessions or real rates"
    compose = options.command(commands, "compose", says, COMPOSE)
    compose.add_argument("-o", "--out", type=Path, required=True, help=".jsonl, .jsonl.gz or .jsonl.zst")
    compose.add_argument("--seed", type=int, default=1, help="same seed, same bytes (1)")
    compose.add_argument("--duration", type=options.positive, default=100.0, metavar="S", help="offered seconds (100)")
    compose.add_argument(
        "--load", type=options.positive, default=1.0, help="multiplies the sessions, never the clocks (1)"
    )
    compose.add_argument("--users", type=options.count, default=12, help="with a Zipf skew: the first sends most (12)")
    compose.add_argument("--weka", type=Path, metavar="FILE", help="whole sessions of Weka's archive or table instead")
    compose.add_argument("--sessions", type=options.count, default=8, help="of Weka's (8)")
    compose.add_argument("--servegen", type=Path, metavar="FILE", help="arrivals from ServeGen's archive instead")
    compose.add_argument("--set", default="", help="which of ServeGen's, as `describe` lists them")
    compose.add_argument(
        "--start", type=options.not_negative, default=0.0, metavar="S", help="within the set's day (0)"
    )
    compose.add_argument(
        "--rate", type=options.positive, default=1.0, help="mean of all the set's clients, a second (1)"
    )
    compose.add_argument("--lengths", type=Path, metavar="TRACE", help="for sets without lengths: drawn from this one")
    _add_size(compose, "1/16", 8192)
    compose.set_defaults(run=_compose)


def _add_size(command: argparse.ArgumentParser, divisor: str, context: int | None) -> None:
    command.add_argument(
        "--scale-tokens",
        type=options.divisor,
        default=options.divisor(divisor),
        metavar="1/N",
        help=f"divide tokens and block size alike, so that the hit rate holds ({divisor})",
    )
    command.add_argument(
        "--context",
        type=options.count,
        default=context,
        help=f"sessions that exceed it go whole, counted ({context or 'none is left out'})",
    )


def _add_describe(commands: options.Commands[argparse.ArgumentParser]) -> None:
    says = "print what is in a trace: rates, lengths, reuse, gaps, by class and user"
    describe = options.command(commands, "describe", says, DESCRIBE)
    describe.add_argument("trace", type=Path, help="JSON lines, Weka, TraceLab, Azure, receipts or ServeGen; .gz, .zst")
    describe.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    describe.add_argument("--html", type=Path, metavar="FILE", help="write them drawn, as one page")
    describe.add_argument(
        "--cache", type=options.count, nargs="*", default=[], metavar="TOKENS", help="further sizes of the cache curve"
    )
    describe.add_argument("--class", dest="as_class", choices=CLASSES, help="the true class, where rows name none")
    describe.add_argument("--strict", action="store_true", help="stop at the first bad row")
    describe.set_defaults(run=_describe)


def _add_convert(commands: options.Commands[argparse.ArgumentParser]) -> None:
    says = "read any known format, change its size or mix several, and write it for this or another tool"
    convert = options.command(commands, "convert", says, CONVERT)
    convert.add_argument("trace", type=Path, nargs="+", help="JSON lines, Weka, TraceLab, Azure or receipts; .gz, .zst")
    convert.add_argument("-o", "--out", type=Path, required=True, help="ends in .gz or .zst to be compressed")
    convert.add_argument("--to", choices=("headway", "mooncake", "aiperf"), default="headway")
    convert.add_argument("--class", dest="as_class", choices=CLASSES, help="the true class, where rows name none")
    says = "times the sessions, never the clocks: one for all, or one a trace, which gives each its share (1)"
    convert.add_argument("--load", type=options.times, nargs="+", default=[1.0], metavar="X", help=says)
    convert.add_argument("--sample", type=options.share, metavar="SHARE", help="keep so many of the sessions, whole")
    convert.add_argument("--jitter", type=options.positive, metavar="S", help="undo a recorder's steps of S seconds")
    convert.add_argument("--cap-gap", type=options.positive, metavar="S", help="let no turn wait longer")
    convert.add_argument("--users", type=options.count, help="give so many to sessions that have none, skewed")
    convert.add_argument("--seed", type=int, default=1, help="of sample, jitter and users (1)")
    _add_size(convert, "1", None)
    convert.add_argument("--strict", action="store_true", help="stop at the first bad row")
    convert.set_defaults(run=_convert)


def _compose(arguments: argparse.Namespace) -> int:
    from loadgen.describe import describe
    from loadgen.traces import write
    from loadgen.workload import workload

    trace = _sized(_composed(arguments), arguments.scale_tokens, arguments.context)
    write(trace, arguments.out)
    print(describe(workload(trace)))
    print(f"wrote {arguments.out}")
    return 0


def _composed(arguments: argparse.Namespace) -> Trace:
    from dataclasses import replace

    from loadgen.compose import Mix, compose
    from loadgen.formats import weka

    if arguments.servegen:
        return _drawn(arguments)
    seed, duration_s = arguments.seed, arguments.duration
    if not arguments.weka:
        return compose(replace(Mix(), users=arguments.users), seed, duration_s, arguments.load)
    context, divisor = arguments.context, arguments.scale_tokens
    sessions = weka.sessions_of(arguments.weka, Tally(arguments.weka, strict=True))
    fitting = weka.fitting(sessions, divisor, context)
    print(f"{len(fitting)} of {len(sessions)} sessions fit {context} tokens at 1/{divisor}")
    if not fitting:
        raise TraceError(f"no session fits {context} tokens of context: try a smaller --scale-tokens")
    return weka.slice_of(fitting, arguments.sessions, seed, duration_s)


def _drawn(arguments: argparse.Namespace) -> Trace:
    from loadgen import formats
    from loadgen.formats import servegen

    sets = servegen.load(arguments.servegen, Tally(arguments.servegen, strict=True), arguments.set)
    if arguments.set not in sets:
        raise TraceError(f"no set {arguments.set!r} in {arguments.servegen}; it has {', '.join(sets)}")
    wanted = servegen.Draw(
        seed=arguments.seed,
        start_s=arguments.start,
        duration_s=arguments.duration,
        rate_per_s=arguments.rate,
        lengths=formats.load(arguments.lengths) if arguments.lengths else None,
    )
    return servegen.draw(arguments.set, sets[arguments.set], wanted)


def _sized(trace: Trace, divisor: int, context: int | None) -> Trace:
    from loadgen.compose import drop_over_context, scale

    scaled = scale(trace, divisor)
    if divisor > 1 and any(row.hash_ids for row in trace.rows):
        print(_kept(trace, scaled, divisor))
    return scaled if context is None else drop_over_context(scaled, context)


def _kept(trace: Trace, scaled: Trace, divisor: int) -> str:
    """What scaling did to the ideal hit; an engine whose blocks are larger than the scaled ones holds less of it."""
    from loadgen.traces import cached_of
    from loadgen.workload import ENDLESS_S, ENGINE_BLOCKS, hit_in_blocks

    before, after = cached_of(trace, ENDLESS_S), cached_of(scaled, ENDLESS_S)
    in_blocks = [f"{hit_in_blocks(scaled, after, tokens):.1%} in blocks of {tokens}" for tokens in ENGINE_BLOCKS]
    return (
        f"ideal hit {hit_in_blocks(trace, before, 1):.1%}, and {hit_in_blocks(scaled, after, 1):.1%} scaled by "
        f"1/{divisor}; an engine's: {', '.join(in_blocks)} tokens"
    )


def _describe(arguments: argparse.Namespace) -> int:
    import msgspec

    from loadgen import formats
    from loadgen.describe import describe
    from loadgen.describe_html import page
    from loadgen.formats import servegen
    from loadgen.workload import workload

    if ".tar" in arguments.trace.suffixes and servegen.is_servegen(arguments.trace):
        return _describe_rates(arguments)
    trace = formats.load(arguments.trace, arguments.strict, arguments.as_class)
    found = workload(trace, arguments.cache)
    print(describe(found))
    if arguments.json:
        _write(arguments.json, msgspec.json.format(msgspec.json.encode(found), indent=1))
    if arguments.html:
        _write(arguments.html, page(arguments.trace.name, trace, found).encode())
    return 0


def _describe_rates(arguments: argparse.Namespace) -> int:
    import msgspec

    from loadgen.describe import rates_text
    from loadgen.formats import servegen

    if arguments.html:
        raise ValueError("ServeGen's rates are described as a table: draw a trace with `compose --servegen` for a page")
    tally = Tally(arguments.trace, arguments.strict)
    found = [servegen.rates(name, clients) for name, clients in servegen.load(arguments.trace, tally).items()]
    print(rates_text(found))
    if tally.count:
        print(f"{tally.count} bad rows left out, such as: line {tally.bad[0].line}: {tally.bad[0].reason}")
    if arguments.json:
        _write(arguments.json, msgspec.json.format(msgspec.json.encode(found), indent=1))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from loadgen import formats, shape
    from loadgen.formats import export

    loaded = [formats.load(path, arguments.strict, arguments.as_class) for path in arguments.trace]
    trace = _mixed(loaded, arguments)
    if arguments.sample is not None:
        trace = shape.sample(trace, arguments.sample, arguments.seed)
    if arguments.jitter:
        trace = shape.jitter(trace, arguments.jitter, arguments.seed)
    if arguments.cap_gap:
        trace = shape.cap_gap(trace, arguments.cap_gap)
    if arguments.users:
        trace = shape.with_users(trace, arguments.users, arguments.seed)
    trace = _sized(trace, arguments.scale_tokens, arguments.context)
    said = export.write(trace, arguments.out, arguments.to)
    for bad in trace.bad[:5]:
        print(f"left out: line {bad.line}: {bad.reason}")
    print(f"wrote {len(trace.rows)} rows to {arguments.out}; {trace.bad_count} bad rows left out")
    if said:
        print(said)
    return 0


def _mixed(loaded: Sequence[Trace], arguments: argparse.Namespace) -> Trace:
    """All on one clock, each with so many times its sessions."""
    from loadgen import shape

    loads = arguments.load * len(loaded) if len(arguments.load) == 1 else arguments.load
    if len(loads) != len(loaded):
        raise ValueError(f"--load has {len(loads)} figures for {len(loaded)} traces: one for all, or one for each")
    parts = [shape.at_load(one, load, arguments.seed) for one, load in zip(loaded, loads, strict=True)]
    if len(parts) > 1:
        print(_shares(arguments.trace, parts))
    return shape.overlay(parts)


def _shares(paths: Sequence[Path], parts: Sequence[Trace]) -> str:
    """What each trace brings to the mix."""
    tokens = [sum(row.input_length for row in part.rows) for part in parts]
    rows = sum(len(part.rows) for part in parts)
    return "\n".join(
        f"{path.name}: {len(part.rows)} rows ({len(part.rows) / rows:.1%}), {own / sum(tokens):.1%} of the input tokens"
        for path, part, own in zip(paths, parts, tokens, strict=True)
    )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    print(f"wrote {path}")
