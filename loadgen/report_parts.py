"""The report's second page: refusals, hits, flat targets, sessions and the worst user's time line, as HTML.

Owns these parts' words. Every number in them is the breakdown's."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loadgen.breakdown import FLAT_TTFT_S, Bin, Breakdown, Hits, Moment, Refusals, Sessions
from loadgen.charts import Dot, strip
from loadgen.page import table

GAP_WORDS = {"none": "first turns and single requests", "tool": "after a tool", "human": "after a person"}


def refusals(found: Breakdown) -> str:
    """Three ways to tell them, of which one counts."""
    rows = [["", "offered", "refused for good", "came back", "met of offered", "met of admitted", "tokens wasted"]]
    rows += [[name, *_refusal_cells(one)] for name, one in found.refusals.items()]
    reasons = "; ".join(
        f"{escape(reason)} ({count})" for one in found.refusals.values() for reason, count in one.reasons.items()
    )
    said = f" Reasons: {reasons}." if reasons else ""
    return (
        "<h2>Refusals, three ways</h2><p>Met of offered is what counts: a refused request is a miss, unless its "
        "obedient return met the target from the first intended moment. Met of admitted would let a server win by "
        "refusing. "
        f"Wasted tokens were generated for requests that missed.{said}</p>{table(rows)}"
    )


def _refusal_cells(one: Refusals) -> list[str]:
    admitted = "-" if one.met_of_admitted is None else f"{one.met_of_admitted:.1%}"
    counts = [str(one.offered), str(one.refused), str(one.came_back)]
    return [*counts, f"{one.met_of_offered:.1%}", admitted, f"{one.wasted_tokens:,}"]


def hits(found: Breakdown) -> str:
    """Ideal against realised."""
    if not any(one.ideal or one.real for one in found.hits):
        return ""
    rows = [["", "requests", "input tokens", "an ideal cache %", "this one %", "of the ideal %"]]
    rows += [_hit_cells(one) for one in found.hits]
    return (
        "<h2>Prefix hits: ideal and real</h2><p>The ideal cache holds every block sent within the hour, on one "
        "worker for all. What it loses after tools is placement; what it loses after people is mostly eviction.</p>"
        f"{table(rows)}"
    )


def _hit_cells(one: Hits) -> list[str]:
    shares = [f"{100 * part / one.input_tokens:.1f}" for part in (one.ideal, one.real)]
    of_ideal = f"{100 * one.real / one.ideal:.1f}" if one.ideal else "-"
    return [f"{one.request_class}, {GAP_WORDS[one.gap]}", str(one.requests), f"{one.input_tokens:,}", *shares, of_ideal]


def bins(found: Breakdown) -> str:
    """Targets by new tokens beside flat ones."""
    if not found.bins:
        return ""
    flat = [f"within {seconds:g} s %" for seconds in FLAT_TTFT_S]
    rows = [["new tokens", "requests", "own target met %", "TTFT p50 ms", "p90", "p99", *flat]]
    lows = (0, *(one.below for one in found.bins))
    rows += [_bin_cells(one, low) for one, low in zip(found.bins, lows, strict=False)]
    return (
        "<h2>Chatbot+ by new tokens, beside flat targets</h2><p>A request's own target grows with its new tokens. For "
        "comparison with tools that promise one time to all: the share of offered requests whose first token came "
        f"within it.</p>{table(rows)}"
    )


def _bin_cells(one: Bin, low: int | None) -> list[str]:
    times = [
        "-" if value is None else f"{value * 1e3:.0f}" for value in (one.ttft_s.p50, one.ttft_s.p90, one.ttft_s.p99)
    ]
    name = f"{low:,} and more" if one.below is None else f"below {one.below:,}"
    met = f"{100 * one.met / one.requests:.1f}"
    return [name, str(one.requests), met, *times, *(f"{100 * share:.1f}" for share in one.flat)]


def sessions(found: Breakdown) -> str:
    """How many sessions came to their end."""
    if not found.sessions:
        return ""
    rows = [["", "begun", "finished", "every turn met", "length p50 s", "p90", "p99"]]
    rows += [[name, *_session_cells(one)] for name, one in found.sessions.items()]
    return (
        "<h2>Sessions</h2><p>Finished: every turn that was offered was answered. Its length counts from the first "
        f"intended moment, gaps included.</p>{table(rows)}"
    )


def _session_cells(one: Sessions) -> list[str]:
    lengths = (one.length_s.p50, one.length_s.p90, one.length_s.p99)
    return [
        *(str(count) for count in (one.begun, one.finished, one.all_met)),
        *("-" if value is None else f"{value:.1f}" for value in lengths),
    ]


def worst_user(found: Breakdown, name: str, end_s: float) -> str:
    """His time line: when he asked, when his first token came, where it was due."""
    timed = [one for one in found.worst_user if one.ttft_s is not None]
    if not timed:
        return ""
    unseen = len(found.worst_user) - len(timed)
    silent = f" {unseen} never had a first token." if unseen else ""
    return (
        f"<h3>{escape(name)}, request by request</h3><p>Dots met their target; crosses missed it.{silent}</p>"
        f"<figure>{strip(_dots(timed), end_s, 'TTFT, seconds')}</figure>"
    )


def _dots(moments: Sequence[Moment]) -> list[Dot]:
    return [
        Dot(
            one.at_s,
            one.ttft_s or 0.0,
            "met" if one.is_met else "missed" if one.outcome == "done" else "lost",
            not one.is_met,
            f"at {one.at_s:.1f} s: {one.new_tokens} new tokens, TTFT {(one.ttft_s or 0) * 1e3:.0f} ms"
            + ("" if one.target_s is None else f" of {one.target_s * 1e3:.0f}")
            + f", worker {one.worker or '?'}",
        )
        for one in moments
    ]
