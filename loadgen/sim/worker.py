"""A simulated worker: the real scheduler and trie, a step model in place of the device.

Owns one worker's orders, its step in flight and the stamps of its tokens. Never knows what time it is: the caller says.
Runs of equal decode steps are computed at once, with the same result to the last digit (tests/loadgen/sim)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.kv import keys
from engine.kv.blocks import BlockTrie
from engine.scheduling.launch import Launch
from engine.scheduling.outcome import Outcome
from engine.scheduling.repeat import step_times
from engine.scheduling.scheduler import Scheduler, SchedulerLimits
from engine.step import ModelFacts, StepResult
from engine.wire import Submit
from loadgen.sim.profiles import Profile
from loadgen.sim.tier import Link, tiers_of
from policies.api import EnginePolicy
from policies.events import WorkerLoad, WorkerReport, WorkerUp
from policies.request import RequestId, WorkerId
from policies.step_plan import PlanLimits

MODEL = "simulated"
LINK = 0
VOCABULARY = 2**31 - 1  # every token id that is not negative
ROOT = keys.root(MODEL)
# A live worker tells after every step. Here one that only decoded tells this often: its news is one token a stream,
# and every frame costs the simulation as much as ten steps do.
TELL_S = 0.1
NOISE_BATCH = 4096
BLOCKED_WAIT_S = 0.02  # a worker that holds sequences and can compute none looks again after so long, as a live one


@dataclass(slots=True, eq=False)
class Attempt:
    """One request on one worker."""

    request_id: RequestId
    token: int  # what it generates, again and again; nobody else's
    stamps: list[float]  # when its tokens came, those of earlier attempts included
    is_wanted: bool = True


@dataclass(slots=True)
class News:
    """What a worker tells after a step."""

    report: WorkerReport
    refused: list[tuple[RequestId, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    launch: Launch
    ends: list[float]  # of every step of the run


class Noise:
    """Factors on step times, one a step, lognormal around one."""

    def __init__(self, sigma: float, seed: int) -> None:
        self._sigma = sigma
        self._rng = np.random.default_rng(seed)
        self._drawn: npt.NDArray[np.float64] = np.empty(0)

    def peek(self, count: int) -> npt.NDArray[np.float64]:
        """The next factors. They stay the next ones until used."""
        while len(self._drawn) < count:
            more = np.exp(self._sigma * self._rng.standard_normal(NOISE_BATCH))
            self._drawn = np.concatenate((self._drawn, more))
        return self._drawn[:count]

    def use(self, count: int) -> None:
        """So many steps were made."""
        self._drawn = self._drawn[count:]


class SimWorker:
    """`turn` begins a step, `settle` ends it; between the two, orders wait. `interrupt` cuts a run short for them."""

    def __init__(
        self, worker: WorkerId, profile: Profile, policy: EnginePolicy | None, seed: int, *, is_fused: bool = True
    ) -> None:
        self.worker = worker
        self.profile = profile
        self.busy_s = 0.0
        self.steps = 0
        self._policy = policy
        self._is_fused = is_fused
        self._noise = Noise(profile.sigma, seed)
        self._model = profile.model
        self._begin()

    def _begin(self) -> None:
        profile = self.profile
        facts = ModelFacts(MODEL, MODEL, "simulated", "none", VOCABULARY, profile.context_max, ())
        self._trie = BlockTrie(profile.blocks_total, profile.block_tokens, ROOT)
        limits = SchedulerLimits(sequences_max=profile.sequences_max, waiting_max=1 << 20)
        plan_limits = PlanLimits(quantum_tokens=profile.block_tokens)
        self._link = Link(profile.host_block_s)
        self._tiers = tiers_of(self._trie, profile.host_blocks, self._link)
        self._scheduler = Scheduler(self._trie, facts, limits, plan_limits, policy=self._policy, tiers=self._tiers)
        self._attempts: dict[int, Attempt] = {}
        self._orders: list[tuple[Submit | int, float]] = []  # an order, or a handle to abort
        self._outcomes: list[Outcome] = []
        self._step: _Step | None = None
        self._told_at = 0.0
        self._has_prefilled = False
        self._step_s = 0.0
        self.stalled_s = 0.0

    def up(self) -> WorkerUp:
        """The hello of a worker with an empty cache."""
        profile = self.profile
        return WorkerUp(
            self.worker, MODEL, profile.block_tokens, profile.blocks_total, self._scheduler.context_max, self._model
        )

    def die(self) -> list[Attempt]:
        """Everything is gone; the attempts that it takes with it."""
        lost = [attempt for attempt in self._attempts.values() if attempt.is_wanted]
        self._begin()
        return lost

    # Orders ----------------------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return self._step is not None

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle and not self._orders

    def blocked_until(self, now: float) -> float:
        """When somebody whom it holds may go on, while it can compute nobody."""
        return min(self._link.next_at, now + BLOCKED_WAIT_S)

    def submit(self, order: Submit, attempt: Attempt, now: float) -> None:
        """Take an attempt; it is read before the next step."""
        self._attempts[order.handle] = attempt
        self._orders.append((order, now))

    def abort(self, handle: int, now: float) -> None:
        """Nobody waits for it any more. Unknown ones are ignored."""
        attempt = self._attempts.get(handle)
        if attempt is not None and attempt.is_wanted:
            attempt.is_wanted = False
            self._orders.append((handle, now))

    # Steps -----------------------------------------------------------------------------------------------------------

    def turn(self, now: float) -> float | None:
        """Obey, and begin the next step: when it, or its run, ends. None: there is nothing to do."""
        for order, read_at in self._orders:
            if isinstance(order, Submit):
                self._outcomes.append(self._scheduler.submit(LINK, order, read_at))
            else:
                self._outcomes.append(self._scheduler.abort(LINK, order, now))
        self._orders.clear()
        self._link.advance(now)
        launch = self._scheduler.launch(self._model, now)
        if launch is None:
            return None
        count = self._scheduler.run_length(launch, self._model) if self._is_fused and not self.stalled_s else 1
        if count == 1:  # the same arithmetic without arrays: two steps in three are single ones
            step_s = self._model.step_s(launch.features) * float(self._noise.peek(1)[0]) + self.stalled_s
            self.stalled_s = 0.0
            self._step = _Step(launch, [now + step_s])
            return now + step_s
        seconds = step_times(launch, self._model, count) * self._noise.peek(count)
        ends = np.cumsum(np.concatenate(([now], seconds)))[1:].tolist()
        until = bisect_left(ends, self._told_at + TELL_S) + 1  # the first step end at which it tells
        self._step = _Step(launch, ends[:until])
        return self._step.ends[-1]

    def interrupt(self, now: float) -> float | None:
        """An order came: the run ends with the step that is under way. When; None if that was so anyway."""
        if self._step is None or len(self._step.ends) == 1:
            return None
        at = bisect_left(self._step.ends, now)
        if at + 1 >= len(self._step.ends):
            return None
        del self._step.ends[at + 1 :]
        return self._step.ends[-1]

    def settle(self) -> News | None:
        """The step, or run, has ended. What it tells, if it does."""
        assert self._step is not None
        launch, ends = self._step.launch, self._step.ends
        self._step = None
        begun, now = launch.now, ends[-1]
        self._noise.use(len(ends))
        self.busy_s += now - begun
        self.steps += len(ends)
        self._step_s = now - (ends[-2] if len(ends) > 1 else begun)
        self._has_prefilled |= bool(launch.plan.chunks)
        sampled = [self._attempts[sequence.handle] for sequence in launch.sampled]
        ids = [attempt.token for attempt in sampled]
        if len(ends) > 1:
            self._scheduler.repeat(launch, ids, ends[:-1])
        bad = np.zeros(len(ids), dtype=np.bool_)
        result = StepResult(np.array(ids, dtype=np.int32), bad, self._step_s)
        self._outcomes.append(self._scheduler.collect(launch, result, self._model, now))
        for attempt in sampled:
            attempt.stamps.extend(ends)
        return self.tell(now)

    def tell(self, now: float) -> News | None:
        """A frame, if there is news or it is time for one."""
        outcomes, self._outcomes = self._outcomes, []
        starts = [start for outcome in outcomes for _, start in outcome.starts]
        ends = [end for outcome in outcomes for _, end in outcome.ends]
        if not (starts or ends or self._has_prefilled or now - self._told_at >= TELL_S):
            return None
        self._told_at, self._has_prefilled = now, False
        first = [(self._attempts[start.handle], start.cached_tokens) for start in starts]
        last = [(self._attempts.pop(end.handle), end) for end in ends]
        stored, evicted = self._tiers.take_events()
        report = WorkerReport(
            worker=self.worker,
            load=self._load(now),
            first_tokens=tuple((attempt.request_id, cached) for attempt, cached in first if attempt.is_wanted),
            finished=tuple(
                (a.request_id, end.output_tokens) for a, end in last if a.is_wanted and end.reason in SERVED
            ),
            stored=stored,
            evicted=evicted,
        )
        return News(
            report, [(a.request_id, end.message) for a, end in last if a.is_wanted and end.reason not in SERVED]
        )

    def _load(self, now: float) -> WorkerLoad:
        load = self._scheduler.load(now, self._step_s, self.steps)
        return WorkerLoad(
            load.running,
            load.waiting,
            load.waiting_uncached_tokens,
            load.blocks_free,
            load.blocks_cached,
            load.decode_context,
            load.step_s,
        )


SERVED = ("stop", "length")
