"""Orders about the worker itself: other weights, another policy, sleep. Loads in a thread; changes fall between steps.

Owns what the worker computes by: weights version, root, policy. Never touches a sequence: the scheduler renews them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from engine.kv import keys
from engine.kv.keys import ChainKey
from engine.loading import manifest
from engine.models.config import ModelError
from engine.scheduling import guard
from engine.scheduling.scheduler import Scheduler
from engine.step import DROPS_WEIGHTS, ModelFacts, Renewable, Runner, Sleeper
from engine.wire import Control as Order
from engine.wire import Hello, SetPolicy, Sleep, Told, UpdateWeights, Wake
from policies import plugins
from policies.api import PolicySpec

log = logging.getLogger(__name__)

LOADING_MAX = 1  # each holds a second set of weights in memory


class _Loaded(NamedTuple):
    """Weights that are in memory."""

    digest: str
    put: Callable[[], None]  # between two steps


class _Loading(NamedTuple):
    link: int
    order: UpdateWeights | Wake
    renewal: Future[_Loaded]


class Control:
    """Made with the loop, and asked by it each turn what is `done`."""

    def __init__(self, runner: Runner, facts: ModelFacts, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        self._runner = runner
        self._kv_dtype = facts.kv_dtype
        self._scheduler = scheduler
        self._wake = wake
        self._thread = ThreadPoolExecutor(1, "weights")
        self._loading: list[_Loading] = []
        self._told: list[tuple[int, Told]] = []
        self._identity: tuple[str, ChainKey] | None = None  # digest and root, once they are not those of the start
        self._policy_digest = ""  # once it is not that of the start
        self.weights_version = 0
        self.asleep = 0  # the level; 0: awake

    def introduce(self, hello: Hello) -> Hello:
        """The hello as of now."""
        hello = replace(hello, asleep=self.asleep, policy_digest=self._policy_digest or hello.policy_digest)
        if self._identity is None:
            return hello
        digest, root = self._identity
        return replace(hello, model_digest=digest, root=root, weights_version=self.weights_version)

    def begin(self, link: int, order: Order, now: float) -> None:
        """Carry out, now or when it is loaded."""
        if isinstance(order, SetPolicy):
            error = self._set_policy(order.ref)
        elif isinstance(order, Wake) and not self.asleep:
            error = ""
        elif len(self._loading) >= LOADING_MAX:
            error = "weights are being loaded; ask again when they are"
        elif isinstance(order, Sleep):
            error = self._sleep(order.level, now)
        elif not (load := self._loader(order)):
            error = "this runner cannot change its weights; restart the worker"
        elif self.asleep and isinstance(order, UpdateWeights):
            error = "the worker is asleep; wake it first"
        else:
            renewal = self._thread.submit(load)
            renewal.add_done_callback(lambda _: self._wake())
            self._loading.append(_Loading(link, order, renewal))
            return
        self._told.append((link, Told(order.request, error)))

    def _loader(self, order: UpdateWeights | Wake) -> Callable[[], _Loaded] | None:
        """What loads, in any thread; None where the runner cannot."""
        if isinstance(order, Wake):
            return partial(_woken, self._runner) if isinstance(self._runner, Sleeper) else None
        return partial(_prepared, self._runner, Path(order.folder)) if isinstance(self._runner, Renewable) else None

    def _sleep(self, level: int, now: float) -> str:
        if not isinstance(self._runner, Sleeper):
            return "this runner cannot sleep; stop the worker to free its memory"
        if not 1 <= level <= DROPS_WEIGHTS:
            return f"a worker sleeps at level 1 (its KV goes) or {DROPS_WEIGHTS} (its weights as well)"
        if level > self.asleep:
            self._scheduler.sleep(now)
            self._runner.sleep(level)
            self.asleep = level
            log.info("asleep at level %d", level)
        return ""

    def done(self, now: float) -> list[tuple[int, Told]]:
        """Answers by link, and the changes that they tell of."""
        for loading in [loading for loading in self._loading if loading.renewal.done()]:
            self._loading.remove(loading)
            self._told.append((loading.link, Told(loading.order.request, self._renew(loading, now))))
        told, self._told = self._told, []
        return told

    def _renew(self, loading: _Loading, now: float) -> str:
        try:
            loaded = loading.renewal.result()
        except (ModelError, OSError) as error:  # OSError: the disk went away under it
            return str(error)
        loaded.put()
        if isinstance(loading.order, Wake):
            self._scheduler.wake()
            self.asleep = 0
            log.info("awake again")
        else:
            self._identify(loading.order, loaded.digest, now)
        return ""

    def _identify(self, order: UpdateWeights, digest: str, now: float) -> None:
        root = keys.root(digest, weights_version=order.version, kv_dtype=self._kv_dtype)
        self._scheduler.renew(root, now)
        self._identity, self.weights_version = (digest, root), order.version
        log.info("weights are of version %d now, from %s", order.version, order.folder)

    def _set_policy(self, ref: str) -> str:
        try:
            self._scheduler.obey(guard.load(ref, self._scheduler.plan_limits))
        except plugins.PolicyError as error:
            return str(error)
        self._policy_digest = PolicySpec(ref).digest
        log.info("steps are planned by %s now", ref)
        return ""


def _woken(runner: Sleeper) -> _Loaded:
    return _Loaded("", runner.wake())


def _prepared(runner: Renewable, folder: Path) -> _Loaded:
    put = runner.prepare(folder)  # first: it has a sentence for what is not there
    return _Loaded(manifest.digest_of(folder), put)
