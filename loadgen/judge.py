"""The judge: records and budgets in, a verdict out. The same records give the same verdict, to the last digit.

Owns what counts as met. Never forgives: every offered request that did not meet its target is a miss, whether it was
refused, failed, left, abandoned or unfinished."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from loadgen.breakdown import Breakdown, breakdown
from loadgen.judged import Judged, judge_one
from loadgen.ranks import Quantiles, quantiles, rank
from loadgen.records import Outcome, Record, Run, judged_of
from loadgen.targets import Budgets, new_tokens, target_of
from loadgen.traces import CLASSES, ClassName

LAG_SHARE = 0.05  # of the tightest TTFT target: a client later than this at p99 has measured itself
REFUSED_CHAT_MAX = 0.01  # no run counts with more chat refused
PASS_SHARE: dict[ClassName, float] = {"chatbot+": 0.99, "background-agent": 0.95, "data-processor": 0.99}
FAIR_OFFERED = 50  # a user with fewer offered chat requests is not named the worst: one miss of ten is chance
FAIR_OFFERED_MIN = 5  # the same where nobody has as many: a short run has a worst user, too
NO_WORKER = "none"  # in the place of a name
BOOTSTRAP_ROUNDS, BOOTSTRAP_CELLS = 1000, 500_000
OUTCOMES: tuple[Outcome, ...] = ("done", "refused", "failed", "left", "abandoned", "unfinished")


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """Any group of offered requests: a class, a class on a worker."""

    offered: int
    met: int
    outcomes: dict[Outcome, int]
    on_line: int
    smooth: int
    ttft_s: Quantiles
    tpot_s: Quantiles
    gap_max_s: Quantiles
    e2e_s: Quantiles
    input_tokens: int  # of answered requests, as are the next two
    cached_ideal: int
    cached_real: int
    output_tokens: int

    @property
    def attainment(self) -> float:
        """Met of offered: the number that counts."""
        return self.met / self.offered if self.offered else math.nan


class ClassVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """A class: its cell, whether it passes, and how sure its attainment is."""

    cell: Cell
    is_pass: bool
    attainment_low: float  # 95 % bootstrap by session
    attainment_high: float
    retried_met: int  # met after an obeyed refusal, counted from the first intended time

    def is_unsure(self, wanted: float) -> bool:
        """It did not pass, but so few sessions may miss by chance: the interval includes what is wanted."""
        return not self.is_pass and self.attainment_high >= wanted


class UserVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One user's chat requests."""

    name: str
    offered: int
    met: int
    ttft_p99_s: float | None


class Second(msgspec.Struct, frozen=True, kw_only=True):
    """One second of the run."""

    at_s: int
    offered: int
    met: int
    refused: int
    lost: int  # failed, left, abandoned or unfinished
    waiting_max: int  # requests of any second without their first token yet, most at one moment
    ttft_max_s: float | None  # of chatbot+


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """All that the reports show."""

    run: Run
    offered: int
    met: int
    warmup_requests: int = 0  # offered before the judged time
    goodput_per_s: float
    good_tokens_per_s: float
    wasted_tokens: int  # generated for requests that missed
    classes: dict[ClassName, ClassVerdict]
    workers: dict[ClassName, dict[str, Cell]]  # they add up to the class; NO_WORKER: never had one, or it was not told
    users: list[UserVerdict]  # worst first
    worst_user: UserVerdict | None  # of those with fair_offered_min requests
    fair_offered_min: int = FAIR_OFFERED_MIN
    users_p5: float | None
    jain: float | None
    confusion: dict[ClassName, dict[str, int]]
    class_reasons: dict[str, int]
    seconds: list[Second]
    lag_ms: Quantiles
    lag_bound_ms: float | None
    prompt_mismatches: int  # the server counted other prompt tokens than were sent
    output_mismatches: int
    breakdown: Breakdown
    invalid: list[str]  # why this run proves nothing; empty: valid

    @property
    def is_pass(self) -> bool:
        """Valid, and every class that was offered passes."""
        return not self.invalid and all(found.is_pass for found in self.classes.values())


