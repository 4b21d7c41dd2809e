"""The comparison as one page: who won by class, with intervals, and attainment curves over offered sessions.

Owns the page's words. Every number is the comparison's."""

from __future__ import annotations

from html import escape

from loadgen.charts import Curve, Event, curves, floor, gauge, keys
from loadgen.compare import Compared, Difference, compare_text, goodputs, headline
from loadgen.judge import PASS_SHARE
from loadgen.page import document
from loadgen.search import Edge
from loadgen.traces import CLASSES, ClassName

COLOURS = ("one", "two", "three", "four")
SIDES_MAX = len(COLOURS)


def page(found: Compared, title: str) -> str:
    """The whole page."""
    parts = [f"<h1>{escape(title)}</h1>", _verdict(found), _sides(found), _curves(found)]
    parts.append(f'<h2>In figures</h2><div class="scroll"><pre>{escape(compare_text(found))}</pre></div>')
    if found.verdicts:
        run = found.verdicts[0].run
        parts.append(f"<p>{escape(run.machine)}; {escape(run.started)}; promises from {escape(run.budgets_from)}</p>")
    return document(title, parts)


def _verdict(found: Compared) -> str:
    if found.edges:
        return "".join(f"<p>{escape(headline(edge))}. {escape(goodputs(edge))}.</p>" for edge in found.edges)
    return (
        "<p>One trace and the same promises for every side; sessions are paired with themselves on the first side. "
        "A difference counts when its interval leaves out zero.</p>"
    )


def _sides(found: Compared) -> str:
    if not found.verdicts:
        return ""
    shown = [name for name in CLASSES if any(name in verdict.classes for verdict in found.verdicts)]
    heads = "".join(f"<th>{escape(name)}</th>" for name in found.names)
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(_cell(found, side, name) for side in range(len(found.names)))}</tr>"
        for name in shown
    )
    goodput = "".join(f"<td><b>{verdict.goodput_per_s:.2f}/s</b></td>" for verdict in found.verdicts)
    return (
        '<h2>Side by side</h2><div class="scroll"><table class="heat">'
        f"<tr><th></th>{heads}</tr>{rows}<tr><td>goodput</td>{goodput}</tr></table></div>"
    )


def _cell(found: Compared, side: int, name: ClassName) -> str:
    verdict = found.verdicts[side].classes.get(name)
    if verdict is None:
        return "<td>-</td>"
    more = found.differences[side].get(name)
    said = ""
    if side and more is not None:
        said = f"{_word(more)}: {100 * more.more:+.1f} points ({100 * more.low:+.1f} to {100 * more.high:+.1f})"
    shown = gauge(verdict.cell.attainment, verdict.attainment_low, verdict.attainment_high, PASS_SHARE[name])
    return f"<td><b>{verdict.cell.attainment:.1%}</b> of {verdict.cell.offered}{shown}<small>{said}</small></td>"


def _word(more: Difference) -> str:
    if more.low > 0 or more.high < 0:
        return "better" if more.low > 0 else "worse"
    return "may be chance"


def _curves(found: Compared) -> str:
    if not found.edges:
        return ""
    figures = []
    for name in CLASSES:
        drawn = [_curve(edge, name, COLOURS[place % SIDES_MAX]) for place, edge in enumerate(found.edges)]
        held = [Event(edge.capacity.sessions_per_s, headline(edge)) for edge in found.edges if edge.capacity]
        low = floor(low for curve in drawn for low, _ in curve.spans)
        picture = curves(
            drawn,
            "sessions offered a second",
            f"{name} met",
            is_log=False,
            wanted=PASS_SHARE[name],
            low=low,
            marks=held,
        )
        figures.append(f"<figure>{picture}</figure>" if picture else "")
    named = keys((COLOURS[place % SIDES_MAX], edge.name) for place, edge in enumerate(found.edges))
    return (
        "<h2>Attainment by offered load</h2><p>Whiskers: 95 % intervals by session. Dashed red: the largest load at "
        f"which every class passed.</p><p>{named}</p>{''.join(figures)}"
    )


def _curve(edge: Edge, name: ClassName, style: str) -> Curve:
    points = [(one.sessions_per_s, one.classes[name].met) for one in edge.points if name in one.classes]
    spans = [(one.classes[name].low, one.classes[name].high) for one in edge.points if name in one.classes]
    return Curve(edge.name, style, points, spans)
