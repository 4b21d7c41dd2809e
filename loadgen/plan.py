"""Plan: how many replicas a workload needs, why, and what a million tokens of each class cost.

Owns the closed form: compute, KV and decode pace, at a hit rate that follows from the fleet's own memory. Never claims
more than its profile; the simulator is asked afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from loadgen.sim.profiles import Profile
from loadgen.targets import BudgetLine, Budgets
from loadgen.traces import CLASSES, ClassName, Row, Trace, cached_of, nominal_starts_s
from loadgen.workload import ENDLESS_S, workload
from policies.costs import StepFeatures, StepModel

REPLICAS_MAX = 512
KV_SHARE = 0.85  # of the blocks: the rest is what placement and fragments cost
TPOT_SHARE = 0.9  # of the promised pace: room for one prefill chunk in each step
RETAIN_S = 300.0  # a prefix is kept for the next turn so long, as the router's leases are
LOAD_MAX = 0.9  # no class is planned above it
CHUNK_TOKENS = 2048  # of prefill in one step
LATE_SHARE: Mapping[ClassName, float] = {"chatbot+": 0.01, "background-agent": 0.05, "data-processor": 0.01}


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """One class, at the hit rate of the planned fleet."""

    per_s: float
    hit: float  # of its input tokens
    prefill_s: float  # GPU seconds a request, mean
    decode_s: float
    output_per_s: float
    tokens_per_s: float
    load_max: float  # at which its waits still end within its promise
    cost_per_million: float  # of all its tokens, input and output
    cost_per_million_output: float

    @property
    def busy(self) -> float:
        """GPU seconds a second."""
        return self.per_s * (self.prefill_s + self.decode_s)


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Replicas that each constraint alone asks for."""

    compute: float
    kv: float
    pace: float

    @property
    def binding(self) -> str:
        """The largest, in words."""
        named = {"compute": self.compute, "KV memory": self.kv, "decode pace": self.pace}
        return max(named, key=lambda name: named[name])

    @property
    def most(self) -> float:
        """What the fleet needs."""
        return max(self.compute, self.kv, self.pace)


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of the closed form."""

    profile: str
    source: str
    replicas: int  # with the spare ones
    spare: int
    bounds: Bounds
    classes: dict[ClassName, Demand]
    batch: int  # sequences that a replica decodes at once within the pace
    kv_tokens: int  # of one replica
    price_per_hour: float
    if_hit_10_more: float  # replicas of the binding constraint if a tenth more of the input were held
    if_load_10_more: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A workload as the planner sees it."""

    rows: Sequence[Row]
    ideal: Sequence[int]
    starts: Sequence[float]
    span_s: float
    curve: Sequence[tuple[float, float]]  # of an LRU cache: tokens, share of the ideal hit
    shared: Sequence[int]  # tokens of each row that its session found in others': they lie in memory once


def asked(trace: Trace, kv_tokens: int) -> Asked:
    """Measure a trace: what an endless cache holds of each row, and what share of that a fleet's memory keeps."""
    sizes = [kv_tokens * count for count in (1, 2, 4, 8, 16, 32, 64)]
    found = workload(trace, sizes)
    starts = nominal_starts_s(trace.rows)
    noted = trace.header.notes.get("duration_s")
    span_s = float(noted) if isinstance(noted, (int, float)) else max(starts) - min(starts)
    ideal = cached_of(trace, ENDLESS_S) if found.reuse else [0] * len(trace.rows)
    curve = []
    if found.reuse is not None and found.reuse.curve[-1].hit > 0:
        curve = [(float(one.tokens), one.hit / found.reuse.curve[-1].hit) for one in found.reuse.curve]
    return Asked(trace.rows, ideal, starts, max(span_s, 1e-9), curve, _shared(trace.rows, ideal))


def _shared(rows: Sequence[Row], ideal: Sequence[int]) -> list[int]:
    """What the first turn of a session could hit was left by others. A row without a session counts as all its own:
    what it could hit may be an earlier turn of the same talk."""
    first: dict[str, int] = {}
    for row, hit in zip(rows, ideal, strict=True):
        if row.session_id:
            first.setdefault(row.session_id, hit)
    return [first.get(row.session_id, 0) for row in rows]


