"""One stream socket to one worker: frames in become tokens for sinks and one WorkerReport; submits and aborts go out.

Owns the handles of its attempts and what frames prove about its worker's health. Never decides what follows a loss."""

from __future__ import annotations

import asyncio
import logging
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, cast

import msgspec

from engine.kv.keys import KEY_BYTES
from engine.wire import (
    PROTOCOL_VERSION,
    Abort,
    FrameReader,
    FromWorker,
    Hello,
    Hint,
    HintAck,
    Load,
    Message,
    Scored,
    StepFrame,
    StepModelParts,
    Submit,
    Told,
    Welcome,
    WireError,
    decode_from_worker,
    encode,
)
from policies.costs import StepModel
from policies.events import WorkerLoad, WorkerReport
from policies.request import RequestId, WorkerId
from router.delivery.ports import Sink

log = logging.getLogger(__name__)

SERVED = ("stop", "length")  # ends that the mind learns output lengths from; all others are the relay's to judge


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """What a link bears before it calls its worker ill."""

    hello_s: float = 5.0  # a worker says hello before it does anything else
    stall_s: float = 3.0  # R5: no step for max(3 s, 10 x the predicted one) while work is held
    stall_steps: float = 10.0
    outbox_bytes: int = 32 * 1024 * 1024  # two of the largest frames; a worker reads at once, so more means it does not


class LinkLost(Exception):  # noqa: N818 -- an event of the world, not a fault of ours
    """The worker cannot be written to any more; its sinks are told by `lost` as well."""


class Owner(Protocol):
    """Who is told what a link saw: the fleet."""

    def link_up(self, link: Link, hello: Hello) -> None:
        """The worker said a hello that we accept."""

    def link_report(self, report: WorkerReport) -> None:
        """A frame came; its tokens are not delivered yet."""

    def link_down(self, link: Link, reason: str) -> None:
        """Nothing comes any more. Called once, before the sinks hear `lost`."""


class _Running(msgspec.Struct, frozen=True):
    request_id: RequestId
    sink: Sink


