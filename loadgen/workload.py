"""Workload: the figures that define a trace: arrivals, lengths, reuse, gaps and sessions, whole and by class and user.

Owns how figures are counted. A percentile is sorted[int(p * n)], a value that occurred; a last window that
the trace does not fill is left out."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from loadgen.traces import CLASSES, Row, Trace, cached_of, nominal_starts_s

ENDLESS_S = 1e18
ACCESSES_MAX = 600_000  # of blocks, for the cache curve; beyond it every k-th block stands for k
CURVE_PARTS = (64, 32, 16, 8, 4, 2, 1)  # capacities, as parts of all distinct blocks
ENGINE_BLOCKS = (16, 64)  # tokens that Headway's engine keeps together on a CPU, and on a GPU
USERS_MAX = 20  # shown by name: those who send most


class Spread(msgspec.Struct, frozen=True):
    """A distribution; None without values."""

    count: int = 0
    mean: float | None = None
    p10: float | None = None
    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p99: float | None = None
    most: float | None = None


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """When rows start, if every turn takes as long as was recorded."""

    span_s: float
    per_s: float | None
    cv: float | None  # of the gaps; a Poisson process has 1
    peak_to_mean_1s: float
    peak_to_mean_60s: float
    var_to_mean_1s: float
    var_to_mean_60s: float


class CachePoint(msgspec.Struct, frozen=True):
    """What an LRU cache of so many tokens would hold of the input."""

    tokens: int
    hit: float


class BlockHit(msgspec.Struct, frozen=True):
    """What an endless cache would hold that keeps whole blocks of so many tokens: scaled traces have smaller ones."""

    block_tokens: int
    hit: float


class Reuse(msgspec.Struct, frozen=True, kw_only=True):
    """Prefixes: what an endless cache would hold, and what a small one."""

    ideal_hit: float
    in_blocks: list[BlockHit]
    over_half: float  # share of requests of which more than half is held
    gap_s: Spread  # between two uses of a block
    distinct_tokens: int
    curve: list[CachePoint]
    sampled_1_in: int  # blocks, for the curve and the gaps


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A class, a user, or all."""

    name: str
    requests: int
    sessions: int
    users: int
    arrivals: Arrivals
    input_tokens: Spread
    output_tokens: Spread
    new_tokens: Spread | None  # None: the trace has no blocks
    ideal_hit: float | None
    turns: Spread  # of a session, with its sub-agents'
    tool_gap_s: Spread  # zero and missing ones left out
    human_gap_s: Spread
    after_tool: float  # share of requests that follow a tool's result


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """All that `describe` shows."""

    source: str
    block_size: int
    hash_scope: str
    notes: dict[str, int | float | str]
    bad_rows: int
    bad: list[str]
    whole: Group
    classes: list[Group]
    by_user: list[Group]
    reuse: Reuse | None
    nested: int  # rows of sub-agents
    has_clock: bool  # whether sessions begin at times of their own: Weka's all begin at 0, so rates mean nothing


def workload(trace: Trace, cache_tokens: Sequence[int] = ()) -> Workload:
    """Count everything; `cache_tokens` are further capacities for the curve."""
    has_blocks = any(row.hash_ids for row in trace.rows)
    cached = cached_of(trace, ENDLESS_S) if has_blocks else None
    starts = nominal_starts_s(trace.rows)
    users = Counter(row.user for row in trace.rows if row.user).most_common(USERS_MAX)
    everything = range(len(trace.rows))

    def group(name: str, chosen: Sequence[int]) -> Group:
        return _group(name, trace, chosen, cached, starts)

    by_class = {name: [i for i in everything if trace.rows[i].request_class == name] for name in CLASSES}
    return Workload(
        source=trace.header.source,
        block_size=trace.header.block_size,
        hash_scope=trace.header.hash_scope,
        notes=trace.header.notes,
        bad_rows=trace.bad_count,
        bad=[f"line {bad.line}: {bad.reason}" for bad in trace.bad],
        whole=group("all", everything),
        classes=[group(name, chosen) for name, chosen in by_class.items() if chosen],
        by_user=[group(name, [i for i in everything if trace.rows[i].user == name]) for name, _ in users],
        reuse=None if cached is None else _reuse(trace, cached, starts, cache_tokens),
        nested=sum(bool(row.parent) for row in trace.rows),
        has_clock=has_clock(trace.rows),
    )


def has_clock(rows: Sequence[Row]) -> bool:
    """Whether not everything begins at one moment."""
    starts = [row.timestamp for row in rows if row.timestamp is not None]
    return len(starts) < 2 or len(set(starts)) > 1


def _group(
    name: str, trace: Trace, chosen: Sequence[int], cached: Sequence[int] | None, starts: Sequence[float]
) -> Group:
    rows = [trace.rows[index] for index in chosen]
    held = None if cached is None else [cached[index] for index in chosen]
    turns = Counter(row.family for row in rows if row.family)
    after_tool = sum(row.gap == "tool" for row in rows)
    new = None if held is None else [row.input_length - hit for row, hit in zip(rows, held, strict=True)]
    return Group(
        name=name,
        requests=len(rows),
        sessions=len(turns),
        users=len({row.user for row in rows if row.user}),
        arrivals=arrivals(sorted(starts[index] for index in chosen)),
        input_tokens=spread(row.input_length for row in rows),
        output_tokens=spread(row.output_length for row in rows),
        new_tokens=None if new is None else spread(new),
        ideal_hit=None if held is None else sum(held) / sum(row.input_length for row in rows),
        turns=spread(turns.values()),
        tool_gap_s=_gaps(rows, "tool"),
        human_gap_s=_gaps(rows, "human"),
        after_tool=after_tool / len(rows),
    )


