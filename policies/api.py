"""The policy API: the values that a decision sees and the functions that a policy is made of.

Owns the shapes between dispatcher and policy. Holds no state and no rule; imports nothing outside this package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from policies.chain import Chain
from policies.costs import StepModel
from policies.events import Event
from policies.limits import Limits
from policies.request import Budget, Request, RequestClass, WorkerId
from policies.retention import Band, SpanView
from policies.step_plan import BatchView, StepPlan

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Key = tuple[int, float]  # (tier, value): smaller goes first


# What a request became ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionView:
    """What is remembered of a request's session and of its siblings, before this request counts."""

    request_class: RequestClass | None = None  # None: a session never seen, or none at all
    demotion: RequestClass | None = None  # a less urgent class that recent requests agreed on ...
    agreeing: int = 0  # ... and how many of them
    human_at: float | None = None  # the last real user message
    tool_steps: int = 0  # since then
    human_gap_s: float | None = None  # median time that a person took to answer
    burst: int = 0  # single-turn siblings of this template and tenant within 10 s, this one included
    siblings: int = 0  # such siblings in a row of which none was continued
    human_messages: int = 0  # of this session so far; a repeated request, a side call or a subagent's adds none
    template_lone: int = 0  # sessions of this template and tenant that worked long on their one human message ...
    template_attended: int = 0  # ... and those that got a second one


@dataclass(frozen=True, slots=True)
class Classified:
    """A class and the name of the row that said so. `proposed` is the class before hysteresis."""

    request_class: RequestClass
    reason: str
    proposed: RequestClass


@dataclass(frozen=True, slots=True)
class Prompt:
    """What tokenising told."""

    tokens: int
    new_tokens: int  # beyond the longest prefix that an ideal cache would hold
    chain: Chain


class Output(NamedTuple):
    """How long the answer will be, in tokens."""

    mean: float
    q50: float
    q80: float


@dataclass(frozen=True, slots=True)
class Promise:
    """Budget is what we promise and what orders; patience is when the client leaves. Seconds from arrival."""

    budget: Budget
    patience_s: float
    saved_s: float = 0.0  # of the budget: what the task's earlier turns did not need


@dataclass(frozen=True, slots=True)
class Job:
    """A request that can be placed."""

    request: Request
    request_class: RequestClass
    reason: str
    prompt: Prompt
    output: Output
    promise: Promise
    is_continuing: bool = False  # its session has had an answer already
    attempt: int = 1
    avoid: WorkerId | None = None  # where the last attempt failed
    is_reserved: bool = False  # it was refused, and came back when it was told to: it goes before newcomers

    def first_left_s(self, now: float) -> float:
        """Seconds until the first token is due; negative when late."""
        return self.request.arrived + self.promise.budget.ttft_s - now

    @property
    def wait_max_s(self) -> float:
        """How long it can wait at most and be of use: until its client leaves, or its answer is due."""
        return min(self.promise.patience_s, self.promise.budget.deadline_s)

    def patience_left_s(self, now: float) -> float:
        """Seconds until the client leaves."""
        return self.request.arrived + self.promise.patience_s - now


# What a decision looks at ---------------------------------------------------------------------------------------------


PerClass = tuple[float, float, float]  # for a request of that class: work as urgent or more urgent counts


class WorkerView(NamedTuple):
    """One worker as placement sees it."""

    row_s: float  # cost model, bias included
    chunk_context_s: float
    decode_context_s: float
    sequence_s: float
    q90: float  # 90th percentile of actual / predicted time
    ahead_s: PerClass  # prefill seconds that run first
    step_s: PerClass  # seconds of a decode step with one more sequence
    pace_s: PerClass  # tightest TPOT promised to a resident
    room_tokens: PerClass  # KV tokens that can be had without hurting residents as urgent
    free_tokens: float  # of which no cache has to go
    silent_after: float  # when a busy worker's silence is more than its steps explain; infinity: it is idle
    residual: float  # actual / predicted TTFT, as seen from here
    streams: int  # everything that runs or waits there
    waiting_tokens: int  # uncached prompt tokens queued there
    staged: int  # data-processor requests before their first token
    context_max: int
    worker: WorkerId


