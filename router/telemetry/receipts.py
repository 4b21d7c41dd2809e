"""Receipts: one frozen line a request that ended, with what was promised, predicted and delivered.

Owns the shape, the ring of the last ones and the optional file. Never holds prompt text."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """How one request ended. Durations are seconds from its arrival; None where it never came so far."""

    request: str
    operation: str  # gen_ai.operation.name: chat | text_completion
    tenant: str
    model: str
    request_class: str
    class_reason: str
    outcome: str  # finished | refused | failed | cancelled: each request ends exactly once
    status: int  # HTTP; 200 for a stream that failed later
    reason: str  # finish reason, refusal or error code
    worker: str = ""  # the last one; empty when it was never placed
    place_reason: str = ""
    attempts: int = 0
    arrived_unix_s: float  # wall clock, for people
    queue_s: float | None = None  # until it was first sent to a worker
    prefill_s: float | None = None  # by the worker's own clock
    ttft_s: float | None = None
    duration_s: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    lost_tokens: int | None = None  # of the conversation's last turn, behind the first that differs now
    gpu_s: float = 0.0  # GPU-seconds of its own, by the worker's step model, as fairness counts them
    budget_ttft_s: float | None = None
    budget_tpot_s: float | None = None
    budget_deadline_s: float | None = None
    budget_saved_s: float = 0.0  # of first token and deadline: what the task's earlier turns did not need
    reservation: str = ""  # made by this refusal | kept: this one had been refused, and came back when it was told to
    predicted_ttft_s: float | None = None
    predicted_cached_tokens: int = 0
    weaker: str = ""  # what a foreign engine cannot promise; empty: our own worker
    traceparent: str = ""  # W3C, as the client sent it

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds an output token behind the first."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.duration_s - self.ttft_s) / (self.output_tokens - 1)


class Receipts:
    """The last `kept` receipts, newest last, and every one in a file of JSON lines if a path is given."""

    def __init__(self, kept: int, path: Path | None = None) -> None:
        self._ring: deque[Receipt] = deque(maxlen=kept)
        self._encoder = msgspec.json.Encoder()
        self._path = path
        self._file: FileIO | None = path.open("ab", buffering=0) if path is not None else None

    def ended(self, receipt: Receipt) -> None:
        """Keep one. A full disk ends the file, never the router."""
        self._ring.append(receipt)
        if self._file is None:
            return
        try:
            self._file.write(self._encoder.encode(receipt) + b"\n")
        except OSError as error:
            log.error("the receipts in %s end here: %s", self._path, error)
            self.close()

    def last(self, count: int) -> Sequence[Receipt]:
        """The newest `count`, newest first."""
        newest_first = list(reversed(self._ring))
        return newest_first[:count]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
