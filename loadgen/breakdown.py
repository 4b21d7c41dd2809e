"""Breakdown: the verdict in detail: refusals three ways, hits by gap, targets by new tokens, the worst user.

Owns these tables. Never decides what is met: it is given judged requests."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from loadgen.judged import Judged
from loadgen.ranks import Quantiles, quantiles
from loadgen.targets import new_tokens
from loadgen.traces import CLASSES, ClassName, Gap

BIN_EDGES = (64, 256, 1024, 4096, 16384, 65536)  # new tokens: powers of four, from a short line to a cold repository
FLAT_TTFT_S = (0.5, 1.0, 2.0, 5.0)  # what others promise, whatever the prompt
MOMENTS_MAX = 1000  # of the worst user: beyond it every n-th
GAPS: tuple[Gap, ...] = ("none", "tool", "human")


class Refusals(msgspec.Struct, frozen=True, kw_only=True):
    """A class's refusals, in the three ways that can be told; only met of offered counts."""

    offered: int
    refused: int  # for good
    came_back: int  # refused first, then answered on an obedient return
    met_of_offered: float
    met_of_admitted: float | None  # flatters a server that refuses: never the headline
    wasted_tokens: int  # generated for requests that missed
    reasons: dict[str, int]


class Hits(msgspec.Struct, frozen=True, kw_only=True):
    """Answered requests of a class after one kind of gap: what a cache could have held, and what this one held."""

    request_class: ClassName = msgspec.field(name="class")
    gap: Gap
    requests: int
    input_tokens: int
    ideal: int
    real: int


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """Chat requests with so many new tokens: their own target beside flat ones."""

    below: int | None  # new tokens; None: all larger ones
    requests: int
    met: int
    ttft_s: Quantiles
    flat: list[float]  # share of all offered with a first token within each of FLAT_TTFT_S