class FleetView(Protocol):
    """All workers as arrays over their slots, those of a PerClass [3, slots]; each by itself is `view`. To read only:
    the next decision sees the same. What a slot without a worker says means nothing; see `serves`."""

    worker: npt.NDArray[np.int64]
    row_s: Floats
    chunk_context_s: Floats
    decode_context_s: Floats
    sequence_s: Floats
    q90: Floats
    ahead_s: Floats
    step_s: Floats
    pace_s: Floats
    room_tokens: Floats
    free_tokens: Floats
    residual: Floats
    streams: Floats
    waiting_tokens: Floats
    staged: Floats
    is_calibrated: bool  # every worker has measured its own model
    dispatched: int  # placements so far

    def view(self, slot: int) -> WorkerView:
        """One slot's figures as plain numbers: a few workers are quicker to look at one by one."""

    def serves(self, model: str, tokens: int, avoid: WorkerId | None) -> Bools:
        """Which slots hold a live worker of `model` with room in its context; `avoid` only if there is no other."""

    def silence_s(self, now: float) -> Floats | None:
        """How long each busy worker has been silent beyond what its steps explain; None: nobody is."""

    def ahead_of(self, slot: int, latest_start: float, now: float) -> float:
        """Prefill seconds on `slot` that run before a chat prompt which must start by `latest_start`, as the step
        planner orders them; `ahead_s` counts longer prompts, too, whose lines are later."""

    def hit_tokens(self, chain: Chain, model: str) -> Floats:
        """Prompt tokens that each slot's worker has cached, as far as the router knows."""


class Forecast(NamedTuple):
    """What would happen on one worker. Seconds."""

    worker: WorkerId
    hit_tokens: int
    own_s: float  # GPU seconds of its uncached prompt
    ahead_s: float  # prefill that runs before it
    ttft_s: float
    tpot_s: float
    cost_s: float  # GPU seconds of prompt and answer
    probability: float  # that the first token comes in time
    is_feasible: bool  # in time, residents keep their pace, and KV fits
    is_steady: bool  # residents as urgent or more keep their pace
    is_alone: bool  # the worker has nothing else to do
    has_room: bool  # KV fits
    staged: int = 0


class Flow(Protocol):
    """The queue as admission sees it."""

    @property
    def limits(self) -> Limits: ...

    @property
    def is_next(self) -> bool:
        """Nobody as urgent or more waits before it."""

    def may_pass(self, job: Job, best: Forecast, now: float, /) -> bool:
        """Whether it may go before those who wait: only its own class does, and nobody there has waited for long."""

    def predicted_start_s(self, job: Job, best: Forecast | None, /) -> float:
        """Seconds until a worker would take this request, behind everyone who waits before it."""

    def has_space(self, job: Job, cost_s: float, /) -> bool:
        """Whether the class's waiting room takes so many more GPU-seconds."""


@dataclass(frozen=True, slots=True)
class Admit:
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """`start_s`: when the same request would be admitted; None means never."""

    status: int
    reason: str
    message: str
    start_s: float | None


Verdict = Admit | Hold | Refuse


# What a policy is made of ---------------------------------------------------------------------------------------------


class Classify(Protocol):
    def __call__(self, request: Request, session: SessionView, now: float) -> Classified:
        """Which kind of work this is, and why."""


class MakePromise(Protocol):
    def __call__(
        self, request: Request, request_class: RequestClass, prompt: Prompt, output: Output, profile: StepModel | None
    ) -> Promise:
        """The budget and the patience; `profile` is the fastest worker's model, None before there is one."""


class Place(Protocol):
    def __call__(self, job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        """Candidates, best first; the dispatcher takes the first. Empty: no worker can."""


class Decide(Protocol):
    def __call__(self, job: Job, forecasts: Sequence[Forecast], flow: Flow, now: float) -> Verdict:
        """Now, later or no."""


class Order(Protocol):
    def __call__(self, job: Job, work_s: float, now: float) -> tuple[Key, float]:
        """A key that does not change with time, and until when it holds. Smaller goes first."""


def ignore(event: Event) -> None:
    """Learns nothing."""
    del event


@dataclass(frozen=True, slots=True)
class RouterPolicy:
    """The router's half of the mind: pure functions. Only `learn` may change anything, and only the policy's own."""

    classify: Classify
    promise: MakePromise
    admit: Decide
    order: Order
    place: Place
    learn: Callable[[Event], None] = field(default=ignore)


class Plan(Protocol):
    def __call__(self, batch: BatchView, model: StepModel, now: float) -> StepPlan:
        """What the next step computes. Called once a step: views are arrays."""


class Keep(Protocol):
    def __call__(self, span: SpanView, now: float) -> tuple[Band, float]:
        """The band of a span of blocks and its lease in seconds, asked when its state changes."""


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """The engine's half of the mind: pure functions."""

    plan: Plan
    keep: Keep


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy by name: a built-in, an entry point or `module:attribute`, with its parameters.

    Serialisable, so that it opens recordings and reaches the engine in the welcome; both sides compare digests."""

    ref: str = "headway"
    params: Mapping[str, Any] = field(default_factory=dict)  # JSON values

    def to_json(self) -> str:
        """Canonical JSON: equal specs are equal strings."""
        return json.dumps({"params": dict(self.params), "ref": self.ref}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PolicySpec:
        """The spec that `to_json` wrote."""
        fields = json.loads(text)
        return cls(ref=fields["ref"], params=fields["params"])

    @property
    def digest(self) -> str:
        """16 hex digits that name this spec."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]
