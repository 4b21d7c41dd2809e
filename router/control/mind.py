"""The live mind: gives every event its time, hands it to the reducer, carries the actions to whom they concern.

Owns who waits for which decision, and the alarm clock. Never decides: a recording of its inputs replays it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from policies.actions import Action, Cancel, Dispatch, Reject, Tokenise, WakeAt
from policies.events import (
    Arrived,
    Event,
    Failed,
    Gone,
    Offered,
    PolicyFault,
    Reconfigured,
    Started,
    Stopped,
    Tick,
    WorkerLost,
    WorkerReport,
    WorkerUp,
)
from policies.request import Request, RequestId, WorkerId
from router.delivery.ports import Client

log = logging.getLogger(__name__)


class Reducer(Protocol):
    """What policies.dispatcher.Dispatcher is to us."""

    def handle(self, event: Event, now: float, /) -> Sequence[Action]: ...


class Recorder(Protocol):
    """Who writes down what went in and what came out."""

    def write(self, now: float, event: Event, actions: Sequence[Action]) -> None: ...


def clock_zero_s() -> float:
    """What a policy by the hour needs beside `now`, which is no time of day."""
    return time.time() - time.monotonic()


class Mind:
    """The reducer in real time. Every call returns when its decision, and all that follow from it, are carried out."""

    def __init__(
        self,
        reducer: Reducer,
        faults: deque[PolicyFault],
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # fails when the reducer raises
        self._reducer = reducer
        self._faults = faults  # what the guard saw during the last event; it becomes the next events
        self._recorder = recorder
        self._clock = clock
        self._clients: dict[RequestId, Client] = {}
        self._inbox: deque[Event] = deque()
        self._is_handling = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        self.client_faults = 0  # exceptions of clients, each ended its own request alone

    @property
    def live_count(self) -> int:
        """Requests that the mind knows: offered, queued or running."""
        return len(self._clients)

    def begin(self, event: Started) -> None:
        """The first event of a life, and of its recording."""
        self._handle(event)

    def reconfigured(self, event: Reconfigured) -> None:
        """Another policy decides from here on."""
        self._handle(event)

    # For the relay ----------------------------------------------------------------------------------------------------

    def offer(self, request: Request, client: Client) -> None:
        """A client sent a request. `client` may hear a decision before this returns."""
        assert request.id not in self._clients, "request ids are ours and unique"
        self._clients[request.id] = client
        self._handle(Offered(request))

    def arrived(self, request_id: RequestId, tokens: int, chain: bytes) -> None:
        """It is tokenised."""
        self._handle(Arrived(request_id, tokens, chain))

    def gone(self, request_id: RequestId) -> None:
        """The client left, or the request ended. Legal in every state; its Client hears nothing more."""
        if self._clients.pop(request_id, None) is not None:
            self._handle(Gone(request_id))

    def stopped(self, request_id: RequestId, output_tokens: int) -> None:
        """Its answer is whole, though the worker would have gone on. Its Client hears nothing more."""
        if self._clients.pop(request_id, None) is not None:
            self._handle(Stopped(request_id, output_tokens))

    def failed(self, request_id: RequestId, worker: WorkerId, reason: str) -> None:
        """An attempt failed before its first byte reached the client: place it again."""
        if request_id in self._clients:
            self._handle(Failed(request_id, worker, reason))

    # For the fleet ----------------------------------------------------------------------------------------------------

    def worker_up(self, event: WorkerUp) -> None:
        self._handle(event)

    def worker_report(self, event: WorkerReport) -> None:
        self._handle(event)

    def worker_lost(self, event: WorkerLost) -> None:
        self._handle(event)

    # The loop ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the alarm clock: nothing is decided any more without an event."""
        if self._alarm is not None:
            self._alarm.cancel()

    def _handle(self, event: Event) -> None:
        """One event at a time, in order: what a Client answers from within an action waits its turn."""
        self._inbox.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._inbox:
                self._decide(self._inbox.popleft())
        except Exception as error:
            # A reducer that raised has half a state: nothing that it says later can be trusted. The keeper restarts us.
            log.critical("the mind failed", exc_info=error)
            if not self.broken.done():
                self.broken.set_exception(error)
            raise
        finally:
            self._is_handling = False

    def _decide(self, event: Event) -> None:
        now = self._clock()
        actions = self._reducer.handle(event, now)
        if self._recorder is not None:
            self._recorder.write(now, event, actions)
        self._inbox.extend(self._faults)
        self._faults.clear()
        if isinstance(event, WorkerReport):
            for request_id, _ in event.finished:
                self._clients.pop(request_id, None)
        for action in actions:
            if isinstance(action, WakeAt):
                self._wake(action.at, now)
            elif client := self._clients.get(action.request_id):
                self._carry_out(action, client)

    def _carry_out(self, action: Tokenise | Dispatch | Reject | Cancel, client: Client) -> None:
        try:
            if isinstance(action, Dispatch):
                client.dispatch(action)
            elif isinstance(action, Tokenise):
                client.tokenise(action)
            elif isinstance(action, Reject):
                del self._clients[action.request_id]
                client.reject(action)
            else:
                client.cancel(action)
        except Exception as error:  # border: one request's fault must not end the mind of all others
            self.client_faults += 1
            log.error("request %s: its relay failed at %s", action.request_id, action.reason, exc_info=error)
            self.gone(action.request_id)
            self._tell_broken(action.request_id, client)

    def _tell_broken(self, request_id: RequestId, client: Client) -> None:
        try:
            client.broke()
        except Exception as error:
            log.error("request %s: its relay cannot even end", request_id, exc_info=error)

    def _wake(self, at: float, now: float) -> None:
        if self._alarm is not None:
            if self._alarm_at <= at:
                return
            self._alarm.cancel()
        self._alarm_at = at
        # uvloop counts whole milliseconds: half of one more, and a Tick never comes before its time.
        self._alarm = asyncio.get_running_loop().call_later(max(0.0, at - now) + 0.0005, self._tick)

    def _tick(self) -> None:
        self._alarm = None
        self._handle(Tick())