def judge(run: Run, records: Sequence[Record], budgets: Budgets) -> Verdict:
    """The verdict."""
    judged = [judge_one(record, target_of(record, budgets)) for record in judged_of(run, records)]
    met = [one for one in judged if one.is_met]
    lag_ms, bound_ms = _lag_ms(judged), _lag_bound_ms(judged)
    users = _users(judged)
    least = FAIR_OFFERED if any(user.offered >= FAIR_OFFERED for user in users) else FAIR_OFFERED_MIN
    fair = [user for user in users if user.offered >= least]
    shares = [user.met / user.offered for user in fair]
    chat = _of_class(judged, "chatbot+")
    return Verdict(
        run=run,
        offered=len(judged),
        met=len(met),
        warmup_requests=len(records) - len(judged),
        goodput_per_s=len(met) / run.judged_s,
        good_tokens_per_s=sum(one.output_tokens for one in met) / run.judged_s,
        wasted_tokens=sum(one.output_tokens for one in judged if not one.is_met),
        classes={name: _class_verdict(name, found) for name in CLASSES if (found := _of_class(judged, name))},
        workers={name: _by_worker(found) for name in CLASSES if (found := _of_class(judged, name))},
        users=users,
        worst_user=fair[0] if fair else None,
        fair_offered_min=least,
        users_p5=rank(sorted(shares), 0.05),
        jain=_jain(shares),
        confusion={name: _confusion(found) for name in CLASSES if (found := _of_class(judged, name))},
        class_reasons=_counts(one.record.class_reason for one in judged if one.record.class_reason),
        seconds=_seconds(judged, run),
        lag_ms=lag_ms,
        lag_bound_ms=bound_ms,
        prompt_mismatches=sum(_is_other(one.record.prompt_tokens, one.record.input_tokens) for one in judged),
        output_mismatches=sum(_is_other(one.record.completion_tokens, one.record.output_tokens) for one in judged),
        breakdown=breakdown(judged, fair[0].name if fair else ""),
        invalid=_invalid(run, lag_ms, bound_ms, chat),
    )


def _cell(judged: Sequence[Judged]) -> Cell:
    answered = [one.record for one in judged if one.record.outcome == "done"]
    return Cell(
        offered=len(judged),
        met=sum(one.is_met for one in judged),
        outcomes={name: sum(one.record.outcome == name for one in judged) for name in OUTCOMES},
        on_line=sum(one.is_on_line for one in judged),
        smooth=sum(one.is_smooth for one in judged),
        ttft_s=quantiles(one.ttft_s for one in judged),
        tpot_s=quantiles(one.tpot_s for one in judged),
        gap_max_s=quantiles(one.gap_max_s for one in judged),
        e2e_s=quantiles(one.e2e_s for one in judged),
        input_tokens=sum(record.input_tokens for record in answered),
        cached_ideal=sum(min(record.ideal_cached, record.input_tokens) for record in answered),
        cached_real=sum(record.cached_tokens or 0 for record in answered),
        output_tokens=sum(one.output_tokens for one in judged),
    )


def _class_verdict(name: ClassName, judged: Sequence[Judged]) -> ClassVerdict:
    cell = _cell(judged)
    low, high = _interval(judged)
    return ClassVerdict(
        cell=cell,
        is_pass=cell.attainment >= PASS_SHARE[name],
        attainment_low=low,
        attainment_high=high,
        retried_met=sum(one.is_met and one.record.attempts > 1 for one in judged),
    )


def _by_worker(judged: Sequence[Judged]) -> dict[str, Cell]:
    """None where the server named no worker at all: the class says it already."""
    grouped: dict[str, list[Judged]] = {}
    for one in judged:
        grouped.setdefault(one.record.worker or NO_WORKER, []).append(one)
    named = sorted(name for name in grouped if name != NO_WORKER)
    order = [*named, NO_WORKER] if named and NO_WORKER in grouped else named
    return {name: _cell(grouped[name]) for name in order}


def _interval(judged: Sequence[Judged]) -> tuple[float, float]:
    """Sessions are drawn whole, since their turns share one fate. Seeded: a verdict is a function of its records."""
    groups: dict[str, list[bool]] = {}
    for number, one in enumerate(judged):
        groups.setdefault(one.record.parent or one.record.session or f"\0{number}", []).append(one.is_met)
    met, offered = resampled(np.array([[sum(group), len(group)] for group in groups.values()])).T
    low, high = np.percentile(met / offered, [2.5, 97.5])
    return float(low), float(high)


