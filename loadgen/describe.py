"""Describe: what is in a trace, by class: rates, lengths, gaps and how much an ideal cache would hold.

Owns the figures of a trace before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadgen.report import aligned
from loadgen.traces import CLASSES, Trace, ideal_cached, nominal_starts_s

HEADS = ["class", "requests", "sessions", "users", "per s", "CV", "input p50", "p90", "new p50", "p90"]
HEADS += ["output p50", "p90", "ideal hit %", "tool gap p50 s", "human"]


def describe(trace: Trace) -> str:
    """A table with a row a class, and a line on the file itself."""
    cached, starts = ideal_cached(trace), nominal_starts_s(trace.rows)
    groups = [(name, [i for i, row in enumerate(trace.rows) if row.request_class == name]) for name in CLASSES]
    rows = [HEADS, *(_row(trace, name, chosen, cached, starts) for name, chosen in groups if chosen)]
    rows.append(_row(trace, "all", range(len(trace.rows)), cached, starts))
    header = trace.header
    notes = "".join(f", {name} {value}" for name, value in header.notes.items())
    lines = [f"blocks of {header.block_size} tokens, ids {header.hash_scope}{notes}"]
    if trace.bad_count:
        lines.append(f"{trace.bad_count} bad rows left out, such as:")
        lines += [f"  line {bad.line}: {bad.reason}" for bad in trace.bad[:5]]
    return "\n".join([aligned(rows), *lines])


def _row(trace: Trace, name: str, chosen: Sequence[int], cached: Sequence[int], starts: Sequence[float]) -> list[str]:
    rows = [trace.rows[index] for index in chosen]
    at = sorted(starts[index] for index in chosen)
    gaps = np.diff(at)
    inputs, outputs = [row.input_length for row in rows], [row.output_length for row in rows]
    held = [cached[index] for index in chosen]
    fresh = [length - hit for length, hit in zip(inputs, held, strict=True)]
    span_s = at[-1] - at[0]
    waits = [
        [row.delay / 1e3 for row in rows if row.gap == kind and row.delay is not None] for kind in ("tool", "human")
    ]
    return [
        name,
        str(len(rows)),
        str(len({row.session_id for row in rows if row.session_id})),
        str(len({row.user for row in rows if row.user})),
        f"{len(rows) / span_s:.2f}" if span_s else "-",
        f"{gaps.std() / gaps.mean():.1f}" if len(gaps) > 1 and gaps.mean() else "-",
        *_percentiles(inputs),
        *_percentiles(fresh),
        *_percentiles(outputs),
        f"{100 * sum(held) / sum(inputs):.1f}",
        *(f"{np.median(found):.1f}" if found else "-" for found in waits),
    ]


def _percentiles(values: Sequence[int]) -> list[str]:
    return [f"{value:.0f}" for value in np.percentile(values, [50, 90])]
