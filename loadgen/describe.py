"""Describe: a trace's workload as a table for the terminal.

Owns the words. Every number is the workload's."""

from __future__ import annotations

from loadgen.charts import number
from loadgen.formats.servegen import Rates
from loadgen.report import aligned
from loadgen.workload import Arrivals, Group, Reuse, Spread, Workload

HEADS = ["", "requests", "sessions", "users", "input mean", "p10", "p50", "p90", "p99", "max"]
OUTPUT_HEADS = ["", "output mean", "p10", "p50", "p90", "p99", "max", "new p50", "p90", "p99", "ideal hit %"]
ARRIVAL_HEADS = ["", "per s", "CV", "peak/mean 1 s", "60 s", "var/mean 1 s", "60 s"]
SESSION_HEADS = ["", "turns p10", "p50", "p90", "max", "tool gap s p50", "p75", "p90", "p99", "human gap s p50"]
SESSION_HEADS += ["p75", "p90", "after a tool %"]
BAD_SHOWN = 5
NO_CLOCK = "all sessions begin at 0: the trace says nothing of rates, and reuse is counted as if they ran side by side"


def describe(found: Workload) -> str:
    """The whole text."""
    groups = [*found.classes, *([found.whole] if len(found.classes) > 1 else [])]
    parts = [aligned([HEADS, *map(_counts, groups)]), aligned([OUTPUT_HEADS, *map(_lengths, groups)])]
    rates = aligned([ARRIVAL_HEADS, *([group.name, *arrival_cells(group.arrivals)] for group in groups)])
    parts.append(rates if found.has_clock else NO_CLOCK)
    if found.whole.sessions:
        parts.append(aligned([SESSION_HEADS, *map(_sessions, groups)]))
    if found.by_user:
        parts.append(aligned([HEADS, *map(_counts, found.by_user)]))
    if found.reuse is not None:
        parts.append(reuse_text(found.reuse))
    return "\n\n".join([*parts, footer(found)])


def footer(found: Workload) -> str:
    """What the file is, and what was left out of it."""
    notes = "".join(f", {name} {value}" for name, value in found.notes.items())
    nested = f"; {found.nested} rows are of sub-agents" if found.nested else ""
    blocks = f"blocks of {found.block_size} tokens, ids {found.hash_scope}" if found.reuse else "no block ids"
    lines = [f"{blocks}{notes}{nested}"]
    if found.source:
        lines.append(f"source: {found.source}")
    if found.bad_rows:
        lines.append(f"{found.bad_rows} bad rows left out, such as:")
        lines += [f"  {bad}" for bad in found.bad[:BAD_SHOWN]]
    return "\n".join(lines)


def _counts(group: Group) -> list[str]:
    return [group.name, str(group.requests), str(group.sessions), str(group.users), *_six(group.input_tokens)]


def _lengths(group: Group) -> list[str]:
    new = group.new_tokens or Spread()
    hit = "-" if group.ideal_hit is None else f"{100 * group.ideal_hit:.1f}"
    return [group.name, *_six(group.output_tokens), *(figure(value) for value in (new.p50, new.p90, new.p99)), hit]


def _six(found: Spread) -> list[str]:
    return [figure(value) for value in (found.mean, found.p10, found.p50, found.p90, found.p99, found.most)]


def arrival_cells(found: Arrivals) -> list[str]:
    """Under ARRIVAL_HEADS, behind a name."""
    rate = "-" if found.per_s is None else f"{found.per_s:.2f}" if found.per_s >= 0.1 else f"{found.per_s:.2g}"
    peaks = f"{found.peak_to_mean_1s:.1f}", f"{found.peak_to_mean_60s:.2f}"
    return [rate, figure(found.cv), *peaks, f"{found.var_to_mean_1s:.1f}", f"{found.var_to_mean_60s:.1f}"]


def _sessions(group: Group) -> list[str]:
    turns, tool, human = group.turns, group.tool_gap_s, group.human_gap_s
    values = [turns.p10, turns.p50, turns.p90, turns.most, tool.p50, tool.p75, tool.p90, tool.p99]
    values += [human.p50, human.p75, human.p90]
    return [group.name, *map(figure, values), f"{100 * group.after_tool:.0f}"]


def reuse_text(found: Reuse) -> str:
    """What caches of a few sizes would hold."""
    sampled = "" if found.sampled_1_in == 1 else f" (one block in {found.sampled_1_in} counted)"
    rows = [["LRU cache of tokens", *(number(point.tokens) for point in found.curve)]]
    rows.append(["holds of the input %", *(f"{100 * point.hit:.1f}" for point in found.curve)])
    in_blocks = ", ".join(f"{100 * one.hit:.1f} % in blocks of {one.block_tokens}" for one in found.in_blocks)
    return (
        f"{aligned(rows)}{sampled}\n"
        f"an endless one {100 * found.ideal_hit:.1f} % ({in_blocks})\n"
        f"{100 * found.over_half:.1f} % of requests have over half held; "
        f"a block is used again after p50 {figure(found.gap_s.p50)} s, p90 {figure(found.gap_s.p90)} s"
    )


def rates_text(found: list[Rates]) -> str:
    """ServeGen's sets, a row each."""
    rows = [["set", "clients", "mean per s", "busiest 10 min/mean", "largest client %", "CV by rate"]]
    rows += [
        [
            one.name,
            str(one.clients),
            f"{one.mean_per_s:.1f}",
            f"{one.busiest_to_mean:.2f}",
            f"{100 * one.largest_share:.0f}",
            f"{one.cv:.1f}",
        ]
        for one in found
    ]
    return aligned(rows)


def figure(value: float | None) -> str:
    """Three digits at least, and no more decimals than they need."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