def resampled(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The sums of its rows in each round of a bootstrap, a few rounds at a time: all at once would be gigabytes."""
    rng, size = np.random.default_rng(0), len(counts)
    at_once = max(1, BOOTSTRAP_CELLS // size)
    rounds = [min(at_once, BOOTSTRAP_ROUNDS - done) for done in range(0, BOOTSTRAP_ROUNDS, at_once)]
    return np.concatenate([counts[rng.integers(0, size, size=(some, size))].sum(axis=1) for some in rounds])


def _users(judged: Sequence[Judged]) -> list[UserVerdict]:
    """Chat requests by user, the worst first."""
    grouped: dict[str, list[Judged]] = {}
    for one in _of_class(judged, "chatbot+"):
        if one.record.user:
            grouped.setdefault(one.record.user, []).append(one)
    users = [
        UserVerdict(
            name=name,
            offered=len(found),
            met=sum(one.is_met for one in found),
            ttft_p99_s=quantiles(one.ttft_s for one in found).p99,
        )
        for name, found in grouped.items()
    ]
    return sorted(users, key=lambda user: (user.met / user.offered, -user.offered, user.name))


def _seconds(judged: Sequence[Judged], run: Run) -> list[Second]:
    """By the second in which each request was intended; an abandoned one has none."""
    span = range(int(run.warmup_s), math.ceil(run.duration_s))
    grouped: dict[int, list[Judged]] = {second: [] for second in span}
    for one in judged:
        if one.record.intended_s is not None:
            grouped.setdefault(int(one.record.intended_s), []).append(one)
    waiting = _waiting(judged, run.duration_s)
    return [_second(at, grouped[at], waiting.get(at, 0)) for at in sorted(grouped)]


def _waiting(judged: Sequence[Judged], until_s: float) -> dict[int, int]:
    """By second, the most that waited at once: the queue as clients feel it, and how long it takes to go."""
    moments: list[tuple[float, int]] = []
    for one in judged:
        begin_s, record = one.record.intended_s, one.record
        if begin_s is not None:
            served_s = record.token_s[0] if record.token_s else record.end_s
            moments += [(begin_s, 1), (max(begin_s, until_s if served_s is None else served_s), -1)]
    most: dict[int, int] = {}
    count, second = 0, 0
    for at_s, change in sorted(moments):
        while second < int(at_s):  # who waits on into a second waits in it
            second += 1
            most[second] = count
        count += change
        most[second] = max(most.get(second, 0), count)
    return most


def _second(at_s: int, judged: Sequence[Judged], waiting_max: int) -> Second:
    refused = sum(one.record.outcome == "refused" for one in judged)
    chat = [one.ttft_s for one in _of_class(judged, "chatbot+") if one.ttft_s is not None]
    return Second(
        at_s=at_s,
        offered=len(judged),
        met=sum(one.is_met for one in judged),
        refused=refused,
        lost=sum(one.record.outcome != "done" for one in judged) - refused,
        waiting_max=waiting_max,
        ttft_max_s=max(chat, default=None),
    )


def _confusion(judged: Sequence[Judged]) -> dict[str, int]:
    return _counts(one.record.assigned_class or "unknown" for one in judged if one.record.attempts)


def _lag_ms(judged: Sequence[Judged]) -> Quantiles:
    lags = ((one.record.sent_s, one.record.intended_s) for one in judged)
    return quantiles((sent - at) * 1e3 for sent, at in lags if sent is not None and at is not None)


def _lag_bound_ms(judged: Sequence[Judged]) -> float | None:
    tightest = min((one.target.ttft_s for one in judged), default=math.inf)
    return LAG_SHARE * tightest * 1e3 if math.isfinite(tightest) else None


def _invalid(run: Run, lag_ms: Quantiles, bound_ms: float | None, chat: Sequence[Judged]) -> list[str]:
    reasons = []
    if bound_ms is not None and lag_ms.p99 is not None and lag_ms.p99 > bound_ms:
        reasons.append(f"the client lagged: p99 {lag_ms.p99:.1f} ms, over {bound_ms:.1f} ms (5 % of the tightest TTFT)")
    refused = sum(one.record.outcome == "refused" for one in chat)
    if chat and refused > REFUSED_CHAT_MAX * len(chat):
        reasons.append(f"{refused} of {len(chat)} chatbot+ requests were refused; over 1 % no run counts")
    if run.is_interrupted:
        reasons.append("the run was interrupted")
    return reasons


def _jain(shares: Sequence[float]) -> float | None:
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


def _counts(names: Iterable[str]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _of_class(judged: Iterable[Judged], name: ClassName) -> list[Judged]:
    return [one for one in judged if one.record.request_class == name]


def _is_other(counted: int | None, wanted: int) -> bool:
    return counted is not None and counted != wanted


def points(records: Sequence[Record], budgets: Budgets) -> list[tuple[int, Judged]]:
    """Each timed chat request beside its new tokens: the target's own axis."""
    judged = (judge_one(record, target_of(record, budgets)) for record in records)
    return [
        (new_tokens(one.record), one)
        for one in judged
        if one.record.request_class == "chatbot+" and one.ttft_s is not None
    ]
