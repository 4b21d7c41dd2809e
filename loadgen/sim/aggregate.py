"""An aggregate worker for large fleets: rates instead of steps. Its figures are labelled so; believe SimWorker's.

Owns one worker's queue, its streams as a fluid and an LRU of block keys. Plans no step: a prompt in work gets what the
tightest pace leaves of the device, all streams advance alike, and an answer's tokens lie evenly between its ends."""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from engine.kv import keys
from engine.wire import Submit
from loadgen.sim.profiles import Profile
from loadgen.sim.worker import BLOCKED_WAIT_S, MODEL, ROOT, Attempt, News
from policies.costs import StepFeatures
from policies.events import WorkerLoad, WorkerReport, WorkerUp
from policies.request import WorkerId

TELL_S = 0.15  # frames of a busy worker: it counts as silent after 0.2 s
PREFILL_SHARE_MIN = 0.15  # of the device, however tight the pace: what placement assumes, too
STEP_S_MAX = 0.25  # where no stream promises a pace
ROWS_MAX, MARGIN = 2048, 0.93  # of a step and of the pace, as the step planner has them
Q = tuple[int, float, int]  # class, line, serial


@dataclass(slots=True, eq=False)
class _Stream:
    """One attempt from its submit to its end."""

    order: Submit
    attempt: Attempt
    chain: list[bytes]
    first_due: float
    cached: int = 0
    left_s: float = 0.0  # of prefill, alone on the device
    first_at: float = 0.0
    begun_at: float = 0.0  # of the token clock

    @property
    def tokens(self) -> int:
        return self.order.sampling.max_tokens

    @property
    def kv_tokens(self) -> int:
        return self.order.prompt_len + self.tokens


@dataclass(slots=True)
class _Cache:
    """Keys of blocks, least recently used first; who holds a key holds all before it."""

    room: int
    known: dict[bytes, None] = field(default_factory=dict)
    stored: list[bytes] = field(default_factory=list)
    evicted: list[bytes] = field(default_factory=list)

    def hits(self, chain: list[bytes]) -> int:
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if chain[middle] in self.known else (low, middle)
        return low

    def use(self, chain: list[bytes]) -> None:
        """Tails are used first, so that they go first."""
        for key in reversed(chain):
            if key in self.known:
                del self.known[key]
            else:
                self.stored.append(key)
            self.known[key] = None
        while len(self.known) > self.room:
            oldest = next(iter(self.known))
            del self.known[oldest]
            self.evicted.append(oldest)

    def take_events(self) -> tuple[bytes, bytes]:
        told = b"".join(self.stored), b"".join(self.evicted)
        self.stored, self.evicted = [], []
        return told


