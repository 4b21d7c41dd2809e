"""Wire messages with plain defaults, for tests of the router's side of a link.

Owns no behaviour; a whole fake worker lives in engine/fake.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from engine.wire import (
    PROTOCOL_VERSION,
    End,
    FrameReader,
    FromRouter,
    Hello,
    Load,
    Sampling,
    Scored,
    Start,
    StepFrame,
    StepModelParts,
    Submit,
    decode_from_router,
)
from policies.api import PolicySpec

MODEL = StepModelParts(
    floor_s=0.005,
    row_s=0.001,
    base_s=0.001,
    decode_context_s=0.0,
    chunk_context_s=0.0,
    sequence_s=0.0001,
    bias=1.0,
    q90=1.25,
    version=1,
)
HELLO = Hello(
    protocol=PROTOCOL_VERSION,
    worker="w0",
    epoch=1,
    model="tiny",
    model_digest="d",
    device="fake",
    block_tokens=16,
    blocks_total=64,
    context_max=1024,
    vocab_size=256,
    root=b"r" * 16,
    policy_digest=PolicySpec().digest,
    step_model=MODEL,
    cached=b"",
    nonce=b"",
)
LOAD = Load(
    running=0,
    waiting=0,
    waiting_uncached_tokens=0,
    blocks_free=64,
    blocks_cached=0,
    decode_context=0,
    step_s=0.01,
    steps=1,
    oldest_running_s=0.0,
)


def hello(**changes: object) -> Hello:
    return msgspec.structs.replace(HELLO, **changes)


def load(**changes: object) -> Load:
    return msgspec.structs.replace(LOAD, **changes)


def step(
    tokens: dict[int, list[int]] | None = None,
    starts: list[Start] | None = None,
    ends: list[End] | None = None,
    **changes: object,
) -> StepFrame:
    """A frame that brings `tokens` by handle."""
    tokens = tokens or {}
    frame = StepFrame(
        handles=list(tokens),
        counts=[len(ids) for ids in tokens.values()],
        ids=np.array([token for ids in tokens.values() for token in ids], dtype="<i4").tobytes(),
        starts=starts or [],
        ends=ends or [],
        load=LOAD,
        stored=b"",
        evicted=b"",
        step_model=None,
    )
    return msgspec.structs.replace(frame, **changes)


def submit(**changes: object) -> Submit:
    """An order as the relay hands it to the fleet: the link sets the handle."""
    order = Submit(
        handle=0,
        ids=np.arange(4, dtype="<i4").tobytes(),
        prompt_len=4,
        salt=b"",
        public_blocks=0,
        request_class=0,
        first_left_s=1.0,
        tpot_s=0.04,
        deadline_left_s=float("inf"),
        session="",
        sampling=Sampling(),
    )
    return msgspec.structs.replace(order, **changes)


class Pipe(asyncio.Transport):
    """A transport that keeps what was written, until told that its peer reads nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[FromRouter] = []
        self.stuck_bytes: int | None = None
        self._reader = FrameReader()
        self._is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.stuck_bytes is not None:
            self.stuck_bytes += len(data)
            return
        self.sent += [decode_from_router(frame) for frame in self._reader.feed(bytes(data))]

    def get_write_buffer_size(self) -> int:
        return self.stuck_bytes or 0

    def is_closing(self) -> bool:
        return self._is_closed

    def abort(self) -> None:
        self._is_closed = True


class Heard:
    """A Sink that keeps what it heard."""

    def __init__(self, on_tokens: Callable[[], None] | None = None) -> None:
        self.events: list[object] = []
        self._on_tokens = on_tokens

    def started(self, start: Start) -> None:
        self.events.append(start)

    def tokens(self, ids: Sequence[int]) -> None:
        self.events.append(list(ids))
        if self._on_tokens is not None:
            self._on_tokens()

    def scored(self, scores: Sequence[Scored]) -> None:
        self.events.append(list(scores))

    def ended(self, end: End) -> None:
        self.events.append(end)

    def lost(self, reason: str) -> None:
        self.events.append(reason)
