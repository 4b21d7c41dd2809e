"""The report of bench/policies.py as Markdown and as one page.

Owns how sections are shown. Every number is a section's."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench.policy_lab import Curve, shares
from bench.policy_tables import Section
from loadgen.charts import Curve as Line
from loadgen.charts import curves, keys
from loadgen.judge import PASS_SHARE
from loadgen.page import document, table
from loadgen.simulate import LABEL
from loadgen.traces import CLASSES

COLOURS = ("one", "two", "three", "four")
STYLE = (
    "<style>.said{font-size:13px}"
    + "".join(f".lead{many} :is(th,td):nth-child(-n+{many}){{text-align:left}}" for many in (1, 2, 3, 4))
    + "</style>"
)


def markdown(sections: Sequence[Section]) -> str:
    """Tables under headings."""
    parts = []
    for one in sections:
        lines = ["| " + " | ".join(row) + " |" for row in one.rows]
        lines.insert(1, "|" + " --- |" * len(one.rows[0]))
        parts.append("\n\n".join(part for part in (f"### {one.title}", one.note, "\n".join(lines)) if part))
    return "\n\n".join(parts)


def page(sections: Sequence[Section], said: Sequence[str]) -> str:
    """The goals first, if they are reckoned already; then everything, in its order."""
    goals = [one for one in sections if one.title == "Goals"]
    parts = [STYLE, f"<h1>Policies: {LABEL}</h1>", *(f'<p class="said">{escape(line)}</p>' for line in said)]
    for one in [*goals, *(one for one in sections if one not in goals)]:
        parts.append(f"<h2>{escape(one.title)}</h2>" + (f"<p>{escape(one.note)}</p>" if one.note else ""))
        parts += _figures(one.curves)
        parts.append(table(one.rows, f"lead{_lead(one.rows)}"))
    return document(f"Policies: {LABEL}", parts)


def _lead(rows: Sequence[Sequence[str]]) -> int:
    """How many columns on the left are words."""
    body = rows[1:]
    words = [any(row[at][:1].isalpha() for row in body) for at in range(min(4, len(rows[0])))]
    return next((at for at, is_word in enumerate(words) if not is_word), len(words)) or 1


def _figures(drawn: dict[str, Curve]) -> list[str]:
    """Attainment over load by class, for as many policies as there are colours, where anybody fails a class."""
    shown = dict(list(drawn.items())[: len(COLOURS)])
    found = []
    for name in CLASSES:
        lines = [
            Line(policy, style, [(load, shares(one)[name]) for load, one in curve if name in shares(one)])
            for (policy, curve), style in zip(shown.items(), COLOURS, strict=False)
        ]
        if all(share >= PASS_SHARE[name] for line in lines for _, share in line.points):
            continue
        picture = curves(lines, "load", f"{name} met", wanted=PASS_SHARE[name])
        found += [f"<figure>{picture}</figure>"] if picture else []
    named = keys(zip(COLOURS, shown, strict=False))
    return [f"<p>{named}</p>", *found] if found else []
