"""Shape: a trace made smaller, smoother or mixed: whole sessions sampled, steps jittered, gaps capped, users drawn.

Owns these changes and their seeds. Load is changed by sessions, never by clocks: faster clocks would change reuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from loadgen.compose import ordered, skewed_user
from loadgen.texts import is_text
from loadgen.traces import Header, Row, Trace, TraceError, families


def sample(trace: Trace, share: float, seed: int) -> Trace:
    """So many of the sessions, whole and with their sub-agents; a row without one is a session of its own."""
    rng = np.random.default_rng(seed)
    names = families(trace.rows)
    chosen = {name for name in dict.fromkeys(names) if rng.random() < share}
    rows = tuple(row for name, row in zip(names, trace.rows, strict=True) if name in chosen)
    if not rows:
        raise TraceError(f"a sample of {share:g} of the sessions is empty")
    return replace(trace, rows=rows, header=trace.header.noting(sampled=share))


def at_load(trace: Trace, load: float, seed: int) -> Trace:
    """So many times the sessions: whole copies with text of their own, at other times, and a sample for the rest."""
    if load == 1.0:
        return trace
    span_ms = max((row.timestamp or 0.0) for row in trace.rows)
    rng = np.random.default_rng([seed, round(load * 1000)])
    whole, rest = divmod(load, 1.0)
    copies = [trace] * int(whole)
    if rest > 1e-9:
        of_rows = families(trace.rows)
        names = list(dict.fromkeys(of_rows))
        count = max(1, round(rest * len(names))) if not copies else round(rest * len(names))
        chosen = {names[index] for index in rng.permutation(len(names))[:count]}
        kept = (row for name, row in zip(of_rows, trace.rows, strict=True) if name in chosen)
        copies.append(replace(trace, rows=tuple(kept)))
    copies = [one for one in copies if one.rows]
    if len(copies) > 1 and any(map(is_text, trace.rows)):
        raise TraceError(f"{load:g} times a trace with text: copies of its sessions would not be new text to a cache")
    mixed = overlay([copies[0], *(_shifted(one, span_ms, rng) for one in copies[1:])])
    notes = {**trace.header.notes, "times_sessions": load}
    return replace(mixed, header=msgspec.structs.replace(mixed.header, notes=notes))


def _shifted(trace: Trace, span_ms: float, rng: np.random.Generator) -> Trace:
    """First turns moved around the span, as a ring: their pattern stays, their moments do not coincide."""
    by_ms = rng.uniform(0.0, span_ms)
    rows = (
        row
        if row.timestamp is None
        else msgspec.structs.replace(row, timestamp=round((row.timestamp + by_ms) % max(span_ms, 1e-3), 3))
        for row in trace.rows
    )
    return replace(trace, rows=tuple(rows))


def jitter(trace: Trace, step_s: float, seed: int) -> Trace:
    """Spread each stamp over the recorder's step behind it: Mooncake's conversation trace has steps of 3 s."""
    rng = np.random.default_rng(seed)
    rows = tuple(
        row
        if row.timestamp is None
        else msgspec.structs.replace(row, timestamp=round(row.timestamp + step_s * 1e3 * rng.random(), 3))
        for row in trace.rows
    )
    return ordered(replace(trace, rows=rows, header=trace.header.noting(jitter_s=step_s)))


def cap_gap(trace: Trace, most_s: float) -> Trace:
    """No turn waits longer; what is cut is said by the note, since it changes what a cache still holds."""
    over = sum(row.delay is not None and row.delay > most_s * 1e3 for row in trace.rows)
    rows = tuple(
        row if row.delay is None else msgspec.structs.replace(row, delay=min(row.delay, most_s * 1e3))
        for row in trace.rows
    )
    return replace(trace, rows=rows, header=trace.header.noting(gap_cap_s=most_s, gaps_capped=over))


def with_users(trace: Trace, count: int, seed: int) -> Trace:
    """Sessions get users, some of whom send far more than others; a user that a row has is kept."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, str] = {}
    rows = []
    for name, row in zip(families(trace.rows), trace.rows, strict=True):
        if name not in drawn:
            drawn[name] = skewed_user(rng, count)
        rows.append(row if row.user else msgspec.structs.replace(row, user=drawn[name]))
    return replace(trace, rows=tuple(rows), header=trace.header.noting(users=count))


def overlay(traces: Sequence[Trace]) -> Trace:
    """Several traces on one clock. Their blocks stay apart: equal ids of two sources are not the same text.

    Raises TraceError where block sizes differ: one that is guessed would be wrong."""
    if len(traces) == 1:
        return traces[0]
    sizes = {trace.header.block_size for trace in traces if any(row.hash_ids for row in trace.rows)}
    if len(sizes) > 1:
        raise TraceError(
            f"blocks of {' and '.join(map(str, sorted(sizes)))} tokens cannot share a trace: scale one first"
        )
    rows: list[Row] = []
    next_id = 0
    for number, trace in enumerate(traces):
        ids = global_ids(trace, next_id)
        next_id = max((max(found) + 1 for found in ids if found), default=next_id)
        rows += [_renamed(row, own, f"{number}/") for row, own in zip(trace.rows, ids, strict=True)]
    spans = [trace.header.notes.get("duration_s") for trace in traces]
    known = [span for span in spans if isinstance(span, (int, float))]
    header = Header(
        block_size=min(sizes, default=traces[0].header.block_size),
        source=" + ".join(dict.fromkeys(trace.header.source or "unnamed" for trace in traces)),
        licence=", ".join(dict.fromkeys(trace.header.licence for trace in traces if trace.header.licence)),
        slos={name: slo for trace in traces for name, slo in trace.header.slos.items()},
        notes={"duration_s": max(known)} if len(known) == len(spans) else {},
    )
    bad = tuple(bad for trace in traces for bad in trace.bad)
    return ordered(Trace(header, tuple(rows), bad, sum(trace.bad_count for trace in traces)))


def _renamed(row: Row, ids: list[int], prefix: str) -> Row:
    return msgspec.structs.replace(
        row,
        hash_ids=ids,
        session_id=row.session_id and prefix + row.session_id,
        parent=row.parent and prefix + row.parent,
        after=[prefix + name for name in row.after],
    )


def global_ids(trace: Trace, first: int = 0) -> list[list[int]]:
    """Each row's block ids, renumbered from `first` so that they mean the same in every session."""
    is_local = trace.header.hash_scope == "local"
    numbers: dict[str, dict[int, int]] = {}
    count, renamed = first, []
    for row in trace.rows:
        known = numbers.setdefault(row.family if is_local else "", {})
        for hash_id in row.hash_ids:
            if hash_id not in known:
                known[hash_id], count = count, count + 1
        renamed.append([known[hash_id] for hash_id in row.hash_ids])
    return renamed