def plan(work: Asked, profile: Profile, budgets: Budgets, spare: int, price_per_hour: float) -> Planned:
    """The smallest fleet that suffices at the hit rate that its own memory makes. Raises ValueError where none does."""
    kv_tokens = profile.blocks_total * profile.block_tokens
    for count in range(1, REPLICAS_MAX + 1):
        share = kept_share(work, count * kv_tokens)
        fleet = _Fleet(work, profile, budgets, count, share)
        bounds = fleet.bounds()
        if bounds.most <= count:
            break
    else:
        raise ValueError(f"over {REPLICAS_MAX} replicas would be needed: {bounds.binding} asks for {bounds.most:.0f}")
    return Planned(
        profile=profile.name,
        source=profile.source,
        replicas=count + spare,
        spare=spare,
        bounds=bounds,
        classes=_costed(fleet.demands(), count + spare, price_per_hour),
        batch=fleet.batch(),
        kv_tokens=kv_tokens,
        price_per_hour=price_per_hour,
        if_hit_10_more=replace(fleet, share=min(1.0, share * 1.1)).bounds().most,
        if_load_10_more=bounds.most * 1.1,
    )


def kept_share(work: Asked, tokens: float) -> float:
    """How much of what an endless cache would hold a cache of so many tokens does, by the trace's own LRU curve."""
    if not work.curve:
        return 0.0
    sizes, shares = zip(*work.curve, strict=True)
    return float(np.interp(math.log(max(tokens, 1.0)), np.log(sizes), shares))


@dataclass(frozen=True, slots=True)
class _Fleet:
    """So many replicas, whose memory keeps this share of what an endless cache would hold."""

    work: Asked
    profile: Profile
    budgets: Budgets
    count: int
    share: float

    def bounds(self) -> Bounds:
        """What each constraint asks for."""
        demands, batch = self.demands(), self.batch()
        step_s = self.token_s() * batch
        streams = sum(demand.output_per_s for demand in demands.values()) * step_s
        return Bounds(
            compute=sum(demand.busy / demand.load_max for demand in demands.values()),
            kv=_resident_tokens(self.work, step_s) / (KV_SHARE * self.profile.blocks_total * self.profile.block_tokens),
            pace=streams / batch,
        )

    def context(self) -> float:
        """Tokens that a decoding sequence reads, in the mean."""
        return float(np.mean([row.input_length + row.output_length / 2 for row in self.work.rows]))

    def own(self) -> float:
        """Those of them that lie in memory for it alone."""
        return max(1.0, self.context() - float(np.mean(self.work.shared)))

    def batch(self) -> int:
        """The largest decode set that keeps the tightest pace and fits the memory."""
        profile, context = self.profile, self.context()
        paces = [line.tpot_s for line in self.budgets.values() if line.tpot_s is not None]
        fitting = int(KV_SHARE * profile.blocks_total * profile.block_tokens / self.own())
        limit_s = TPOT_SHARE * min(paces, default=math.inf)
        counts = range(1, max(1, min(profile.sequences_max, fitting)) + 1)
        return max((n for n in counts if profile.model.decode_s(n, round(n * context)) <= limit_s), default=1)

    def token_s(self) -> float:
        """GPU seconds of one decoded token in a full batch."""
        batch = self.batch()
        return self.profile.model.decode_s(batch, round(batch * self.context())) / batch

    def demands(self) -> dict[ClassName, Demand]:
        """By class."""
        token_s, rows = self.token_s(), self.work.rows
        chosen = {name: [i for i, row in enumerate(rows) if row.request_class == name] for name in CLASSES}
        return {name: self.demand(name, found, token_s) for name, found in chosen.items() if found}

    def demand(self, name: ClassName, chosen: Sequence[int], token_s: float) -> Demand:
        """One class's, from its rows."""
        rows, ideal = [self.work.rows[index] for index in chosen], [self.work.ideal[index] for index in chosen]
        held = [round(hit * self.share) for hit in ideal]
        prefill = np.array(
            [prefill_s(self.profile.model, row.input_length - hit, hit) for row, hit in zip(rows, held, strict=True)]
        )
        new = [max(1, row.input_length - hit) for row, hit in zip(rows, ideal, strict=True)]
        inputs, outputs = sum(row.input_length for row in rows), sum(row.output_length for row in rows)
        slack_s = _slack_s(self.budgets.get(name, BudgetLine()), new, prefill)
        return Demand(
            per_s=len(rows) / self.work.span_s,
            hit=sum(held) / inputs,
            prefill_s=float(prefill.mean()),
            decode_s=outputs / len(rows) * token_s,
            output_per_s=outputs / self.work.span_s,
            tokens_per_s=(inputs + outputs) / self.work.span_s,
            load_max=_load_max(prefill, slack_s, _burst(self.work, chosen), LATE_SHARE[name], self.count),
            cost_per_million=0.0,
            cost_per_million_output=0.0,
        )


