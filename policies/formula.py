"""What a request would meet on a worker, in seconds: one formula, for one worker's numbers or for all workers' arrays.

Owns the formula and its few factors. Chooses nobody: policies/placement.py does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from policies.api import FleetView, Floats, Forecast, Job, WorkerView
from policies.ledger import PACE_MIN_S
from policies.request import RequestClass

# Hot: once a placement, for each of a few workers or at once for all of many. Operators alone, in one order: so numbers
# and arrays give the same to the last bit.

Z90 = 1.2816
PASSING_MAX = 4  # workers that are looked at again, cheapest first, where a prompt would be late behind all others
MIN_SHARE = 0.15  # of each step is left for prefill however many decode: the step planner sees to it

N = TypeVar("N", float, Floats)
N_co = TypeVar("N_co", float, Floats, covariant=True)


@dataclass(frozen=True, slots=True)
class Weights:
    """The factors of the cost, all start values."""

    spread: tuple[float, float, float] = (0.15, 0.02, 0.0)  # price of a second of TTFT: 0 packs onto cache holders
    sure: tuple[float, float, float] = (1.0, 0.41, 0.0)  # in units of log q90: P >= 0.9, 0.7, 0.5 of being in time
    pace_margin: float = 0.9  # of the tightest TPOT
    reuse: float = 0.5  # probability that a displaced block would have been asked for again
    near: float = 0.05  # costs within 5 % are equal: the session's own hash chooses, alike in every router


class ByClass(Protocol[N_co]):
    def __getitem__(self, number: int, /) -> N_co: ...


class Seen(Protocol[N_co]):
    """What the formula reads: a WorkerView, or a whole FleetView."""

    @property
    def row_s(self) -> N_co: ...
    @property
    def chunk_context_s(self) -> N_co: ...
    @property
    def decode_context_s(self) -> N_co: ...
    @property
    def sequence_s(self) -> N_co: ...
    @property
    def residual(self) -> N_co: ...
    @property
    def free_tokens(self) -> N_co: ...
    @property
    def ahead_s(self) -> ByClass[N_co]: ...
    @property
    def step_s(self) -> ByClass[N_co]: ...
    @property
    def pace_s(self) -> ByClass[N_co]: ...


class Met(NamedTuple, Generic[N]):
    """One job before one worker, or before all of them."""

    hit: N  # tokens
    uncached: N
    own_s: N
    context_s: N  # what each step pays for attending to this prompt
    step_s: N
    used: N  # of the tightest pace, by a step
    share: N  # of each step, free for prefill
    ttft_s: N


def meet(job: Job, seen: Seen[N], hit: N, larger: Callable[[N, float], N], smaller: Callable[[N, float], N]) -> Met[N]:
    """What `job` would meet where `hit` tokens of its prompt are cached; a worker's silence is not counted."""
    number, tokens = int(job.request_class), float(job.prompt.tokens)
    hit = smaller(hit, tokens - 1.0)
    uncached = tokens - hit
    own_s = uncached * (seen.row_s + seen.chunk_context_s * (tokens - 0.5 * uncached))
    context_s = seen.decode_context_s * tokens
    step_s = seen.step_s[number] + context_s
    used = step_s / smaller(seen.pace_s[number], max(PACE_MIN_S, job.promise.budget.tpot_s))
    share = larger(1.0 - used, MIN_SHARE)
    ttft_s = seen.residual * ((seen.ahead_s[number] + own_s) / share + step_s)
    return Met(hit, uncached, own_s, context_s, step_s, used, share, ttft_s)


def cost_s(job: Job, seen: Seen[N], met: Met[N], weights: Weights, larger: Callable[[N, float], N]) -> N:
    """GPU seconds of prompt and answer, what computing again the displaced cache will cost, and mild spreading."""
    output = job.output.mean
    displaced = larger(met.uncached + (output - seen.free_tokens), 0.0)
    cost = displaced * seen.row_s * weights.reuse + met.own_s + output * (seen.sequence_s + met.context_s)
    if spread := weights.spread[job.request_class]:
        cost = cost + spread * (met.ttft_s + output * met.step_s)
    return cost


def let_pass(job: Job, fleet: FleetView, slot: int, met: Met[float], now: float) -> tuple[float, float]:
    """What is ahead of a chat prompt, and its TTFT, where longer prompts let it go first: their lines are later."""
    view = fleet.view(slot)
    # As if it had just come: what it has waited does not choose who is before it, only whether it is in time.
    ahead_s = fleet.ahead_of(slot, now + job.promise.budget.ttft_s - met.own_s, now)
    after_s = view.ahead_s[RequestClass.CHATBOT] - ahead_s
    return ahead_s, met.ttft_s - view.residual * after_s / met.share


def forecast(
    job: Job,
    view: WorkerView,
    met: Met[float],
    now: float,
    weights: Weights,
    *,
    is_feasible: bool,
    ahead_s: float | None = None,
) -> Forecast:
    """The figures of one worker as a policy tells them."""
    number = job.request_class
    return Forecast(
        worker=view.worker,
        hit_tokens=int(met.hit),
        own_s=met.own_s,
        ahead_s=view.ahead_s[number] if ahead_s is None else ahead_s,
        ttft_s=met.ttft_s,
        tpot_s=met.step_s,
        cost_s=met.own_s + job.output.mean * (view.sequence_s + met.context_s),
        probability=in_time(met.ttft_s, view.q90, job.first_left_s(now)),
        is_feasible=is_feasible,
        is_steady=met.used <= weights.pace_margin,
        is_alone=not view.streams,
        has_room=has_room(job, view),
        staged=view.staged,
    )


def has_room(job: Job, view: WorkerView) -> bool:
    """Whether prompt and answer fit beside the residents' growth."""
    return view.room_tokens[job.request_class] >= job.prompt.tokens + job.output.q80


def in_time(predicted_s: float, q90: float, left_s: float) -> float:
    """P(duration <= left) for a lognormal with this median and this 90th percentile of actual / predicted."""
    if left_s <= 0.0:
        return 0.0
    if math.isinf(left_s):
        return 1.0
    sigma = math.log(max(q90, 1.001)) / Z90
    return 0.5 * math.erfc(-math.log(left_s / max(predicted_s, 1e-9)) / (sigma * math.sqrt(2.0)))