def _gaps(rows: Iterable[Row], kind: str) -> Spread:
    return spread(row.delay / 1e3 for row in rows if row.gap == kind and row.delay)


def spread(values: Iterable[float]) -> Spread:
    """The distribution of what there is."""
    found = sorted(values)
    if not found:
        return Spread()
    p10, p50, p75, p90, p99 = (found[int(share * len(found))] for share in (0.1, 0.5, 0.75, 0.9, 0.99))
    return Spread(len(found), sum(found) / len(found), p10, p50, p75, p90, p99, found[-1])


def arrivals(at: Sequence[float]) -> Arrivals:
    """From start times in order."""
    gaps, span_s = np.diff(at), at[-1] - at[0]
    seconds, minutes = (_counts(at, width_s) for width_s in (1.0, 60.0))
    return Arrivals(
        span_s=span_s,
        per_s=len(at) / span_s if span_s else None,
        cv=float(gaps.std() / gaps.mean()) if span_s else None,
        peak_to_mean_1s=float(seconds.max() / seconds.mean()),
        peak_to_mean_60s=float(minutes.max() / minutes.mean()),
        var_to_mean_1s=float(seconds.var() / seconds.mean()),
        var_to_mean_60s=float(minutes.var() / minutes.mean()),
    )


def _counts(at: Sequence[float], width_s: float) -> np.typing.NDArray[np.int64]:
    windows = ((np.asarray(at) - at[0]) / width_s).astype(int)
    whole = max(1, int((at[-1] - at[0]) / width_s))
    return np.bincount(windows)[:whole].astype(np.int64)


def _reuse(trace: Trace, cached: Sequence[int], starts: Sequence[float], cache_tokens: Sequence[int]) -> Reuse:
    rows, size = trace.rows, trace.header.block_size
    every = max(1, -(-sum(len(row.hash_ids) for row in rows) // ACCESSES_MAX))
    order = sorted(range(len(rows)), key=lambda index: (starts[index], index))
    asked = _asked(trace, order, every)
    distinct = len({block for blocks in asked for block in blocks})
    parts = {max(1, distinct // part) for part in CURVE_PARTS} | {tokens // size // every for tokens in cache_tokens}
    whole = sum(row.input_length for row in rows)
    lengths = [rows[index].input_length for index in order]
    return Reuse(
        ideal_hit=sum(cached) / whole,
        in_blocks=[BlockHit(tokens, hit_in_blocks(trace, cached, tokens)) for tokens in ENGINE_BLOCKS],
        over_half=sum(2 * hit > row.input_length for hit, row in zip(cached, rows, strict=True)) / len(rows),
        gap_s=spread(_reuse_gaps_s(asked, [starts[index] for index in order])),
        distinct_tokens=distinct * every * size,
        curve=[CachePoint(c * every * size, _lru_hit(asked, lengths, c, every * size) / whole) for c in sorted(parts)],
        sampled_1_in=every,
    )


def hit_in_blocks(trace: Trace, cached: Sequence[int], tokens: int) -> float:
    """The share of input that is held where a held prefix counts in whole blocks of so many tokens alone."""
    return sum(held // tokens * tokens for held in cached) / sum(row.input_length for row in trace.rows)


def _asked(trace: Trace, order: Sequence[int], every: int) -> list[list[tuple[str, int]]]:
    """The blocks of each request in order of time, every k-th by its place in the prompt, under their full names."""
    is_local = trace.header.hash_scope == "local"
    rows = (trace.rows[index] for index in order)
    return [[(row.family if is_local else "", block) for block in row.hash_ids[every // 2 :: every]] for row in rows]


def _lru_hit(asked: Sequence[Sequence[tuple[str, int]]], lengths: Sequence[int], capacity: int, tokens: int) -> int:
    """Input tokens that an LRU cache of `capacity` blocks, of `tokens` each, holds: leading blocks alone."""
    kept: OrderedDict[tuple[str, int], None] = OrderedDict()
    hit = 0
    for blocks, length in zip(asked, lengths, strict=True):
        run = next((place for place, block in enumerate(blocks) if block not in kept), len(blocks))
        hit += min(run * tokens, length)
        for block in blocks:
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > capacity:
            kept.popitem(last=False)
    return hit


def _reuse_gaps_s(asked: Sequence[Sequence[tuple[str, int]]], starts: Sequence[float]) -> list[float]:
    last: dict[tuple[str, int], float] = {}
    gaps = []
    for blocks, now in zip(asked, starts, strict=True):
        gaps += [now - last[block] for block in blocks if block in last]
        last.update(dict.fromkeys(blocks, now))
    return gaps
