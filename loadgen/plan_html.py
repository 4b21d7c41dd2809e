"""A plan as one page: the answer, what binds, what each class costs, and what the simulator said of other sizes.

Owns the page's words. Every number is the plan's or a simulated size's."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loadgen import fleets
from loadgen.charts import Curve, Event, curves, floor, keys, number
from loadgen.fleets import Checked
from loadgen.judge import PASS_SHARE
from loadgen.page import document, table
from loadgen.plan import Demand, Planned
from loadgen.traces import CLASSES, ClassName

COLOURS: dict[ClassName, str] = {"chatbot+": "one", "background-agent": "two", "data-processor": "three"}


def page(name: str, planned: Planned, checked: Sequence[Checked], label: str) -> str:
    """The whole page."""
    parts = [_head(name, planned), _cards(planned, checked), _bounds(planned), _classes(planned)]
    return document(f"Plan for {name}", [*parts, _sizes(planned, checked, label)])


def _head(name: str, planned: Planned) -> str:
    return f"<h1>Plan for {escape(name)}</h1><p>Step times: {escape(planned.source)}</p>"


def _cards(planned: Planned, checked: Sequence[Checked]) -> str:
    spare = f", {planned.spare} of them spare" if planned.spare else ""
    cards = [
        ("replicas", str(planned.replicas), f"by the closed form; {planned.bounds.binding} binds{spare}"),
        ("price an hour", f"{planned.replicas * planned.price_per_hour:.2f}", f"{planned.price_per_hour:g} a replica"),
        ("decoded at once", str(planned.batch), "sequences of one replica within the pace"),
        ("kept by a replica", f"{number(planned.kv_tokens)}", "tokens of KV"),
    ]
    if checked:
        smallest = fleets.edge(checked)[1]
        cards.insert(1, ("smallest that sufficed", str(smallest or "none"), "of those simulated, without spare ones"))
    inside = "".join(f'<div class="card"><h3>{a}</h3><b>{b}</b><span>{c}</span></div>' for a, b, c in cards)
    return f'<div class="cards">{inside}</div>'


def _bounds(planned: Planned) -> str:
    bounds = planned.bounds
    named = {"compute": bounds.compute, "KV memory": bounds.kv, "decode pace": bounds.pace}
    rows = [["", "replicas that it alone asks for"]]
    rows += [[f"{name}{', which binds' * (name == bounds.binding)}", f"{asks:.2f}"] for name, asks in named.items()]
    rows.append(["if a tenth more of the input were held", f"{planned.if_hit_10_more:.2f}"])
    rows.append(["if the load were a tenth more", f"{planned.if_load_10_more:.2f}"])
    return f"<h2>What binds</h2>{table(rows)}"


def _classes(planned: Planned) -> str:
    heads = ["", "a second", "held %", "prefill ms", "decode ms", "busy replicas", "load it bears"]
    rows = [[*heads, "per 1M tokens", "per 1M output tokens"]]
    rows += [[name, *class_cells(one)] for name, one in planned.classes.items()]
    return (
        "<h2>By class</h2><p>Busy: GPU seconds a second. The load that it bears: how busy a replica may be before the "
        f"class's bursts wait longer than its promise allows.</p>{table(rows)}"
    )


def class_cells(one: Demand) -> list[str]:
    """A class's row, behind its name; the terminal's table has the same."""
    return [
        f"{one.per_s:.3f}",
        f"{100 * one.hit:.1f}",
        f"{1e3 * one.prefill_s:.0f}",
        f"{1e3 * one.decode_s:.0f}",
        f"{one.busy:.2f}",
        f"{one.load_max:.2f}",
        f"{one.cost_per_million:.3f}",
        f"{one.cost_per_million_output:.2f}",
    ]


def _sizes(planned: Planned, checked: Sequence[Checked], label: str) -> str:
    if not checked:
        return "<h2>Simulated</h2><p>Not asked for: this is the closed form alone, to be checked by a replay.</p>"
    shown = [name for name in CLASSES if any(name in one.classes for one in checked)]
    drawn = [_curve(checked, name) for name in shown]
    smallest = fleets.edge(checked)[1]
    marks = [Event(smallest, f"{smallest} replicas suffice")] if smallest else []
    named = [(COLOURS[name], f"{name}, {PASS_SHARE[name]:.0%} wanted") for name in shown]
    low = floor(low for curve in drawn for low, _ in curve.spans)
    picture = curves(drawn, "replicas", "met of offered", is_log=False, low=low, least_step=1.0, marks=marks)
    said = fleets.text(checked, planned.replicas - planned.spare, sum(one.busy for one in planned.classes.values()))
    return (
        f"<h2>Simulated</h2><p><b>{escape(label)}.</b> Whiskers: 95 % intervals by session. Dashed red: the smallest "
        f"fleet that sufficed.</p><p>{keys(named)}</p><figure>{picture}</figure>"
        f'<div class="scroll"><pre>{escape(said)}</pre></div>'
    )


def _curve(checked: Sequence[Checked], name: ClassName) -> Curve:
    found = [(one.replicas, one.classes[name]) for one in checked if name in one.classes]
    points = [(float(size), share.met) for size, share in found]
    return Curve(name, COLOURS[name], points, [(share.low, share.high) for _, share in found])