class Sessions(msgspec.Struct, frozen=True, kw_only=True):
    """Whole sessions of a class: begun, brought to their end, and how long that took."""

    begun: int
    finished: int  # every offered turn answered
    all_met: int
    length_s: Quantiles  # of the finished, gaps included


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the worst user."""

    at_s: float
    ttft_s: float | None
    target_s: float | None
    is_met: bool
    outcome: str
    new_tokens: int
    worker: str


class Breakdown(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    refusals: dict[ClassName, Refusals]
    misses: dict[ClassName, dict[str, int]]  # by what was broken, the commonest first
    hits: list[Hits]
    bins: list[Bin]
    sessions: dict[ClassName, Sessions]
    worst_user: list[Moment]
    imbalance: float | None  # busiest worker's computed tokens to the mean one's
    prompt_realised: float | None  # tokens that the server counted to those that were meant
    output_realised: float | None


def breakdown(judged: Sequence[Judged], worst_user: str) -> Breakdown:
    """Every table of the second page."""
    by_class = {name: [one for one in judged if one.record.request_class == name] for name in CLASSES}
    shown = {name: found for name, found in by_class.items() if found}
    return Breakdown(
        refusals={name: _refusals(found) for name, found in shown.items()},
        misses={name: misses for name, found in shown.items() if (misses := _misses(found))},
        hits=[hits for name, found in shown.items() for gap in GAPS if (hits := _hits(name, gap, found)) is not None],
        bins=_bins(by_class["chatbot+"]),
        sessions={name: sessions for name, found in shown.items() if (sessions := _sessions(found)).begun},
        worst_user=_moments([one for one in by_class["chatbot+"] if worst_user and one.record.user == worst_user]),
        imbalance=_imbalance(judged),
        prompt_realised=_realised([(one.record.prompt_tokens, one.record.input_tokens) for one in judged]),
        output_realised=_realised([(one.record.completion_tokens, one.record.output_tokens) for one in judged]),
    )


def _refusals(judged: Sequence[Judged]) -> Refusals:
    refused = [one for one in judged if one.record.outcome == "refused"]
    admitted, met = len(judged) - len(refused), sum(one.is_met for one in judged)
    reasons: dict[str, int] = {}
    for one in refused:
        reasons[one.record.reason] = reasons.get(one.record.reason, 0) + 1
    return Refusals(
        offered=len(judged),
        refused=len(refused),
        came_back=sum(one.record.attempts > 1 and one.record.outcome != "refused" for one in judged),
        met_of_offered=met / len(judged),
        met_of_admitted=met / admitted if admitted else None,
        wasted_tokens=sum(one.output_tokens for one in judged if not one.is_met),
        reasons=dict(sorted(reasons.items(), key=lambda item: -item[1])[:5]),
    )


def _misses(judged: Sequence[Judged]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for one in judged:
        if not one.is_met:
            counted[_why(one)] = counted.get(_why(one), 0) + 1
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _why(one: Judged) -> str:
    """What a miss broke: each of its promises, or its answer."""
    if one.record.outcome != "done":
        return one.record.outcome
    first_s = one.ttft_s if one.ttft_s is not None else one.e2e_s
    broken = [
        name
        for name, seconds, limit_s in (
            ("first token late", first_s, one.target.ttft_s),
            ("pace too slow", one.tpot_s, one.target.tpot_s),
            ("end too late", one.e2e_s, one.target.deadline_s),
        )
        if seconds is not None and seconds > limit_s
    ]
    return " and ".join(broken)


def _hits(name: ClassName, gap: Gap, judged: Sequence[Judged]) -> Hits | None:
    found = [one.record for one in judged if one.record.gap == gap and one.record.outcome == "done"]
    if not found:
        return None
    return Hits(
        request_class=name,
        gap=gap,
        requests=len(found),
        input_tokens=sum(record.input_tokens for record in found),
        ideal=sum(min(record.ideal_cached, record.input_tokens) for record in found),
        real=sum(record.cached_tokens or 0 for record in found),
    )


def _bins(judged: Sequence[Judged]) -> list[Bin]:
    grouped: dict[int | None, list[Judged]] = {}
    for one in judged:
        below = next((edge for edge in BIN_EDGES if new_tokens(one.record) < edge), None)
        grouped.setdefault(below, []).append(one)
    return [_bin(below, grouped[below]) for below in (*BIN_EDGES, None) if below in grouped]


def _bin(below: int | None, judged: Sequence[Judged]) -> Bin:
    first = [one.ttft_s for one in judged if one.ttft_s is not None and one.record.outcome == "done"]
    return Bin(
        below=below,
        requests=len(judged),
        met=sum(one.is_met for one in judged),
        ttft_s=quantiles(first),
        flat=[sum(seconds <= flat_s for seconds in first) / len(judged) for flat_s in FLAT_TTFT_S],
    )


def _sessions(judged: Sequence[Judged]) -> Sessions:
    grouped: dict[str, list[Judged]] = {}
    for one in judged:
        if one.record.session:
            grouped.setdefault(one.record.parent or one.record.session, []).append(one)
    finished = [found for found in grouped.values() if all(one.record.outcome == "done" for one in found)]
    return Sessions(
        begun=len(grouped),
        finished=len(finished),
        all_met=sum(all(one.is_met for one in found) for found in grouped.values()),
        length_s=quantiles(
            max(one.record.end_s or 0.0 for one in found) - min(one.record.intended_s or 0.0 for one in found)
            for found in finished
        ),
    )


def _moments(judged: Sequence[Judged]) -> list[Moment]:
    timed = [one for one in judged if one.record.intended_s is not None]
    return [
        Moment(
            at_s=one.record.intended_s or 0.0,
            ttft_s=one.ttft_s,
            target_s=one.target.ttft_s if one.target.ttft_s < float("inf") else None,
            is_met=one.is_met,
            outcome=one.record.outcome,
            new_tokens=new_tokens(one.record),
            worker=one.record.worker,
        )
        for one in sorted(timed, key=lambda one: one.record.intended_s or 0.0)[:: -(-len(timed) // MOMENTS_MAX) or 1]
    ]


def _imbalance(judged: Sequence[Judged]) -> float | None:
    """Tokens that each worker computed: prompts less what it held, and answers."""
    busy: dict[str, int] = {}
    for one in judged:
        record = one.record
        if record.worker and record.outcome == "done":
            computed = max(0, record.input_tokens - (record.cached_tokens or 0)) + one.output_tokens
            busy[record.worker] = busy.get(record.worker, 0) + computed
    return max(busy.values()) * len(busy) / sum(busy.values()) if busy and sum(busy.values()) else None


def _realised(pairs: Sequence[tuple[int | None, int]]) -> float | None:
    counted = [(got, wanted) for got, wanted in pairs if got is not None]
    wanted = sum(meant for _, meant in counted)
    return sum(got for got, _ in counted) / wanted if wanted else None
