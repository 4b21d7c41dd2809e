"""The fleet as the router believes it: a ledger a worker, and the same figures as arrays for placement.

Owns what was promised to whom: charged when decided, released on events, corrected by frames. Never sends anything."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from policies.api import Bools, Floats, Forecast, Job
from policies.chain import Chain, sample
from policies.costs import StepModel
from policies.events import WorkerLoad, WorkerUp
from policies.limits import Limits
from policies.prefix_index import PrefixIndex
from policies.request import RequestClass, WorkerId

# Hot: `Ledger.column` runs once per frame and per charge. Budget 15 us a frame with everything; bench/dispatcher.py.

Z80, Z90 = 0.8416, 1.2816  # standard normal quantiles
RESIDUAL_GAIN = 0.05  # weight of one TTFT in actual / predicted: about the last 20 count
SILENCE_S = 0.2  # a busy worker's view is stale after this or three predicted steps, whichever is longer

COLUMNS = (
    ("row_s", 1),
    ("chunk_context_s", 1),
    ("decode_context_s", 1),
    ("sequence_s", 1),
    ("q90", 1),
    ("ahead_s", 3),
    ("step_s", 3),
    ("pace_s", 3),
    ("room_tokens", 1),
    ("free_tokens", 1),
    ("silent_after", 1),
    ("residual", 1),
    ("streams", 1),
    ("waiting_tokens", 1),
    ("staged", 1),
    ("context_max", 1),
)
HEIGHT = sum(rows for _, rows in COLUMNS)


class Charge(NamedTuple):
    """What one placed request was booked with, so that the same is released."""

    ledger: Ledger
    request_class: RequestClass
    own_s: float
    uncached: int
    context: float
    growth: float  # mean output tokens
    variance: float
    pace_s: float
    placed_at: float
    predicted_ttft_s: float
    frame: int


class Ledger:
    """One worker. Counts by class are of our own requests; what frames show beyond them is other routers' work."""

    __slots__ = (
        "base_s",
        "block_tokens",
        "chunk_context_s",
        "context",
        "context_max",
        "decode_context_s",
        "floor_s",
        "frame",
        "fresh_tokens",
        "growth",
        "load",
        "model",
        "model_name",
        "own_tokens",
        "pace_s",
        "pending_s",
        "previous_tokens",
        "q90",
        "reported_at",
        "residual",
        "row_s",
        "sequence_s",
        "slot",
        "staged",
        "streams",
        "variance",
        "worker",
    )

    def __init__(self, up: WorkerUp, slot: int, now: float) -> None:
        self.worker, self.slot = up.worker, slot
        self.model_name = up.model
        self.learn(up.step_model)
        self.block_tokens, self.context_max = up.block_tokens, up.context_max
        self.load = WorkerLoad(0, 0, 0, up.blocks_total, 0, 0, 0.0)
        self.reported_at, self.frame, self.residual = now, 0, 1.0
        self.pending_s, self.streams, self.staged = [0.0, 0.0, 0.0], [0, 0, 0], 0
        self.context, self.pace_s = [0.0, 0.0, 0.0], [math.inf, math.inf, math.inf]
        self.own_tokens = self.fresh_tokens = self.previous_tokens = 0  # uncached prompt tokens not yet computed
        self.growth = self.variance = 0.0

    def learn(self, model: StepModel) -> None:
        """The worker published its step model."""
        bias = model.bias
        self.model, self.q90 = model, model.q90
        self.floor_s, self.base_s, self.row_s = model.floor_s * bias, model.base_s * bias, model.row_s * bias
        self.chunk_context_s, self.decode_context_s = model.chunk_context_s * bias, model.decode_context_s * bias
        self.sequence_s = model.sequence_s * bias

    def charge(self, job: Job, forecast: Forecast, now: float) -> Charge:
        """Book a request that was just placed here."""
        tokens, number = job.prompt.tokens, int(job.request_class)
        output = job.output
        spread = (output.q80 - output.q50) / Z80
        charge = Charge(
            ledger=self,
            request_class=job.request_class,
            own_s=forecast.own_s,
            uncached=tokens - forecast.hit_tokens,
            context=tokens + output.mean / 2,
            growth=output.mean,
            variance=spread * spread,
            pace_s=job.promise.budget.tpot_s,
            placed_at=now,
            predicted_ttft_s=forecast.ttft_s,
            frame=self.frame,
        )
        self.pending_s[number] += charge.own_s
        self.streams[number] += 1
        self.context[number] += charge.context
        self.pace_s[number] = min(self.pace_s[number], charge.pace_s)
        self.staged += job.request_class is RequestClass.DATA_PROCESSOR
        self.own_tokens += charge.uncached
        self.fresh_tokens += charge.uncached
        self.growth += charge.growth
        self.variance += charge.variance
        return charge

    def start(self, charge: Charge, now: float) -> None:
        """The first token came: the prompt is paid."""
        self._release_prompt(charge)
        if charge.request_class is RequestClass.CHATBOT and charge.predicted_ttft_s > 0:
            # Only chatbot+: what overtakes the others is not a fault of the model. Clipped, so that one stall is one.
            ratio = min(4.0, max(0.25, (now - charge.placed_at) / charge.predicted_ttft_s))
            self.residual = min(2.0, max(0.5, self.residual * (1 + RESIDUAL_GAIN * (ratio - 1))))

    def release(self, charge: Charge, has_started: bool) -> None:
        """The request ended here, one way or another."""
        if not has_started:
            self._release_prompt(charge)
        number = int(charge.request_class)
        self.streams[number] -= 1
        self.context[number] -= charge.context
        self.growth -= charge.growth
        self.variance -= charge.variance
        if self.streams[number] == 0:  # also where rounding ends
            self.context[number], self.pace_s[number] = 0.0, math.inf
        if self.variance < 0.0 or not any(self.streams):
            self.growth = self.variance = 0.0

    def _release_prompt(self, charge: Charge) -> None:
        number = int(charge.request_class)
        self.pending_s[number] = max(0.0, self.pending_s[number] - charge.own_s)
        self.staged -= charge.request_class is RequestClass.DATA_PROCESSOR
        self.own_tokens -= charge.uncached
        if charge.frame == self.frame:
            self.fresh_tokens -= charge.uncached
        elif charge.frame == self.frame - 1:
            self.previous_tokens -= charge.uncached
        if self.own_tokens == 0:
            self.pending_s = [0.0, 0.0, 0.0]

    def report(self, load: WorkerLoad, now: float) -> None:
        """A frame overwrites what was believed. It may have left before our latest dispatch came: those charges stay
        beside it for two frames."""
        self.load, self.reported_at = load, now
        self.frame += 1
        self.previous_tokens, self.fresh_tokens = self.fresh_tokens, 0

    def column(self) -> tuple[float, ...]:
        """This worker as placement sees it, in the order of COLUMNS."""
        load = self.load
        chat, agent, batch = self.streams
        own_streams = chat + agent + batch
        context0, context1, context2 = self.context
        committed, queued = load.running + load.waiting, load.waiting_uncached_tokens
        others, other_context, other_s = 0, 0.0, 0.0
        if committed > own_streams:
            others = committed - own_streams
            other_context = max(0.0, load.decode_context - context0 - context1 - context2)
            other_s = self.row_s * max(0, queued - self.own_tokens)
        else:
            committed = own_streams
        queued += self.fresh_tokens + self.previous_tokens
        # Our own prompts count as far as they are not computed yet: frames tell how many tokens are left.
        left = queued / self.own_tokens if queued < self.own_tokens else 1.0
        pending0, pending1, pending2 = self.pending_s
        ahead0 = other_s + pending0 * left
        ahead1 = ahead0 + pending1 * left
        rows = others + chat + 1  # with the request that asks
        context0 += other_context
        context1 += context0
        context2 += context1
        pace0, pace1, pace2 = self.pace_s
        pace1 = min(pace0, pace1)
        step2 = self._step_s(rows + agent + batch, context2)
        free = load.blocks_free * self.block_tokens
        # Residents are half done on average; their answers' lengths are independent, so the spread adds up in squares.
        growth = self.growth / 2 + Z90 * math.sqrt(self.variance)
        silent_s = max(SILENCE_S, 3 * step2, 3 * load.step_s) if committed else math.inf
        return (
            self.row_s,
            self.chunk_context_s,
            self.decode_context_s,
            self.sequence_s,
            self.q90,
            ahead0,
            ahead1,
            ahead1 + pending2 * left,
            self._step_s(rows, context0),
            self._step_s(rows + agent, context1),
            step2,
            pace0,
            pace1,
            min(pace1, pace2),
            free + load.blocks_cached * self.block_tokens - queued - growth,
            free - queued,
            self.reported_at + silent_s,
            self.residual,
            committed,
            queued,
            self.staged,
            self.context_max,
        )

    def _step_s(self, rows: int, context: float) -> float:
        dense_s = self.row_s * rows
        dense_s = max(dense_s, self.floor_s)
        return dense_s + self.base_s + self.decode_context_s * context + self.sequence_s * rows


