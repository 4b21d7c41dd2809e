"""Everything the mind can ask for. Frozen orders with their reasons; the router carries them out."""

from __future__ import annotations

from dataclasses import dataclass

from policies.request import Budget, RequestClass, RequestId, WorkerId


@dataclass(frozen=True, slots=True)
class Tokenise:
    """Render and tokenise the request, then say Arrived."""

    request_id: RequestId
    request_class: RequestClass
    reason: str


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the request to `worker`. Seconds are what is *left* now, so a request that waited carries less."""

    request_id: RequestId
    worker: WorkerId
    request_class: RequestClass
    budget: Budget  # as promised, relative to arrival
    first_left_s: float  # until the first token is due; negative when late
    deadline_left_s: float
    predicted_ttft_s: float
    predicted_hit_tokens: int
    reason: str
    saved_s: float = 0.0  # of the budget: what the task's earlier turns did not need
    is_reserved: bool = False  # by an earlier refusal of the same session or body


@dataclass(frozen=True, slots=True)
class Reject:
    """Tell the client no, honestly: `retry_after_s` is when the same request would be admitted; None means never."""

    request_id: RequestId
    request_class: RequestClass
    status: int  # 429 the tenant's own limit, 503 ours, 404 no such model
    reason: str
    message: str
    retry_after_s: float | None
    is_reserved: bool = False  # room is kept from then on for some seconds


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the attempt on `worker` and free its blocks."""

    request_id: RequestId
    worker: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send a Tick at `at` (local monotonic seconds) unless an earlier one is already due."""

    at: float


Action = Tokenise | Dispatch | Reject | Cancel | WakeAt
