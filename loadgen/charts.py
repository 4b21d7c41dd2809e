"""Charts: inline SVG from numbers, drawn with the page's own colours.

Owns axes, ticks and marks. Never reads a verdict, and needs no script: a page with these works from file://."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 920
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to pixels, linear or by powers of ten."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    least_step: float = 0.0  # 1: of what is counted there are no halves

    def at(self, value: float) -> float:
        """The pixel of a value; values outside are drawn on the border."""
        low, high, value = (self._warp(number) for number in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.0
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Where a reader expects a line: 1, 2, 5 and their powers of ten."""
        if not self.is_log:
            step = max(self.least_step, _nice((self.high - self.low) / 6))
            first = math.ceil(self.low / step)
            return [number * step for number in range(first, math.floor(self.high / step) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = (1, 2, 5) if math.log10(self.high / self.low) < 2.5 else (1,)
        found = [mark * 10.0**power for power in powers for mark in marks]
        return [value for value in found if self.low <= value <= self.high]

    def _warp(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.is_log else value


@dataclass(frozen=True, slots=True)
class Dot:
    """A mark: a round one, or a cross where `is_cross`."""

    x: float
    y: float
    style: str
    is_cross: bool
    title: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A stack of named parts at one x."""

    x: float
    parts: tuple[tuple[str, float], ...]  # style, height
    title: str


def _nice(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= raw * 0.999)


def frame(x: Axis, y: Axis, height: int, x_name: str, y_name: str) -> list[str]:
    """Grid, tick labels and axis names."""
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{number(value)}</text>')
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at}" y="{height - BOTTOM + 17}" text-anchor="middle">{number(value)}</text>'
        )
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{height - 6}" text-anchor="end">{escape(x_name)}</text>')
    parts.append(f'<text class="axis" x="{LEFT + 6}" y="{TOP + 12}">{escape(y_name)}</text>')
    return parts


def scatter(dots: Sequence[Dot], line: Sequence[tuple[float, float]], x_name: str, y_name: str) -> str:
    """Dots on two logarithmic axes, and a line: below it is good."""
    if not dots:
        return ""
    height = 380
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots] + [value for _, value in line]
    x = Axis(min(xs) / 1.3, max(xs) * 1.3, LEFT, WIDTH - RIGHT, is_log=True)
    y = Axis(min(ys) / 1.3, max(ys) * 1.5, height - BOTTOM, TOP, is_log=True)
    parts = frame(x, y, height, x_name, y_name)
    if line:
        path = " ".join(f"{x.at(a)},{y.at(b)}" for a, b in line)
        parts.append(
            f'<polygon class="good" points="{path} {WIDTH - RIGHT},{height - BOTTOM} {LEFT},{height - BOTTOM}"/>'
        )
        parts.append(f'<polyline class="target" points="{path}"/>')
        parts.append(f'<text class="target-name" x="{WIDTH - RIGHT - 6}" y="{y.at(line[-1][1]) - 8}">target</text>')
    parts += [_mark(dot, x.at(dot.x), y.at(dot.y)) for dot in dots]
    return svg(parts, height, f"{y_name} by {x_name}")


def _mark(dot: Dot, x: float, y: float) -> str:
    title = f"<title>{escape(dot.title)}</title>"
    if dot.is_cross:
        return f'<path class="{dot.style} cross" d="M{x - 4},{y - 4}l8,8m0,-8l-8,8">{title}</path>'
    return f'<circle class="{dot.style}" cx="{x}" cy="{y}" r="3.6">{title}</circle>'


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at a moment, or a place on the axis that matters: a line through the picture."""

    at: float
    title: str


def _events(found: Sequence[Event], x: Axis, height: int) -> list[str]:
    return [
        f'<g><title>{escape(one.title)}</title><path class="event" d="M{x.at(one.at)},{TOP}V{height - BOTTOM}"/></g>'
        for one in found
    ]


def timeline(
    bars: Sequence[Bar], y_name: str, height: int = 190, width_s: float = 1.0, events: Sequence[Event] = ()
) -> str:
    """Stacked bars over the seconds of a run, each `width_s` wide."""
    if not bars:
        return ""
    tallest = max(sum(size for _, size in bar.parts) for bar in bars)
    top = max(1.0, tallest) if width_s == 1.0 else tallest or 1.0
    x = Axis(bars[0].x, bars[-1].x + width_s, LEFT, WIDTH - RIGHT)
    y = Axis(0, top * 1.3, height - BOTTOM, TOP, least_step=1.0 if width_s == 1.0 else 0.0)  # a rate has fractions
    parts = frame(x, y, height, "seconds from the start", y_name)
    for bar in bars:
        base = 0.0
        left, right = x.at(bar.x), x.at(bar.x + width_s)
        parts.append(f"<g><title>{escape(bar.title)}</title>")
        for style, size in bar.parts:
            upper, lower = y.at(base + size), y.at(base)
            width = max(1.0, right - left - (1 if right - left > 4 else 0))
            shape = (
                f'style="fill:var(--{style})" x="{left}" y="{upper}" width="{width:.1f}" height="{lower - upper:.1f}"'
            )
            parts.append(f"<rect {shape}/>" if size else "")
            base += size
        parts.append("</g>")
    return svg([*parts, *_events(events, x, height)], height, f"{y_name} by second")


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line; `style` is a colour of the page."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    spans: Sequence[tuple[float, float]] = ()  # of each point: how low and how high it may really lie


def curves(
    found: Sequence[Curve],
    x_name: str,
    y_name: str,
    *,
    is_log: bool = True,
    wanted: float | None = None,
    low: float = 0.0,
    least_step: float = 0.0,
    marks: Sequence[Event] = (),
) -> str:
    """Lines whose height is a share, each in its colour, above the share that is wanted; few points are marked."""
    height = 260
    drawn = [curve for curve in found if curve.points]
    if not drawn:
        return ""
    xs = [x for curve in drawn for x, _ in curve.points if x > 0 or not is_log]
    first, last = (min(xs), max(xs)) if xs else (0.1, 1.0)
    x = Axis(first, last if last > first else first * 1.01 + 1e-9, LEFT, WIDTH - RIGHT, is_log, least_step)
    y = Axis(low, 1.0 + 0.15 * (1.0 - low), height - BOTTOM, TOP)  # room for the axis's name above the lines
    parts = frame(x, y, height, x_name, y_name)
    if wanted is not None:
        parts.append(f'<path class="target" d="M{LEFT},{y.at(wanted)}H{WIDTH - RIGHT}"/>')
        below = y.at(wanted) + 15  # above it is the curve, where all is well
        parts.append(f'<text class="target-name" x="{WIDTH - RIGHT - 6}" y="{below}">{wanted:.0%} wanted</text>')
    for curve in drawn:
        path = " ".join(f"{x.at(a)},{y.at(b)}" for a, b in curve.points)
        parts.append(f'<polyline class="curve" style="stroke:var(--{curve.style})" points="{path}"/>')
        spans = zip(curve.points, curve.spans, strict=False)
        parts += [_whisker(curve, x.at(a), y.at(least), y.at(most)) for (a, _), (least, most) in spans]
        if len(curve.points) < 40:
            parts += [_point(curve, x.at(a), y.at(b), a, b) for a, b in curve.points]
    return svg([*parts, *_events(marks, x, height)], height, f"{y_name} by {x_name}")


def floor(shares: Iterable[float]) -> float:
    """Where a height of shares begins: what is wanted is near the top, and from zero all would be one line."""
    lowest = min(shares, default=0.0)
    return next((low for low in (0.9, 0.8, 0.5) if lowest > low), 0.0)


def _whisker(curve: Curve, x: float, low: float, high: float) -> str:
    ends = f"M{x - 4},{low}h8M{x - 4},{high}h8M{x},{low}V{high}"
    return f'<path class="curve" style="stroke:var(--{curve.style});stroke-opacity:.55" d="{ends}"/>'


def _point(curve: Curve, x: float, y: float, a: float, b: float) -> str:
    title = f"<title>{escape(curve.name)}: {number(a)}, {b:.1%}</title>"
    return f'<circle style="fill:var(--{curve.style})" cx="{x}" cy="{y}" r="3">{title}</circle>'


def keys(named: Iterable[tuple[str, str]]) -> str:
    """What each colour stands for."""
    return "".join(
        f'<span class="key"><i style="background:var(--{style})"></i>{escape(name)}</span>' for style, name in named
    )


def cumulative(values: Sequence[float], points: int = 120) -> list[tuple[float, float]]:
    """The share of values at or below each of so many of them."""
    ascending = sorted(value for value in values if value > 0)
    last = len(ascending) - 1
    places = sorted({round(step * last / (points - 1)) for step in range(points)}) if ascending else []
    return [(ascending[place], (place + 1) / len(ascending)) for place in places]


def strip(dots: Sequence[Dot], end: float, y_name: str, *, start: float = 0.0, events: Sequence[Event] = ()) -> str:
    """Dots over the seconds of a run, on a logarithmic height."""
    height = 190
    if not dots:
        return ""
    x = Axis(start, end, LEFT, WIDTH - RIGHT)
    # Three times the slowest: room for the axis's name above the dots.
    y = Axis(min(dot.y for dot in dots) / 1.3, max(dot.y for dot in dots) * 3, height - BOTTOM, TOP, is_log=True)
    parts = frame(x, y, height, "seconds from the start", y_name)
    parts += [_mark(dot, x.at(dot.x), y.at(dot.y)) for dot in dots]
    return svg([*parts, *_events(events, x, height)], height, f"{y_name} by second")


def gauge(share: float, low: float, high: float, wanted: float) -> str:
    """An attainment as a bar, its interval as a whisker and the wanted share as a tick."""
    x = Axis(0, 1, 0, 260)
    return (
        '<svg class="gauge" viewBox="0 0 260 26" role="img" aria-label="attainment">'
        '<rect class="rail" x="0" y="8" width="260" height="10" rx="5"/>'
        f'<rect class="{"met" if share >= wanted else "missed"}" x="0" y="8" width="{x.at(share)}" height="10" rx="5"/>'
        f'<line class="whisker" x1="{x.at(low)}" x2="{x.at(high)}" y1="13" y2="13"/>'
        f'<line class="wanted" x1="{x.at(wanted)}" x2="{x.at(wanted)}" y1="2" y2="24"/></svg>'
    )


def svg(parts: Iterable[str], height: int, name: str) -> str:
    """A figure that fills the column and says what it is."""
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">{inside}</svg>'


def number(value: float) -> str:
    """As people write it: 20k, 1.5, 0.05."""
    if value >= 1_000_000:
        return f"{value / 1e6:.3g}M"
    if value >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.10g}" if value >= 1 else f"{value:.2g}"
