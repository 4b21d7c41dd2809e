"""One worker's ledger: what was promised to it, charged when decided, released on events, corrected by frames.

Owns the books of one worker and the row of figures that placement reads. Knows no other worker and sends nothing."""

from __future__ import annotations

import math
from typing import NamedTuple

from policies.api import Forecast, Job
from policies.costs import StepModel
from policies.events import WorkerLoad, WorkerUp
from policies.request import RequestClass

# Hot: `Ledger.column` runs before a placement, once for each worker that has news; bench/dispatcher.py.

Z80, Z90 = 0.8416, 1.2816  # standard normal quantiles
RESIDUAL_GAIN = 0.05  # weight of one TTFT in actual / predicted: about the last 20 count
DOUBT_AFTER_S = 30.0  # of idleness: a worker learns its speed from steps alone, so what it said may be of a bad moment
DOUBT_FACTOR = 2.0  # it is then believed up to so many times faster: half is what a busy neighbour took of a start
DOUBT_TOKENS = 1024  # a prompt whose first token compares two workers
PACE_MIN_S = 1e-6  # a promise of no time at all is one of so little: steps are divided by it
SILENCE_S = 0.2  # a busy worker's view is stale after this or three predicted steps, whichever is longer


class Charge(NamedTuple):
    """What one placed request was booked with, so that the same is released."""

    ledger: Ledger  # also when the worker is lost: a late release changes nothing
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
    number: int  # of the ledger's charges
    latest_start: float


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
        "idle_since",
        "is_doubted",
        "left",
        "load",
        "model",
        "model_name",
        "number",
        "other_s",
        "own_tokens",
        "pace_s",
        "pending_s",
        "previous_tokens",
        "private",
        "prompts",
        "q90",
        "reported_at",
        "requests_max",
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
        self.requests_max = up.requests_max or math.inf
        self.load = WorkerLoad(0, 0, 0, up.blocks_total, 0, 0, 0.0)
        self.reported_at, self.frame, self.residual = now, 0, 1.0
        self.idle_since = now  # infinity: it has something to do
        self.pending_s, self.streams, self.staged = [0.0, 0.0, 0.0], [0, 0, 0], 0
        self.context, self.pace_s = [0.0, 0.0, 0.0], [math.inf, math.inf, math.inf]
        self.own_tokens = self.fresh_tokens = self.previous_tokens = 0  # uncached prompt tokens not yet computed
        self.growth, self.variance, self.private = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0, 0, 0]
        self.number = 0
        self.prompts: dict[int, Charge] = {}  # of chat, not yet computed
        self.left, self.other_s = 1.0, 0.0  # share of our own prompts that is not computed; others' seconds

    def learn(self, model: StepModel) -> None:
        """The worker published its step model."""
        self.model, self.q90 = model, model.q90
        self._believe(1.0)

    def is_idle(self, now: float, seconds: float) -> bool:
        """Whether it has had nothing to do for so long."""
        return now - self.idle_since >= seconds and not any(self.streams)

    @property
    def first_token_s(self) -> float:
        """How fast it says that it is."""
        return self.model.unloaded_ttft_s(DOUBT_TOKENS)

    def doubt(self, fastest_s: float) -> None:
        """It has been idle for long: the next request may find it as fast as the fastest of its model. That one is the
        trial; from then on what the worker says counts again, and its steps teach it."""
        self._believe(min(1.0, max(1.0 / DOUBT_FACTOR, fastest_s / max(1e-9, self.first_token_s))))
        self.is_doubted = True

    def _begin_work(self) -> None:
        self.idle_since = math.inf
        if self.is_doubted:
            self._believe(1.0)

    def _believe(self, share: float) -> None:
        """Take so much of the times that its model says."""
        model, bias = self.model, self.model.bias * share
        self.is_doubted = False
        self.floor_s, self.base_s, self.row_s = model.floor_s * bias, model.base_s * bias, model.row_s * bias
        self.chunk_context_s, self.decode_context_s = model.chunk_context_s * bias, model.decode_context_s * bias
        self.sequence_s = model.sequence_s * bias

    def cost_s(self, tokens: int, cached: int, output: int) -> float:
        """GPU-seconds that an answer took, as fairness counts them."""
        return self.model.request_s(tokens, cached, output)

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
            pace_s=max(PACE_MIN_S, job.promise.budget.tpot_s),
            placed_at=now,
            predicted_ttft_s=forecast.ttft_s,
            frame=self.frame,
            number=self.number,
            latest_start=now + job.first_left_s(now) - forecast.own_s,
        )
        self.number += 1
        self._begin_work()
        if number == RequestClass.CHATBOT:
            self.prompts[charge.number] = charge
        self.pending_s[number] += charge.own_s
        self.streams[number] += 1
        self.context[number] += charge.context
        self.pace_s[number] = min(self.pace_s[number], charge.pace_s)
        self.staged += job.request_class is RequestClass.DATA_PROCESSOR
        self.own_tokens += charge.uncached
        self.fresh_tokens += charge.uncached
        self.growth[number] += charge.growth
        self.variance[number] += charge.variance
        self.private[number] += charge.uncached
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
        self.growth[number] -= charge.growth
        self.variance[number] = max(0.0, self.variance[number] - charge.variance)
        self.private[number] -= charge.uncached
        if self.streams[number] == 0:  # also where rounding ends
            self.context[number], self.pace_s[number] = 0.0, math.inf
            self.growth[number] = self.variance[number] = 0.0

    def _release_prompt(self, charge: Charge) -> None:
        number = int(charge.request_class)
        self.prompts.pop(charge.number, None)
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
        if load.running + load.waiting:
            self._begin_work()
        elif self.idle_since == math.inf:
            self.idle_since = now
        self.frame += 1
        self.previous_tokens, self.fresh_tokens = self.fresh_tokens, 0

    def ahead_of(self, latest_start: float, now: float) -> float:
        """Prefill seconds that the step planner runs before a chat prompt of this latest start: who must begin sooner
        and still can be in time."""
        own_s = sum(charge.own_s for charge in self.prompts.values() if now <= charge.latest_start <= latest_start)
        return self.other_s + self.left * own_s

    def column(self) -> tuple[float, ...]:
        """This worker as placement sees it: the fields of a WorkerView in their order, three figures for a PerClass."""
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
        self.left, self.other_s = left, other_s
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
        room0, room1, room2 = self._rooms(free + load.blocks_cached * self.block_tokens - queued)
        if committed >= self.requests_max:
            room0 = room1 = room2 = -math.inf
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
            room0,
            room1,
            room2,
            free - queued,
            self.reported_at + silent_s,
            self.residual,
            committed,
            queued,
            self.staged,
            self.context_max,
        )

    def _rooms(self, free: float) -> tuple[float, float, float]:
        """KV tokens for a newcomer of each class, beside what residents as urgent as it will still write. Of less
        urgent ones their new prompt tokens count as room: the engine takes them back for who is more urgent."""
        # Residents are half done on average; their answers' lengths are independent, so the spread adds up in squares.
        chat, agent, batch = self.growth
        chat2, agent2, batch2 = self.variance
        _, agent_own, batch_own = self.private
        room0 = free + agent_own + batch_own - chat / 2 - Z90 * math.sqrt(chat2)
        room1 = free + batch_own - (chat + agent) / 2 - Z90 * math.sqrt(chat2 + agent2)
        return room0, room1, free - (chat + agent + batch) / 2 - Z90 * math.sqrt(chat2 + agent2 + batch2)

    def _step_s(self, rows: int, context: float) -> float:
        dense_s = self.row_s * rows
        dense_s = max(dense_s, self.floor_s)
        return dense_s + self.base_s + self.decode_context_s * context + self.sequence_s * rows