def prefill_s(model: StepModel, tokens: int, cached: int) -> float:
    """GPU seconds of a prompt in chunks that share their steps with decoding: the floor is decoding's account."""
    full, rest = divmod(max(1, tokens), CHUNK_TOKENS)
    chunks = [CHUNK_TOKENS] * full + ([rest] if rest else [])
    spent, behind = 0.0, cached
    for chunk in chunks:
        step = StepFeatures(rows=chunk, chunk_context=round(chunk * (behind + chunk / 2)), sequences=1)
        spent += max(0.0, model.step_s(step) - model.bias * (model.floor_s + model.base_s))
        spent += model.bias * min(model.floor_s, model.row_s * chunk)
        behind += chunk
    return spent


def _slack_s(line: BudgetLine, new: Sequence[int], prefill: np.typing.NDArray[np.float64]) -> float:
    """What the promise leaves for waiting, in the mean: its first token, or else its end."""
    base, slope = line.ttft_s, line.ttft_s_per_new_token
    if base is None:
        base, slope = line.deadline_s, line.deadline_s_per_new_token
    if base is None:
        return math.inf
    return max(1e-3, base + (slope or 0.0) * float(np.mean(new)) - float(prefill.mean()))


def _burst(work: Asked, chosen: Sequence[int]) -> float:
    """The squared coefficient of variation of arrivals, bounded by what a queue of one class can feel."""
    gaps = np.diff(sorted(work.starts[index] for index in chosen))
    return float(min(100.0, (gaps.std() / gaps.mean()) ** 2)) if len(gaps) > 1 and gaps.mean() > 0 else 1.0


def _load_max(service: np.typing.NDArray[np.float64], slack_s: float, burst: float, late: float, count: int) -> float:
    """The highest load at which P(wait > slack) <= late: Allen and Cunneen's wait, its tail exponential.

    Only prefill waits for prefill: decoding is batched, and its load is in the total."""
    mean_s = max(float(service.mean()), 1e-9)
    spread = (float(service.std()) / mean_s) ** 2
    low, high = 0.0, LOAD_MAX
    for _ in range(40):
        load = (low + high) / 2
        waits = load ** (math.sqrt(2 * (count + 1)) - 1)
        mean_wait_s = (burst + spread) / 2 * mean_s / (count * (1 - load))
        is_kept = waits * math.exp(-slack_s / max(mean_wait_s, 1e-12)) <= late
        low, high = (load, high) if is_kept else (low, load)
    return max(low, 0.01)


def _resident_tokens(work: Asked, step_s: float) -> float:
    """Little's law over the trace: each prompt stays while it is answered, and until its session's next turn."""
    ends: dict[str, tuple[int, float]] = {}
    total = 0.0
    for row, start, shared in zip(work.rows, work.starts, work.shared, strict=True):
        last = ends.get(row.session_id)
        if last is not None and start - last[1] <= RETAIN_S:
            total += last[0] * (start - last[1])
        size, lasts_s = row.input_length + row.output_length - shared, row.output_length * step_s
        total += size * lasts_s
        if row.session_id:
            ends[row.session_id] = size, start + lasts_s
    return total / work.span_s


def _costed(demands: Mapping[ClassName, Demand], replicas: int, price_per_hour: float) -> dict[ClassName, Demand]:
    """The fleet's price by GPU seconds: idle ones are paid by those whose promise keeps them idle."""
    weights = {name: one.busy / one.load_max for name, one in demands.items()}
    per_s = replicas * price_per_hour / 3600 / max(sum(weights.values()), 1e-12)
    return {
        name: msgspec.structs.replace(
            one,
            cost_per_million=per_s * weights[name] / one.tokens_per_s * 1e6,
            cost_per_million_output=per_s * weights[name] / one.output_per_s * 1e6,
        )
        for name, one in demands.items()
    }