class AggregateWorker:
    """The face of SimWorker: `turn` begins a phase of constant rates, `settle` ends it, `interrupt` cuts it short."""

    def __init__(self, worker: WorkerId, profile: Profile) -> None:
        self.worker, self.profile = worker, profile
        self.busy_s, self.steps = 0.0, 0
        self._model = profile.model
        self._begin()

    def _begin(self) -> None:
        profile = self.profile
        self._orders: list[tuple[_Stream | int, float]] = []
        self._waiting: list[tuple[Q, _Stream]] = []  # prompts, the most urgent first
        self._streams: dict[int, _Stream] = {}  # that decode, by handle
        self._ends: list[tuple[float, int]] = []  # (token clock, handle)
        self._clock = 0.0  # tokens that a stream has got since the start
        self._kv_tokens = self._context = 0  # of all streams: at their end, and now
        self._cache = _Cache(profile.blocks_total)
        self._serial, self._phase, self._rates = 0, (0.0, 0.0), (0.0, 0.0)
        self._is_busy, self._told_at, self.stalled_s = False, 0.0, 0.0
        self._first: list[tuple[Attempt, int]] = []
        self._last: list[_Stream] = []

    def up(self) -> WorkerUp:
        """The hello of a worker with an empty cache."""
        profile = self.profile
        context = min(profile.context_max, profile.blocks_total * profile.block_tokens)
        return WorkerUp(self.worker, MODEL, profile.block_tokens, profile.blocks_total, context, self._model)

    def die(self) -> list[Attempt]:
        """Everything is gone; the attempts that it takes with it."""
        held = [stream for _, stream in self._waiting] + list(self._streams.values())
        held += [order for order, _ in self._orders if isinstance(order, _Stream)]
        self._begin()
        return [stream.attempt for stream in held if stream.attempt.is_wanted]

    @property
    def is_busy(self) -> bool:
        return self._is_busy

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._streams or self._orders)

    def blocked_until(self, now: float) -> float:
        """When to look again."""
        return now + BLOCKED_WAIT_S

    def submit(self, order: Submit, attempt: Attempt, now: float) -> None:
        """Take an attempt; it is read before the next phase."""
        chain = keys.split(keys.chain(ROOT, np.frombuffer(order.ids, dtype=np.int32), self.profile.block_tokens))
        self._orders.append((_Stream(order, attempt, chain, now + order.first_left_s), now))

    def abort(self, handle: int, now: float) -> None:
        """Nobody waits for it any more."""
        self._orders.append((handle, now))

    # Phases ----------------------------------------------------------------------------------------------------------

    def turn(self, now: float) -> float | None:
        """Obey, and begin the next phase: when it ends. None: there is nothing to do."""
        for order, _ in self._orders:
            if isinstance(order, int):
                self._drop(order)
            else:
                self._queue(order)
        self._orders.clear()
        if not (self._waiting or self._streams):
            return None
        token_s, share = self._speeds()
        until = max(self._told_at + TELL_S, now + 1e-6)
        if share:
            until = min(until, now + self._waiting[0][1].left_s / share)
        if self._streams:
            until = min(until, now + max(0.0, self._ends[0][0] - self._clock) * token_s)
        self._phase, self._rates, self._is_busy = (now, until + self.stalled_s), (token_s, share), True
        return self._phase[1]

    def _speeds(self) -> tuple[float, float]:
        """Seconds a token of every stream, and the share of the device that the first prompt gets."""
        count = len(self._streams)
        decode_s = self._model.decode_s(count, self._context) if count else 0.0
        if not self._waiting or not self._has_room(self._waiting[0][1]):
            return decode_s, 0.0
        if not count:
            return 0.0, 1.0
        pace_s = MARGIN * min(STEP_S_MAX, *(stream.order.tpot_s for stream in self._streams.values()))
        step, head = StepFeatures(count, self._context, 0, count), self._waiting[0][1]
        tokens = min(self._model.tokens_within(pace_s, step, head.cached), ROWS_MAX - count)
        share = self._model.prefill_s(tokens, head.cached) / pace_s  # rows ride for free where weights are read anyway
        if share < PREFILL_SHARE_MIN:
            return decode_s / (1.0 - PREFILL_SHARE_MIN), PREFILL_SHARE_MIN
        return pace_s, share

    def _has_room(self, stream: _Stream) -> bool:
        capacity = self.profile.blocks_total * self.profile.block_tokens
        is_few = len(self._streams) < self.profile.sequences_max
        return not self._streams or (is_few and self._kv_tokens + stream.kv_tokens <= capacity)

    def interrupt(self, now: float) -> float | None:
        """An order came: the phase ends now. None if it was about to anyway, or nothing can end it."""
        if not self._is_busy or now >= self._phase[1] or self.stalled_s:
            return None
        self._phase = (self._phase[0], now)
        return now

    def settle(self) -> News | None:
        """The phase has ended. What it tells, if it does."""
        (begun, now), (token_s, share) = self._phase, self._rates
        passed_s = max(0.0, now - begun - self.stalled_s)
        self.stalled_s, self._is_busy = 0.0, False
        self.busy_s += now - begun
        if token_s:
            tokens = passed_s / token_s
            self._clock += tokens
            self._context += round(tokens * len(self._streams))
            self.steps += math.ceil(tokens)
        while self._ends and self._ends[0][0] <= self._clock + 1e-6:
            _, handle = heapq.heappop(self._ends)
            if handle in self._streams:
                self._end(self._streams[handle], now)
        if share:
            head = self._waiting[0][1]
            head.left_s -= passed_s * share
            if head.left_s <= 1e-9:
                del self._waiting[0]
                self._start(head, now)
        return self.tell(now)

    # One attempt -----------------------------------------------------------------------------------------------------

    def _queue(self, stream: _Stream) -> None:
        self._serial += 1
        stream.cached = min(self._cache.hits(stream.chain) * self.profile.block_tokens, stream.order.prompt_len - 1)
        stream.left_s = self._model.prefill_s(stream.order.prompt_len - stream.cached, stream.cached)
        stream.left_s += self._model.bias * self._model.base_s
        insort(self._waiting, ((stream.order.request_class, stream.first_due, self._serial), stream), key=_key)

    def _start(self, stream: _Stream, now: float) -> None:
        """Its first token."""
        self._cache.use(stream.chain)
        stream.first_at, stream.begun_at = now, self._clock
        self._first.append((stream.attempt, stream.cached))
        stream.attempt.stamps.append(now)
        self._streams[stream.order.handle] = stream
        self._kv_tokens += stream.kv_tokens
        self._context += stream.order.prompt_len
        heapq.heappush(self._ends, (self._clock + stream.tokens - 1, stream.order.handle))

    def _end(self, stream: _Stream, now: float) -> None:
        more = np.linspace(stream.first_at, now, stream.tokens)[1:].tolist()
        stream.attempt.stamps.extend(more)
        self._leave(stream)
        self._last.append(stream)

    def _leave(self, stream: _Stream) -> None:
        del self._streams[stream.order.handle]
        self._kv_tokens -= stream.kv_tokens
        self._context -= stream.order.prompt_len + round(self._clock - stream.begun_at)
        self._context = max(0, self._context) if self._streams else 0

    def _drop(self, handle: int) -> None:
        if handle in self._streams:
            self._leave(self._streams[handle])
        self._waiting = [one for one in self._waiting if one[1].order.handle != handle]

    # Telling ---------------------------------------------------------------------------------------------------------

    def tell(self, now: float) -> News | None:
        """A frame, if there is news or it is time for one."""
        if not (self._first or self._last or now - self._told_at >= TELL_S - 1e-6):
            return None
        first, last = self._first, self._last
        self._first, self._last, self._told_at = [], [], now
        stored, evicted = self._cache.take_events()
        report = WorkerReport(
            worker=self.worker,
            load=self._load(),
            first_tokens=tuple((attempt.request_id, cached) for attempt, cached in first),
            finished=tuple((stream.attempt.request_id, stream.tokens) for stream in last),
            stored=stored,
            evicted=evicted,
        )
        return News(report)

    def _load(self) -> WorkerLoad:
        size, total = self.profile.block_tokens, self.profile.blocks_total
        held = min(total, -(-self._context // size))
        cached = min(len(self._cache.known), total - held)
        uncached = sum(s.order.prompt_len - s.cached for s in self._prompts())
        waiting = len(self._waiting)
        return WorkerLoad(
            len(self._streams), waiting, uncached, total - held - cached, cached, self._context, self._rates[0]
        )

    def _prompts(self) -> Iterator[_Stream]:
        return (stream for _, stream in self._waiting)


def _key(one: tuple[Q, _Stream]) -> Q:
    return one[0]
