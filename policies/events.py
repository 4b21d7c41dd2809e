"""Everything that can happen to the mind. Frozen facts; `now` comes beside them, never inside."""

from __future__ import annotations

from dataclasses import dataclass

from policies.costs import StepModel
from policies.request import Request, RequestId, WorkerId


@dataclass(frozen=True, slots=True)
class Started:
    """Opens every recording: with these the rest of it replays byte for byte."""

    config_digest: str
    code_version: str
    seed: int
    policy: str  # the policy snapshot, as PolicySpec JSON
    clock_zero_s: float = 0.0  # Unix time at which `now` was 0, for policies by the hour; only a live router has one


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """The operator changed classes or policy: from here on this policy decides. What was promised stays promised."""

    config_digest: str
    policy: str  # as PolicySpec JSON
    clock_zero_s: float = 0.0  # as in Started: the new policy has not seen that


@dataclass(frozen=True, slots=True)
class Offered:
    """A client sent a request. Nothing costly was done yet: it is not tokenised."""

    request: Request


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request that was told to tokenise has its tokens. `chain`: 16 bytes a full block, see engine/kv/keys.py."""

    request_id: RequestId
    tokens: int
    chain: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """The client left, or the router ended the request. Legal in every state, also after the end."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Stopped:
    """The router ended an answer that is whole: a stop string came. What the worker would have added is not wanted."""

    request_id: RequestId
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt on a worker failed before the commit point, or the router can resume it: place it again."""

    request_id: RequestId
    worker: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker said hello. `cached`: chain keys that it already holds (16 bytes each), after a reconnect."""

    worker: WorkerId
    model: str
    block_tokens: int
    blocks_total: int
    context_max: int
    step_model: StepModel
    cached: bytes = b""
    requests_max: int = 0  # that it may hold at one time; 0: as many as its KV holds


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """The common part of a frame: what a worker holds right now, other routers' work included."""

    running: int
    waiting: int
    waiting_uncached_tokens: int
    blocks_free: int
    blocks_cached: int  # no sequence holds them, evictable at once
    decode_context: int
    step_s: float  # the last step's duration


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One engine frame, boiled down: what started, what ended, what the worker holds. No per-token event exists."""

    worker: WorkerId
    load: WorkerLoad
    first_tokens: tuple[tuple[RequestId, int], ...] = ()  # (request, cached tokens)
    finished: tuple[tuple[RequestId, int], ...] = ()  # (request, output tokens)
    stored: bytes = b""  # chain keys, 16 bytes each
    evicted: bytes = b""
    step_model: StepModel | None = None  # only when its version changed


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's link ended or it stalled. Its requests come as Failed or Gone, each by the router's judgement."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class PolicyFault:
    """The router's guard saw a policy raise, answer nonsense or take too long at `stage`."""

    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that a WakeAt asked for has come."""


Event = (
    Started
    | Reconfigured
    | Offered
    | Arrived
    | Gone
    | Stopped
    | Failed
    | WorkerUp
    | WorkerReport
    | WorkerLost
    | PolicyFault
    | Tick
)