class Link(asyncio.Protocol):
    """The live connection. Unusable before `link_up` and after `link_down`."""

    def __init__(
        self, worker: WorkerId, owner: Owner, welcome: Welcome, limits: LinkLimits, clock: Callable[[], float]
    ):
        self.worker = worker
        self.hello: Hello | None = None
        self.load: Load | None = None
        self.step_model: StepModel | None = None
        self.late_frames = 0  # tokens for handles that nobody knows any more, dropped
        self.sink_faults = 0  # exceptions of sinks, each ended its own attempt alone
        self.down = asyncio.Event()
        self.is_stalled = False
        self.is_garbled = False  # it sent what no correct worker sends, after a good hello
        self.orphan_count = 0  # requests that it held when it went down
        self._owner = owner
        self._welcome = welcome
        self._limits = limits
        self._clock = clock
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._running: dict[int, _Running] = {}
        self._next_handle = 1
        self._hinted: dict[str, Callable[[HintAck], None]] = {}
        self._vocab_size = 0
        self._is_greeted = False
        self._opened_at = clock()
        self._progress_at = self._opened_at
        self._heard_at = self._opened_at

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def has_stepped(self) -> bool:
        """Whether the worker has computed something: its start's calibration counts."""
        is_measured = self.step_model is not None and self.step_model.version > 0
        return is_measured or (self.load is not None and self.load.steps > 0)

    def silent_s(self, now: float) -> float:
        """Seconds since the last frame; an idle worker sends one each half second."""
        return now - self._heard_at

    # The owner's side -------------------------------------------------------------------------------------------------

    def submit(self, request_id: RequestId, order: Submit, sink: Sink) -> int:
        """Send an attempt, return its handle; `order.handle` is ignored. Raises LinkLost: `sink` hears nothing."""
        if self.down.is_set() or self.hello is None:
            raise LinkLost(f"worker {self.worker} has no link")
        if not self._running:
            self._progress_at = self._clock()  # an idle worker makes no steps: the stall clock starts with work
        handle = self._next_handle
        self._next_handle += 1
        self._send(msgspec.structs.replace(order, handle=handle))
        self._running[handle] = _Running(request_id, sink)
        return handle

    def abort(self, handle: int, reason: str) -> None:
        """Forget an attempt at once; the worker frees it within a step. Its late tokens are dropped. Idempotent."""
        if self._running.pop(handle, None) is not None and not self.down.is_set():
            try:
                self._send(Abort(handle, reason))
            except LinkLost:
                log.info("worker %d was lost while an attempt was aborted", self.worker)

    def hint(self, message: Hint, heard: Callable[[HintAck], None]) -> None:
        """Send a hint; `heard` gets one answer an action, until `forget_hint`. Raises LinkLost."""
        if self.down.is_set() or self.hello is None:
            raise LinkLost(f"worker {self.worker} has no link")
        self._send(message)
        self._hinted[message.message_id] = heard

    def forget_hint(self, message_id: str) -> None:
        """Answers to it are dropped from here on. Idempotent."""
        self._hinted.pop(message_id, None)

    def check(self, now: float, away_s: float = 0.0) -> None:
        """Eject a worker that holds work and makes no step, or that never says hello. `away_s`: how long we did not run
        ourselves since the last check. That says nothing of a worker, which may have been paused with us."""
        if self.down.is_set():
            return
        self._opened_at = min(now, self._opened_at + away_s)
        self._progress_at = min(now, self._progress_at + away_s)
        if self.hello is None:
            if now - self._opened_at > self._limits.hello_s:
                self.eject(f"no hello within {self._limits.hello_s:g} s")
        elif self._running and now - self._progress_at > self._stall_after_s():
            self.is_stalled = True
            self.eject(f"stalled: no step for {now - self._progress_at:.1f} s with {len(self._running)} requests held")

    def eject(self, reason: str) -> None:
        """Close for good: the owner hears `link_down`, then every sink hears `lost`."""
        if self.down.is_set():
            return
        self.down.set()
        if self._transport is not None:
            self._transport.abort()
        orphans = list(self._running.values())
        self._running.clear()
        self.orphan_count = len(orphans)
        self._owner.link_down(self, reason)
        for orphan in orphans:
            self._tell_lost(orphan, reason)

    # asyncio's side ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # create_unix_connection and create_connection make these

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                if self.down.is_set():
                    return
                self._take(decode_from_worker(frame))
        except WireError as error:
            self.is_garbled = self._is_greeted
            self.eject(f"bad frame: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.eject(f"connection lost: {error}" if error else "connection closed by the worker")

    # Frames -----------------------------------------------------------------------------------------------------------

    def _take(self, message: FromWorker) -> None:
        if isinstance(message, StepFrame):
            if self.hello is None:
                raise WireError("a step frame before hello")
            self._step(message)
        elif isinstance(message, Told):
            raise WireError("an answer to nothing that was asked")
        elif self.hello is None:
            self._greet(message)
        else:
            raise WireError("a second hello")

    def _greet(self, hello: Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            raise WireError(f"the worker speaks protocol {hello.protocol}, the router {PROTOCOL_VERSION}")
        sizes = (hello.block_tokens, hello.blocks_total, hello.context_max, hello.vocab_size)
        if min(sizes) < 1 or len(hello.cached) % KEY_BYTES:
            raise WireError("a hello with impossible sizes")
        self.step_model = step_model(hello.step_model)
        self.hello = hello
        self._vocab_size = hello.vocab_size
        self._progress_at = self._clock()
        self._send(self._welcome)
        self._owner.link_up(self, hello)
        self._is_greeted = True

    # Hot: once per frame and worker. Budget 15 us for a report without tokens; bench/link.py.
    def _step(self, frame: StepFrame) -> None:
        self._verify(frame)
        if self.hello is not None and frame.weights_version != self.hello.weights_version:
            self.eject("its weights are others: it introduces itself anew")
            return
        load = frame.load
        if self.hello is not None and load.asleep != self.hello.asleep:
            self.eject("it went to sleep" if load.asleep else "it woke: it introduces itself anew")
            return
        self._heard_at = self._clock()
        if self.load is None or load.steps != self.load.steps:
            self._progress_at = self._heard_at
        self.load = load
        model = None
        if frame.step_model is not None:
            model = self.step_model = step_model(frame.step_model)
        self._owner.link_report(self._report(frame, model))
        for ack in frame.acks:
            if heard := self._hinted.get(ack.message_id):
                heard(ack)
        if frame.starts or frame.handles or frame.ends:
            self._deliver(frame)

    def _verify(self, frame: StepFrame) -> None:
        if len(frame.counts) != len(frame.handles) or sum(frame.counts) * 4 != len(frame.ids):
            raise WireError("a step frame whose counts disagree with its tokens")
        if len(frame.stored) % KEY_BYTES or len(frame.evicted) % KEY_BYTES:
            raise WireError("a step frame with a broken chain key")
        if any(count < 0 for count in frame.counts) or not math.isfinite(frame.load.step_s):
            raise WireError("a step frame with an impossible number")
        if frame.ids and max(memoryview(frame.ids).cast("I")) >= self._vocab_size:  # unsigned: a negative id is huge
            raise WireError("a token that the model does not have")
        if any(not 0 <= token < self._vocab_size for score in frame.scored for token in (score.token, *score.top_ids)):
            raise WireError("a score of a token that the model does not have")

    def _report(self, frame: StepFrame, model: StepModel | None) -> WorkerReport:
        running, load = self._running, frame.load
        return WorkerReport(
            worker=self.worker,
            load=WorkerLoad(
                running=load.running,
                waiting=load.waiting,
                waiting_uncached_tokens=load.waiting_uncached_tokens,
                blocks_free=load.blocks_free,
                blocks_cached=load.blocks_cached,
                decode_context=load.decode_context,
                step_s=load.step_s,
            ),
            first_tokens=tuple(
                (running[start.handle].request_id, start.cached_tokens)
                for start in frame.starts
                if start.handle in running
            ),
            finished=tuple(
                (running[end.handle].request_id, end.output_tokens)
                for end in frame.ends
                if end.reason in SERVED and end.handle in running
            ),
            stored=frame.stored,
            evicted=frame.evicted,
            step_model=model,
        )

    def _deliver(self, frame: StepFrame) -> None:
        """Starts, tokens, ends, in this order. Any sink may submit, abort or lose the link while it is called."""
        running = self._running
        for start in frame.starts:
            if attempt := running.get(start.handle):
                try:
                    attempt.sink.started(start)
                except Exception as error:  # noqa: BLE001 -- border, see _fault
                    self._fault(start.handle, attempt, error)
        self._deliver_scores(frame)
        ids, at = array("i", frame.ids).tolist(), 0
        for handle, count in zip(frame.handles, frame.counts, strict=True):
            until = at + count
            if attempt := running.get(handle):
                try:
                    attempt.sink.tokens(ids[at:until])
                except Exception as error:  # noqa: BLE001 -- border, see _fault
                    self._fault(handle, attempt, error)
            else:
                self.late_frames += 1
            at = until
        for end in frame.ends:
            if attempt := running.pop(end.handle, None):
                try:
                    attempt.sink.ended(end)
                except Exception as error:  # noqa: BLE001 -- border, see _fault
                    self._fault(end.handle, attempt, error)

    def _deliver_scores(self, frame: StepFrame) -> None:
        for handle, scores in groupby(sorted(frame.scored, key=_handle), key=_handle):
            if attempt := self._running.get(handle):
                try:
                    attempt.sink.scored(list(scores))
                except Exception as error:  # noqa: BLE001 -- border, see _fault
                    self._fault(handle, attempt, error)

    def _fault(self, handle: int, attempt: _Running, error: Exception) -> None:
        """Border: one relay's fault ends its own request, never its neighbours' streams."""
        self.sink_faults += 1
        log.error("request %s: its relay failed on worker %d", attempt.request_id, self.worker, exc_info=error)
        self.abort(handle, "relay failed")
        self._tell_lost(attempt, "relay failed")

    def _tell_lost(self, attempt: _Running, reason: str) -> None:
        try:
            attempt.sink.lost(reason)
        except Exception as error:
            self.sink_faults += 1
            log.error("request %s: its relay failed at a loss", attempt.request_id, exc_info=error)

    def _stall_after_s(self) -> float:
        """`max(3 s, 10 x predicted step)`, with the last step's duration where it was longer than predicted."""
        assert self.step_model is not None, "checked only after hello"
        load = self.load
        predicted_s = self.step_model.decode_s(len(self._running), load.decode_context if load else 0)
        return max(self._limits.stall_s, self._limits.stall_steps * max(predicted_s, load.step_s if load else 0.0))

    def _send(self, message: Message) -> None:
        assert self._transport is not None, "only a connected link sends"
        if self._transport.is_closing():
            raise LinkLost(f"worker {self.worker} is closing")
        data = encode(message)
        if self._transport.get_write_buffer_size() + len(data) > self._limits.outbox_bytes:
            self.eject(f"does not read: {self._limits.outbox_bytes} bytes wait for it")
            raise LinkLost(f"worker {self.worker} does not read")
        self._transport.write(data)


def _handle(score: Scored) -> int:
    return score.handle


def step_model(parts: StepModelParts) -> StepModel:
    """The model on our side of the wire. Raises WireError on numbers that would poison every later prediction."""
    model = StepModel(*msgspec.structs.astuple(parts))
    if not all(math.isfinite(value) and value >= 0.0 for value in msgspec.structs.astuple(parts)):
        raise WireError(f"a step model that is not finite and positive: {parts}")
    return model
