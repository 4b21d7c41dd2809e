"""A request's life: its states, what can happen to it besides events, and when its client runs out of patience.

Owns the record of one live request and the heap of those whose clients may leave. Decides nothing."""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from policies.api import Classified, Job
from policies.ledger import Charge
from policies.request import Request, RequestId


class State(enum.Enum):
    """Where a request is. It is forgotten when it is answered, refused or gone."""

    QUEUED = "queued"  # waits for its turn to tokenise
    TOKENISING = "tokenising"
    HELD = "held"  # waits for a worker
    PLACED = "placed"  # on a worker, no token yet
    STREAMING = "streaming"


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A frame said that the request has its first token."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A frame said that the answer ended by itself."""

    output_tokens: int


@dataclass(frozen=True, slots=True)
class OutOfPatience:
    """The client is about to leave, and nothing was sent to a worker."""


UNPLACED = (State.QUEUED, State.TOKENISING, State.HELD)


@dataclass(slots=True, eq=False)
class Live:
    """A request that is not settled yet."""

    request: Request
    classified: Classified
    state: State
    leaves_at: float
    is_reserved: bool = False  # it came back from a refusal when it was told to
    job: Job | None = None  # from Arrived on
    charge: Charge | None = None  # while on a worker
    booked_s: float = 0.0  # GPU-seconds that fairness counts
    cached_tokens: int = 0


class Patience:
    """Who leaves next, among the live requests that no worker has."""

    def __init__(self, live: Mapping[RequestId, Live]) -> None:
        self._live = live
        self._heap: list[tuple[float, int, Live]] = []
        self._watched = 0

    def watch(self, live: Live) -> None:
        """Remember when its client leaves. Entries of settled requests are swept once they are the majority."""
        self._watched += 1
        heapq.heappush(self._heap, (live.leaves_at, self._watched, live))
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if self._is_waiting(entry[2])]
            heapq.heapify(self._heap)

    def expired(self, now: float) -> Iterator[Live]:
        """Those whose clients are leaving; each is told once."""
        while self._heap and self._heap[0][0] <= now:
            live = heapq.heappop(self._heap)[2]
            if self._is_waiting(live):
                yield live

    def next_at(self) -> float:
        """When the next one leaves; infinity if nobody waits."""
        while self._heap and not self._is_waiting(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def _is_waiting(self, live: Live) -> bool:
        return live.state in UNPLACED and self._live.get(live.request.id) is live
