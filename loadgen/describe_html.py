"""Describe as a page: arrivals, lengths, reuse, gaps and who sends, drawn.

Owns the page's words. Every number is the workload's or a row's."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loadgen.charts import Bar, Curve, cumulative, curves, keys, timeline
from loadgen.describe import NO_CLOCK, arrival_cells, describe, figure
from loadgen.page import document
from loadgen.traces import CLASSES, ClassName, Trace, nominal_starts_s
from loadgen.workload import Workload

COLOURS: dict[ClassName, str] = {"chatbot+": "one", "background-agent": "two", "data-processor": "three"}
BARS_MAX = 180


def page(name: str, trace: Trace, found: Workload) -> str:
    """The whole page."""
    shown = [name for name in CLASSES if any(group.name == name for group in found.classes)]
    arrivals = _arrivals(trace, shown) if found.has_clock else f"<h2>Arrivals</h2><p>{NO_CLOCK.capitalize()}.</p>"
    parts = [_head(name, found), arrivals, _lengths(trace, shown), _reuse(found), _gaps(trace)]
    parts += [_users(found), f'<h2>In figures</h2><div class="scroll"><pre>{escape(describe(found))}</pre></div>']
    return document(f"Workload: {name}", parts)


def _head(name: str, found: Workload) -> str:
    whole = found.whole
    cards = [
        ("requests", f"{whole.requests:,}", f"{whole.sessions} sessions, {whole.users} users"),
        ("input tokens, median", _count(whole.input_tokens.p50), f"p90 {_count(whole.input_tokens.p90)}"),
        ("output tokens, median", _count(whole.output_tokens.p50), f"p90 {_count(whole.output_tokens.p90)}"),
    ]
    if found.has_clock:
        rate, *_ = arrival_cells(whole.arrivals)
        cards.insert(1, ("a second", rate, f"CV {figure(whole.arrivals.cv)} over {whole.arrivals.span_s:,.0f} s"))
    if whole.ideal_hit is not None:
        cards.append(("ideal hit", f"{whole.ideal_hit:.1%}", "of input tokens, in an endless cache"))
    inside = "".join(f'<div class="card"><h3>{a}</h3><b>{b}</b><span>{c}</span></div>' for a, b, c in cards)
    source = f"<p>{escape(found.source)}</p>" if found.source else ""
    bad = (
        f"<p>{found.bad_rows} bad rows were left out: {escape('; '.join(found.bad[:3]))}</p>" if found.bad_rows else ""
    )
    return f'<h1>{escape(name)}</h1>{source}{bad}<div class="cards">{inside}</div>'


def _count(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:,.0f}"


def _arrivals(trace: Trace, shown: Sequence[ClassName]) -> str:
    starts = nominal_starts_s(trace.rows)
    width = max(1.0, (max(starts) - min(starts)) / BARS_MAX)
    counts = {name: [0] * (int((max(starts) - min(starts)) / width) + 1) for name in shown}
    for row, start in zip(trace.rows, starts, strict=True):
        counts[row.request_class][int((start - min(starts)) / width)] += 1
    bars = [
        Bar(
            place * width,
            tuple((COLOURS[name], counts[name][place] / width) for name in shown),
            f"{place * width:.0f} s",
        )
        for place in range(len(counts[shown[0]]))
    ]
    named = keys((COLOURS[name], name) for name in shown)
    return f"<h2>Arrivals</h2><p>{named}</p><figure>{timeline(bars, 'requests a second', width_s=width)}</figure>"


def _lengths(trace: Trace, shown: Sequence[ClassName]) -> str:
    figures = []
    for title, of in (("input tokens", "input_length"), ("output tokens", "output_length")):
        found = [
            Curve(
                name, COLOURS[name], cumulative([getattr(row, of) for row in trace.rows if row.request_class == name])
            )
            for name in shown
        ]
        figures.append(f"<figure>{curves(found, title, 'share of requests')}</figure>")
    named = keys((COLOURS[name], name) for name in shown)
    return f"<h2>Lengths</h2><p>The share of requests with at most so many tokens.</p><p>{named}</p>{''.join(figures)}"


def _reuse(found: Workload) -> str:
    if found.reuse is None:
        return "<h2>Reuse</h2><p>The trace names no blocks, so nothing is said about shared prefixes.</p>"
    points = [(float(point.tokens), point.hit) for point in found.reuse.curve]
    drawn = curves([Curve("LRU", "one", points)], "tokens that an LRU cache keeps", "share of input held")
    return (
        f"<h2>Reuse</h2><p>An endless cache would hold {found.reuse.ideal_hit:.1%} of the input. A block that is used "
        f"again is used after {figure(found.reuse.gap_s.p50)} s in the median.</p><figure>{drawn}</figure>"
    )


def _gaps(trace: Trace) -> str:
    waits = {
        kind: [row.delay / 1e3 for row in trace.rows if row.gap == kind and row.delay] for kind in ("tool", "human")
    }
    found = [
        Curve("before a tool's result", "one", cumulative(waits["tool"])),
        Curve("before a human's text", "two", cumulative(waits["human"])),
    ]
    drawn = curves(found, "seconds from an answer's end to the next turn", "share of gaps")
    named = keys((curve.style, curve.name) for curve in found if curve.points)
    return f"<h2>Gaps</h2><p>{named}</p><figure>{drawn}</figure>" if drawn else ""


def _users(found: Workload) -> str:
    if not found.by_user:
        return ""
    total = found.whole.requests
    rows = "".join(
        f"<tr><td>{escape(user.name)}</td><td>{user.requests}</td><td>{user.requests / total:.1%}</td>"
        f"<td>{figure(user.input_tokens.p50)}</td><td>{figure(user.output_tokens.p50)}</td></tr>"
        for user in found.by_user
    )
    heads = "<tr><th>user</th><th>requests</th><th>share</th><th>input p50</th><th>output p50</th></tr>"
    return f'<h2>Who sends most</h2><div class="scroll"><table>{heads}{rows}</table></div>'