class Fleet:
    """All workers, as ledgers and as arrays over slots. Implements FleetView."""

    row_s: Floats
    chunk_context_s: Floats
    decode_context_s: Floats
    sequence_s: Floats
    q90: Floats
    ahead_s: Floats
    step_s: Floats
    pace_s: Floats
    room_tokens: Floats
    free_tokens: Floats
    silent_after: Floats
    residual: Floats
    streams: Floats
    waiting_tokens: Floats
    staged: Floats
    context_max: Floats

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._ledgers: dict[WorkerId, Ledger] = {}
        self._slots: list[Ledger | None] = []
        self._profiles: dict[str, StepModel] = {}  # the fastest worker's of each model, also while all are away
        self._blocks: dict[str, int] = {}
        self._serving: dict[str, Bools] = {}
        self._table: Floats = np.zeros((HEIGHT, 0))
        self.worker: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.is_calibrated = False
        self._context_min = 0
        self.dispatched = 0
        self.index = PrefixIndex(limits.index_nodes_per_worker)
        self._bind()

    def _bind(self) -> None:
        row = 0
        for name, rows in COLUMNS:
            setattr(self, name, self._table[row] if rows == 1 else self._table[row : row + rows])
            row += rows

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._ledgers

    def ledger(self, worker: WorkerId) -> Ledger:
        """The book of a live worker."""
        return self._ledgers[worker]

    def up(self, event: WorkerUp, now: float) -> bool:
        """A worker joins, or comes back with what it has cached. False: there are too many."""
        self.lost(event.worker)
        slot = next((slot for slot, ledger in enumerate(self._slots) if ledger is None), len(self._slots))
        if slot >= self._limits.workers_max:
            return False
        if slot == len(self._slots):
            self._slots.append(None)
            self._table = np.hstack([self._table, np.zeros((HEIGHT, 1))])
            self.worker = np.append(self.worker, 0)
            self._bind()
        ledger = Ledger(event, slot, now)
        self._slots[slot] = self._ledgers[event.worker] = ledger
        self.worker[slot] = event.worker
        self.index.add(slot, sample(event.cached, self._limits.index_every_block).sampled())
        self._publish(ledger)
        self._survey()
        return True

    def lost(self, worker: WorkerId) -> None:
        """A worker and all that it held are gone. Charges to it can still be released; that changes nothing."""
        ledger = self._ledgers.pop(worker, None)
        if ledger is not None:
            self._slots[ledger.slot] = None
            self.index.remove_worker(ledger.slot)
            self._survey()

    def report(self, worker: WorkerId, load: WorkerLoad, model: StepModel | None, now: float) -> None:
        """A frame's common part. `publish` follows once its other news is booked."""
        ledger = self._ledgers[worker]
        ledger.report(load, now)
        if model is not None:
            ledger.learn(model)
            self._survey()

    def publish(self, worker: WorkerId) -> None:
        """Make a worker's ledger visible to placement."""
        self._publish(self._ledgers[worker])

    def charge(self, job: Job, forecast: Forecast, now: float) -> Charge:
        """Book a placement: at once, so that the next request in this millisecond sees it."""
        ledger = self._ledgers[forecast.worker]
        charge = ledger.charge(job, forecast, now)
        self.dispatched += 1
        self._publish(ledger)
        chain = job.prompt.chain
        known = bisect_left(chain.at, forecast.hit_tokens // ledger.block_tokens)
        self.index.add(ledger.slot, chain.sampled(known))
        return charge

    def release(self, charge: Charge, has_started: bool) -> None:
        """Undo a charge."""
        charge.ledger.release(charge, has_started)
        self._publish(charge.ledger)

    def stored(self, worker: WorkerId, keys: Sequence[bytes]) -> None:
        """A worker published these blocks."""
        self.index.add(self._ledgers[worker].slot, keys)

    def evicted(self, worker: WorkerId, keys: Sequence[bytes]) -> None:
        """A worker dropped these blocks."""
        self.index.remove(self._ledgers[worker].slot, keys)

    def profile(self, model: str) -> StepModel | None:
        """The step model of the fastest worker of `model`: what the hardware can do."""
        return self._profiles.get(model)

    def count(self, model: str) -> int:
        """Live workers of `model`."""
        serving = self._serving.get(model)
        return int(np.count_nonzero(serving)) if serving is not None else 0

    def block_tokens(self, model: str) -> int:
        """Block size of `model`'s workers, also while all are away; 0 if there never was one."""
        return self._blocks.get(model, 0)

    def context_limit(self, model: str) -> int:
        """The longest prompt that any live worker of `model` takes; 0 without one."""
        serving = self._serving.get(model)
        return int(self.context_max[serving].max()) if serving is not None else 0

    def serves(self, model: str, tokens: int, avoid: WorkerId | None) -> Bools:
        serving = self._serving.get(model)
        if serving is None:
            return np.zeros(len(self._slots), dtype=np.bool_)
        able: Bools = serving if tokens <= self._context_min else serving & (self.context_max >= tokens)
        if avoid is not None:
            others: Bools = able & (self.worker != avoid)
            return others if others.any() else able
        return able

    def hit_tokens(self, chain: Chain, model: str) -> Floats:
        return self.index.hit_blocks(chain, len(self._slots)) * self.block_tokens(model)

    def _publish(self, ledger: Ledger) -> None:
        if self._slots[ledger.slot] is ledger:
            self._table[:, ledger.slot] = ledger.column()

    def _survey(self) -> None:
        """What changes only when workers or their models do."""
        alive = [ledger for ledger in self._slots if ledger is not None]
        self.is_calibrated = all(ledger.model.version > 0 for ledger in alive)
        self._context_min = min((ledger.context_max for ledger in alive), default=0)
        self._serving = {}
        for ledger in alive:
            mask = self._serving.setdefault(ledger.model_name, np.zeros(len(self._slots), dtype=np.bool_))
            mask[ledger.slot] = True
            self._blocks[ledger.model_name] = ledger.block_tokens
        for name in self._serving:
            models = [ledger.model for ledger in alive if ledger.model_name == name]
            self._profiles[name] = min(models, key=lambda model: model.unloaded_ttft_s(1024))
