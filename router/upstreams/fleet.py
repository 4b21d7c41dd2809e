"""The upstreams as the mind's workers: which are well, what they serve, how busy they are, and calls to them.

Owns their health and names. Never places a request and never reads a prompt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import msgspec
from msgspec import Struct

from engine.kv.keys import ChainKey
from policies.costs import StepModel
from policies.events import WorkerLoad, WorkerLost, WorkerReport, WorkerUp
from policies.request import RequestId, WorkerId
from router.settings.config import FORWARDED_ROUTES, Upstream
from router.upstreams.http1 import Call, Listener, Origin, Pool
from router.upstreams.kv_events import KvEvents, follow
from router.upstreams.loads import Load, read_load
from router.upstreams.peek import BLOCK_CHARS, CHARS_A_TOKEN, ROOT
from router.upstreams.residence import Forgotten, Residence
from router.upstreams.transport import Transport
from router.workers.fleet import ModelView, Watcher

log = logging.getLogger(__name__)

CHECK_S = 1.0  # health and load of each upstream are asked so often ...
CHECK_TIMEOUT_S = 3.0
FAILURES_MAX = 3  # ... and so many bad answers in a row make it ill; a failed dial of a request counts as one
MODELS_MAX = 32  # of one upstream
USUAL_ROUTES = frozenset(("/v1/chat/completions", "/v1/completions"))
BLOCK_TOKENS = BLOCK_CHARS // CHARS_A_TOKEN
BLOCKS = 1 << 24  # nobody tells how much KV there is: room is judged by requests
CONTEXT_MAX = 1 << 30  # our estimate of a prompt must refuse nobody; the upstream counts its own tokens
# Nobody measured this one (version 0), so the mind places by LMetric, which has no unit: (uncached tokens) x (batch).
PRIOR = StepModel(0.010, 2e-5, 0.001, 5e-9, 5e-10, 2e-5)


class _Described(Struct):
    """An OpenAPI document, as vLLM and SGLang have one."""

    paths: dict[str, msgspec.Raw]


class _ListedModel(Struct):
    id: str
    max_model_len: int | None = None


class _Listed(Struct):
    data: list[_ListedModel] = []


@dataclass(slots=True)
class Served:
    """One model of one upstream: a worker to the mind."""

    id: WorkerId
    model: str  # as clients call it
    model_there: str
    context_max: int
    live: int = 0  # calls of ours
    is_up: bool = False  # the mind was told


@dataclass(slots=True)
class UpstreamState:
    """One upstream."""

    config: Upstream
    origin: Origin
    key: str
    served: dict[str, Served] = field(default_factory=dict)
    routes: frozenset[str] = USUAL_ROUTES
    kv: KvEvents | None = None  # what it holds, where it publishes KV events
    load: Load | None = None  # None: it does not say
    is_well: bool = False
    failures: int = 0
    losses: int = 0
    lost_reason: str = "not asked yet"
    heard_at: float = 0.0

    @property
    def name(self) -> str:
        return self.config.shown_name

    @property
    def prefix(self) -> str:
        """What stands before /v1; people copy base URLs with it."""
        return urlsplit(self.config.url).path.rstrip("/").removesuffix("/v1")

    @property
    def live(self) -> int:
        return sum(served.live for served in self.served.values())


class Upstreams:
    """The foreign engines of this router. `run` watches them until it is cancelled."""

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        env: Mapping[str, str],
        watcher: Watcher,
        pool: Pool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool or Pool()
        self.states = [
            UpstreamState(
                config,
                Origin.of(config.url),
                env.get(config.key_env, "") if config.key_env else "",
                kv=KvEvents(Residence(BLOCK_TOKENS)) if config.kv_events else None,
            )
            for config in upstreams
        ]
        self._watcher = watcher
        self._clock = clock
        self._workers: list[tuple[UpstreamState, Served]] = []  # by WorkerId
        self._models: dict[str, ModelView] = {}

    # For relays -------------------------------------------------------------------------------------------------------

    def call(self, worker: WorkerId, path: str, request: bytes, accept: bytes, listener: Listener) -> Call:
        """POST a body to a worker's upstream. The request is made anew: nothing of the client's headers travels."""
        state, served = self._workers[worker]
        served.live += 1
        head = [
            b"POST %b%b HTTP/1.1" % (state.prefix.encode(), path.encode()),
            b"host: %b" % state.origin.authority.encode(),
            b"content-type: application/json",
            b"accept: %b" % accept,
            b"content-length: %d" % len(request),
        ]
        if state.key:
            head.append(b"authorization: Bearer %b" % state.key.encode())
        return Call(self.pool, state.origin, b"\r\n".join([*head, b"", request]), listener)

    def sent(self, worker: WorkerId, chain: bytes) -> None:
        """A prompt of these keys went there."""
        state, _ = self._workers[worker]
        if state.kv is not None:
            state.kv.residence.sent(worker, chain)

    def ended(self, worker: WorkerId, request_id: RequestId, output_tokens: int | None, fault: str = "") -> bool:
        """A call is over. The mind learns an answer's length; a fault of the connection counts against the upstream.
        Whether the mind heard of the end: it does not of an upstream that was lost meanwhile."""
        state, served = self._workers[worker]
        served.live -= 1
        if output_tokens is not None:
            state.failures = 0
            self._report(state, served, finished=((request_id, output_tokens),))
        elif fault:
            self._failed(state, fault)
        return output_tokens is not None and served.is_up

    def first_token(self, worker: WorkerId, request_id: RequestId) -> None:
        """The first piece of an answer came."""
        self._report(*self._workers[worker], first_tokens=((request_id, 0),))

    def there(self, worker: WorkerId) -> tuple[Upstream, str]:
        """A worker's configuration and the model's name there."""
        state, served = self._workers[worker]
        return state.config, served.model_there

    def has_route(self, model: str, path: str) -> bool:
        """Whether all upstreams of a model have a route: the mind places by model alone."""
        states = [state for state in self.states if model in state.served]
        return bool(states) and all(path in state.routes for state in states)

    def name(self, worker: WorkerId) -> str:
        """For people."""
        return self._workers[worker][0].name

    def models(self) -> Mapping[str, ModelView]:
        """What can be asked for; an upstream that is away keeps its models, since it will be back."""
        return self._models

    # For readiness and the admin listener -----------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Whether one of them is well and has a model: a server that still loads its first one lists none."""
        return any(state.is_well and state.served for state in self.states)

    @property
    def up_count(self) -> int:
        return sum(state.is_well for state in self.states)

    def shown(self) -> list[dict[str, object]]:
        """Each upstream, for the operator."""
        return [
            {
                "worker": state.name,
                "url": state.config.url,
                "is_up": state.is_well,
                "losses": state.losses,
                "lost_reason": "" if state.is_well else state.lost_reason,
                "model": ", ".join(state.served),
                "device": "upstream",
                "requests": state.live,
                "load": state.load._asdict() if state.load is not None else {"running": state.live, "waiting": 0},
            }
            for state in self.states
        ]

    # Watching ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ask every upstream how it is, until cancelled."""
        try:
            made = httpx.AsyncClient(transport=Transport(self.pool), timeout=CHECK_TIMEOUT_S)
            async with made as client, asyncio.TaskGroup() as tasks:
                for state in self.states:
                    tasks.create_task(self._watch(state, client))
                    if state.kv is not None:
                        tasks.create_task(follow(state.config.kv_events, state.kv, self._forget))
        finally:
            self.pool.close()

    async def _watch(self, state: UpstreamState, client: httpx.AsyncClient) -> None:
        while True:
            await self.check(state, client)
            await asyncio.sleep(CHECK_S)

    def _forget(self, forgotten: Forgotten) -> None:
        """The mind believes no longer that these are there."""
        for worker, keys in forgotten.items():
            self._report(*self._workers[worker], evicted=keys)

    async def check(self, state: UpstreamState, client: httpx.AsyncClient) -> None:
        """Ask one upstream for its models and load; whoever lists models is well."""
        url = state.config.url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {state.key}"} if state.key else {}
        try:
            answer = await client.get(f"{url}/v1/models", headers=headers)
            if answer.status_code != 200:
                raise httpx.HTTPError(f"GET /v1/models says {answer.status_code}")
            listed = msgspec.json.decode(answer.content, type=_Listed)
        except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
            self._failed(state, str(error) or type(error).__name__)
            return
        if not state.is_well:
            state.routes = await _routes(state.config, client, url, headers)
        with contextlib.suppress(httpx.HTTPError, OSError):  # an engine without metrics is counted by our own calls
            metrics = await client.get(f"{url}/metrics", headers=headers)
            state.load = read_load(metrics.content) if metrics.status_code == 200 else None
        self._well(state, listed.data[:MODELS_MAX])

    def _well(self, state: UpstreamState, listed: Sequence[_ListedModel]) -> None:
        state.failures, state.heard_at = 0, self._clock()
        context = {model.id: model.max_model_len or 0 for model in listed}
        wanted = state.config.models or {name: name for name in context}
        if not state.is_well:
            state.is_well = True
            log.info("upstream %s is up: %s", state.name, ", ".join(wanted) or "no models")
        for name, there in wanted.items():
            served = state.served.get(name)
            if served is None:
                served = Served(WorkerId(len(self._workers)), name, there, context.get(there, 0))
                state.served[name] = served
                self._workers.append((state, served))
            if not served.is_up:
                served.is_up = True
                self._view(served, state)
                most = state.config.concurrency
                self._watcher.worker_up(
                    WorkerUp(served.id, served.model, BLOCK_TOKENS, BLOCKS, CONTEXT_MAX, PRIOR, requests_max=most)
                )
            self._report(state, served)

    def _view(self, served: Served, state: UpstreamState) -> None:
        known = self._models.get(served.model)
        workers = (*known.workers, state.name) if known is not None else (state.name,)
        least = min(filter(None, (served.context_max, known.context_max if known else 0)), default=0)
        self._models[served.model] = ModelView(served.model, "", ChainKey(ROOT), BLOCK_TOKENS, least, 0, workers)

    def _failed(self, state: UpstreamState, reason: str) -> None:
        state.failures += 1
        state.lost_reason = reason[:200]
        if state.is_well and state.failures >= FAILURES_MAX:
            state.is_well = False
            if state.kv is not None:
                state.kv.residence.cleared()  # the mind forgets a lost worker whole
            state.losses += 1
            log.warning("upstream %s is ill: %s", state.name, state.lost_reason)
            for served in state.served.values():
                served.is_up = False
                self._watcher.worker_lost(WorkerLost(served.id, state.lost_reason))

    def _report(
        self,
        state: UpstreamState,
        served: Served,
        first_tokens: tuple[tuple[RequestId, int], ...] = (),
        finished: tuple[tuple[RequestId, int], ...] = (),
        evicted: bytes = b"",
    ) -> None:
        """A frame's worth of news. Where the engine says nothing of its load, our own calls are all there is."""
        load = state.load or Load(state.live, 0, 0.0)
        busy = max(load.running + load.waiting, state.live)
        free = BLOCKS * (1.0 - load.cache_share) if busy < state.config.concurrency else 0.0
        told = WorkerLoad(load.running, load.waiting, 0, math.floor(free), 0, 0, 0.0)
        if served.is_up:
            self._watcher.worker_report(WorkerReport(served.id, told, first_tokens, finished, evicted=evicted))


async def _routes(config: Upstream, client: httpx.AsyncClient, url: str, headers: Mapping[str, str]) -> frozenset[str]:
    """What an upstream has of our routes: as configured, as it describes itself, or what every such server has."""
    if config.routes is not None:
        return frozenset(config.routes)
    try:
        answer = await client.get(f"{url}/openapi.json", headers=headers)
        described = msgspec.json.decode(answer.content, type=_Described)
    except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError):
        return USUAL_ROUTES
    return FORWARDED_ROUTES & described.paths.keys() or USUAL_ROUTES
