"""One request as the door made it, and what every relay works with.

Owns the shapes between routes, relay and answer. Holds no behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Struct

from policies.request import Request
from router.delivery.flusher import Flusher
from router.delivery.kept import KeptAnswers
from router.delivery.ports import FleetPort, MindPort, Observer
from router.language.text import Identity, Text
from router.language.turn import Encoder, ErrorShape, Turn


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """When bytes are sent."""

    commit_after_s: float = 10.0  # a stream that waits longer commits early, so that no proxy between cuts it
    heartbeat_s: float = 10.0  # and says so again this often
    coalesce_tokens: int = 8  # classes that nobody watches are flushed every so many tokens ...
    coalesce_s: float = 0.25  # ... or at the first token after this


@dataclass(frozen=True, slots=True)
class Services:
    """What every relay works with."""

    mind: MindPort
    fleet: FleetPort
    observer: Observer
    limits: RelayLimits
    clock: Callable[[], float]
    flusher: Flusher = field(default_factory=Flusher)
    kept: KeptAnswers = field(default_factory=KeptAnswers)


class Order(Struct, frozen=True):
    """One request as the door made it: who, what, in which model's tokens, answered in which dialect."""

    request: Request
    turn: Turn
    text: Text
    identity: Identity
    context_max: int
    encoder: Encoder
    errors: ErrorShape
    notices: tuple[str, ...]  # for x-headway-notice
    operation: str  # gen_ai.operation.name
    traceparent: str
