"""Which workers exist: dials each one, keeps its link, dials again with back-off after a loss.

Owns the links and what the workers said of themselves. Never places a request: the mind names the worker."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from msgspec import Struct

from engine.kv.keys import ChainKey
from engine.wire import PROTOCOL_VERSION, Hello, Submit, Welcome, WireError
from policies.api import PolicySpec
from policies.costs import StepModel
from policies.events import WorkerLost, WorkerReport, WorkerUp
from policies.request import RequestId, WorkerId
from router.delivery.ports import Sink
from router.workers.link import Link, LinkLimits, LinkLost

log = logging.getLogger(__name__)

HEADWAY = PolicySpec()  # the workers' half of it, by name alone
STOPPING = "the router stops"


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """How hard the fleet tries to have its workers."""

    connect_s: float = 1.0
    retry_first_s: float = 0.05  # a restarted worker's socket appears any moment
    retry_max_s: float = 2.0  # one failed connect each 2 s costs nothing, and a worker is seen 2 s after it is back
    check_s: float = 0.25  # a stall of 3 s is seen within 3.25 s
    kill_after_s: float = 5.0  # a stalled worker that comes back within this may live (a suspended laptop, a debugger)
    link: LinkLimits = field(default_factory=LinkLimits)


class Watcher(Protocol):
    """Who is told what happens to workers: the mind."""

    def worker_up(self, event: WorkerUp) -> None: ...
    def worker_report(self, event: WorkerReport) -> None: ...
    def worker_lost(self, event: WorkerLost) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelView:
    """What all workers of one model agree on."""

    name: str
    digest: str
    root: ChainKey
    block_tokens: int
    context_max: int
    vocab_size: int
    workers: tuple[str, ...] = ()  # the living


class Attempt(Struct, frozen=True):
    """One attempt of one request on one link."""

    link: Link
    handle: int

    @property
    def worker(self) -> WorkerId:
        return self.link.worker

    @property
    def weights_version(self) -> int:
        """As the worker said it in its hello: a link ends where they change."""
        return self.link.hello.weights_version if self.link.hello is not None else 0

    def abort(self, reason: str) -> None:
        """Its sink hears nothing more. Idempotent, legal after the end."""
        self.link.abort(self.handle, reason)


@dataclass(slots=True)
class WorkerState:
    """One place where a worker lives or should live; whoever answers there must say this name."""

    id: WorkerId
    name: str
    address: str  # path of its Unix socket
    dialled: Link | None = None  # the connection, hello or not
    link: Link | None = None  # the same once it said hello; None while the worker is lost
    hello: Hello | None = None  # the last one
    step_model: StepModel | None = None  # the last one
    lost_reason: str = "not connected yet"
    losses: int = 0
    stalled_at: float | None = None  # ejected for a stall, and not back yet

    @property
    def asleep(self) -> int:
        """The level at which it sleeps, as it said when it was dialled last; 0: awake, or away."""
        link = self.dialled
        return link.hello.asleep if link is not None and link.hello is not None else 0


def no_keeper(name: str, distrusted: int) -> None:
    """Stands where nobody can restart a worker."""
    log.error("worker %s %s, and no keeper is here to restart it", name, "sends garbage" if distrusted else "stalls")


class Fleet:
    """The workers of this router. `run` keeps them connected until it is cancelled."""

    def __init__(
        self,
        sockets: Sequence[tuple[str, str]],
        watcher: Watcher,
        policy: str,
        *,
        engine: PolicySpec = HEADWAY,
        limits: FleetLimits | None = None,
        restart: Callable[[str, int], None] = no_keeper,  # by name; the epoch whose KV is void, 0: none
        clock: Callable[[], float] = time.monotonic,
    ):
        self._watcher = watcher
        self._limits = limits or FleetLimits()
        self._engine = engine  # the step policy that every worker must run
        self._welcome = Welcome(PROTOCOL_VERSION, "router", policy, b"")
        self._restart = restart
        self._clock = clock
        self._workers = [WorkerState(WorkerId(n), name, path) for n, (name, path) in enumerate(sockets)]
        self._models: Mapping[str, ModelView] = {}  # each request looks here, so it is kept, not made

    # For the relay ----------------------------------------------------------------------------------------------------

    def submit(self, worker: WorkerId, request_id: RequestId, order: Submit, sink: Sink) -> Attempt:
        """Send an attempt; the link sets its handle. Raises LinkLost when the worker is gone: `sink` hears nothing."""
        link = self._workers[worker].link
        if link is None:
            raise LinkLost(f"worker {self.name(worker)} is lost")
        return Attempt(link, link.submit(request_id, order, sink))

    def name(self, worker: WorkerId) -> str:
        """The name that people know a worker by, such as `w0`."""
        return self._workers[worker].name

    def cost_s(self, worker: WorkerId, prompt: int, cached: int, output: int) -> float:
        """GPU-seconds that so many tokens are worth there; of a worker that is lost, those it was worth before."""
        state = self._workers[worker]
        if state.link is not None and state.link.step_model is not None:
            state.step_model = state.link.step_model
        return state.step_model.request_s(prompt, cached, output) if state.step_model is not None else 0.0

    def models(self) -> Mapping[str, ModelView]:
        """The models that workers serve, by name; a lost worker's model stays, since it will be back."""
        return self._models

    # For readiness and the admin listener -----------------------------------------------------------------------------

    @property
    def workers(self) -> Sequence[WorkerState]:
        return self._workers

    @property
    def up_count(self) -> int:
        return sum(state.link is not None for state in self._workers)

    def is_ready(self) -> bool:
        """Whether a worker has proved a step, by its measured speed or since; a listening port proves nothing."""
        return any(state.link is not None and state.link.has_stepped for state in self._workers)

    # Life -------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep every worker connected until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for state in self._workers:
                    tasks.create_task(self._keep_connected(state))
                tasks.create_task(self._watch())
        finally:
            for state in self._workers:
                if state.dialled is not None:
                    state.dialled.eject(STOPPING)

    async def _keep_connected(self, state: WorkerState) -> None:
        retry_s = self._limits.retry_first_s
        while True:
            link = await self._dial(state)
            if link is not None:
                state.dialled = link
                await link.down.wait()
                state.dialled = None
                if link.hello is not None:
                    retry_s = self._limits.retry_first_s
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, self._limits.retry_max_s)

    async def _dial(self, state: WorkerState) -> Link | None:
        loop = asyncio.get_running_loop()

        def connect() -> Link:
            return Link(state.id, self, self._welcome, self._limits.link, self._clock)

        try:
            async with asyncio.timeout(self._limits.connect_s):
                _, link = await loop.create_unix_connection(connect, state.address)
        except (OSError, TimeoutError) as error:
            state.lost_reason = f"cannot connect: {error or 'timed out'}"
            return None
        return link

    async def _watch(self) -> None:
        looked_at = self._clock()
        while True:
            await asyncio.sleep(self._limits.check_s)
            now = self._clock()
            self._look(now, max(0.0, now - looked_at - self._limits.check_s))
            looked_at = now

    def _look(self, now: float, away_s: float) -> None:
        for state in self._workers:
            if state.dialled is not None:
                state.dialled.check(now, away_s)
            if state.stalled_at is None:
                continue
            state.stalled_at = min(now, state.stalled_at + away_s)
            if now - state.stalled_at > self._limits.kill_after_s:
                state.stalled_at = None
                log.warning("worker %s stays stalled; asking the keeper to restart it", state.name)
                self._restart(state.name, 0)

    # What links tell --------------------------------------------------------------------------------------------------

    def link_up(self, link: Link, hello: Hello) -> None:
        """Raises WireError when somebody else answers at this worker's address."""
        state = self._workers[link.worker]
        if hello.worker != state.name:
            raise WireError(f"{state.address} is answered by {hello.worker!r}, not by {state.name!r}")
        if hello.policy_digest != self._engine.digest:
            raise WireError(
                f"{state.name} runs another step policy (digest {hello.policy_digest or 'none'}) than "
                f"{self._engine.ref!r} (digest {self._engine.digest})"
            )
        other = self._models.get(hello.model)
        if other is not None and other.workers and not _is_same(other, hello):
            raise WireError(f"{state.name} serves another {hello.model!r} than {', '.join(other.workers)}")
        state.hello, state.stalled_at = hello, None
        if hello.asleep:  # its link stays, to hear when it wakes; the mind knows of none
            state.lost_reason = f"asleep at level {hello.asleep}, until `python -m engine tell --wake`"
            self._models = _models(self._workers)
            log.info("worker %s is %s", state.name, state.lost_reason)
            return
        state.link = link
        self._models = _models(self._workers)
        assert link.step_model is not None, "a link is up after hello"
        state.step_model = link.step_model
        log.info("worker %s is up: %s on %s, %d KV blocks", state.name, hello.model, hello.device, hello.blocks_total)
        self._watcher.worker_up(
            WorkerUp(
                worker=state.id,
                model=hello.model,
                block_tokens=hello.block_tokens,
                blocks_total=hello.blocks_total,
                context_max=hello.context_max,
                step_model=link.step_model,
                cached=hello.cached,
            )
        )

    def link_report(self, report: WorkerReport) -> None:
        self._watcher.worker_report(report)

    def link_down(self, link: Link, reason: str) -> None:
        state = self._workers[link.worker]
        is_news, state.lost_reason = reason != state.lost_reason, reason
        if state.link is not link:  # it never was up
            if is_news and not state.asleep:  # and is dialled for ever: once is enough
                log.warning("worker %s cannot be taken in: %s", state.name, reason)
            return
        state.link = None
        state.losses += 1
        self._models = _models(self._workers)
        state.stalled_at = self._clock() if link.is_stalled else None
        if reason == STOPPING:
            log.info("worker %s is left to the keeper", state.name)
        else:
            log.warning("worker %s is lost with %d requests: %s", state.name, link.orphan_count, reason)
        self._watcher.worker_lost(WorkerLost(state.id, reason))
        if link.is_garbled and link.hello is not None:
            log.error("worker %s sent garbage; asking the keeper to restart it without its KV", state.name)
            self._restart(state.name, link.hello.epoch)


def _is_same(model: ModelView, hello: Hello) -> bool:
    return (model.root, model.block_tokens) == (hello.root, hello.block_tokens)


def _models(workers: Sequence[WorkerState]) -> dict[str, ModelView]:
    models: dict[str, ModelView] = {}
    for state in sorted(workers, key=lambda state: state.link is None):  # the living say what their model is now
        if state.hello is None:
            continue
        view = models.get(state.hello.model) or _model_view(state.hello)
        if state.link is not None:
            view = replace(view, workers=(*view.workers, state.name))
        models[state.hello.model] = view
    return models


def _model_view(hello: Hello) -> ModelView:
    return ModelView(
        name=hello.model,
        digest=hello.model_digest,
        root=ChainKey(hello.root),
        block_tokens=hello.block_tokens,
        context_max=hello.context_max,
        vocab_size=hello.vocab_size,
    )
