"""One request judged: its times from the intended moment, beside its target.

Owns what met, on its line and smooth mean for a single answer. Never sums: the judge does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from loadgen.records import Record
from loadgen.targets import Target

GAP_MAX_S = 0.2  # the largest pause inside an answer that passes for smooth


@dataclass(frozen=True, slots=True)
class Judged:
    """One request beside its target. Latencies count from the intended time; None was not seen."""

    record: Record
    target: Target
    ttft_s: float | None
    tpot_s: float | None
    gap_max_s: float | None
    e2e_s: float | None
    is_met: bool
    is_on_line: bool  # every token came by its due time
    is_smooth: bool  # no pause over GAP_MAX_S

    @property
    def output_tokens(self) -> int:
        """As the server counted them, or else the events of its stream."""
        return self.record.completion_tokens or len(self.record.token_s)


def judge_one(record: Record, target: Target) -> Judged:
    """One record against its target. An answer that did not end well is a miss, however fast it began."""
    origin = record.intended_s or 0.0
    stamps = record.token_s
    is_done = record.outcome == "done" and record.end_s is not None
    ttft_s = stamps[0] - origin if stamps else None
    tokens = record.completion_tokens or len(stamps)
    tpot_s = (stamps[-1] - stamps[0]) / (tokens - 1) if len(stamps) > 1 and tokens > 1 else None
    gap_s = max((later - earlier for earlier, later in itertools.pairwise(stamps)), default=None)
    e2e_s = record.end_s - origin if is_done and record.end_s is not None else None
    # A promise of a first token can only be seen kept on a stream; other answers show their end as their first token.
    first_s = ttft_s if ttft_s is not None else e2e_s
    is_met = (
        is_done
        and _within(first_s, target.ttft_s)
        and (tpot_s is None or tpot_s <= target.tpot_s)
        and _within(e2e_s, target.deadline_s)
    )
    return Judged(
        record=record,
        target=target,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        gap_max_s=gap_s,
        e2e_s=e2e_s,
        is_met=is_met,
        is_on_line=is_done and _within(e2e_s, target.deadline_s) and _is_on_line(stamps, tokens, origin, target),
        is_smooth=is_done and (gap_s is None or gap_s <= GAP_MAX_S),
    )


def _is_on_line(stamps: list[float], tokens: int, origin: float, target: Target) -> bool:
    """Token n is due at ttft + (n-1) * tpot. Where an event carried several, they are taken as spread evenly."""
    for event, stamp in enumerate(stamps):
        token = event * tokens // len(stamps)
        due_s = target.ttft_s + token * target.tpot_s if token else target.ttft_s
        if stamp - origin > due_s:
            return False
    return True


def _within(seconds: float | None, limit_s: float) -> bool:
    return seconds is not None and seconds <= limit_s
