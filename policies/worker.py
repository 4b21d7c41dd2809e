"""The fleet as the router believes it: a ledger a worker, and the same figures as arrays for placement.

Owns the slots, the arrays over them and the prefix index. Never sends anything; policies see it as a FleetView."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from policies.api import Bools, Floats, Forecast, Job, WorkerView
from policies.chain import Chain, sample
from policies.costs import StepModel
from policies.events import WorkerLoad, WorkerUp
from policies.ledger import DOUBT_AFTER_S, Charge, Ledger
from policies.limits import Limits
from policies.prefix_index import PrefixIndex
from policies.request import RequestClass, WorkerId

DOUBT_EVERY_S = 1.0  # how often idle workers are looked for

# The fields of a WorkerView, in its order, and how they lie in a row: first one figure each, then three, then one.
ONCE = ("row_s", "chunk_context_s", "decode_context_s", "sequence_s", "q90")
PER_CLASS = ("ahead_s", "step_s", "pace_s", "room_tokens")
REST = ("free_tokens", "silent_after", "residual", "streams", "waiting_tokens", "staged", "context_max")
SILENT_AFTER = len(ONCE) + len(PER_CLASS) * len(RequestClass) + REST.index("silent_after")
HEIGHT = len(ONCE) + len(PER_CLASS) * len(RequestClass) + len(REST)
PACKED = struct.Struct(f"{HEIGHT}d")


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
        self._profiles: dict[str, StepModel] = {}  # as measured by the fastest worker of each model when it came up
        self._away_since: dict[str, float] = {}  # when the last worker of a model was lost
        self._blocks: dict[str, int] = {}
        self._stale: dict[WorkerId, Ledger] = {}  # whose row is older than its ledger
        self._serving: dict[str, Bools] = {}
        self._counts: dict[str, int] = {}
        self._table: Floats = np.zeros((0, HEIGHT))  # a row a slot, so that publishing packs one row
        self._buffer = memoryview(b"")
        self._columns: dict[int, tuple[float, ...]] = {}  # the same rows as numbers, by slot
        self._views: dict[int, WorkerView] = {}  # of those that were looked at since
        self.worker: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.is_calibrated = False
        self._context_min = 0
        self._context_limits: dict[str, int] = {}
        self._doubt_at = -math.inf
        self._silent_from = math.inf  # nobody is silent before: a bound, so that most decisions need not look
        self.dispatched = 0
        self.index = PrefixIndex(limits.index_nodes_per_worker)
        self._bind()

    def _bind(self) -> None:
        row = 0
        for name in (*ONCE, *PER_CLASS, *REST):
            rows = len(RequestClass) if name in PER_CLASS else 1
            columns = self._table[:, row : row + rows].T
            columns.flags.writeable = False  # policies see them
            setattr(self, name, columns[0] if rows == 1 else columns)
            row += rows
        self._buffer = self._table.data.cast("B") if len(self._table) else memoryview(b"")

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._ledgers

    def ledger(self, worker: WorkerId) -> Ledger:
        """The book of a live worker."""
        return self._ledgers[worker]

    def up(self, event: WorkerUp, now: float) -> bool:
        """A worker joins, or comes back with what it has cached. False: there are too many."""
        self.lost(event.worker, now)
        self._away_since.pop(event.model, None)
        slot = next((slot for slot, ledger in enumerate(self._slots) if ledger is None), len(self._slots))
        if slot >= self._limits.workers_max:
            return False
        ledger = Ledger(event, slot, now)
        if slot == len(self._slots):
            self._slots.append(None)
            self._table = np.vstack([self._table, np.zeros((1, HEIGHT))])
            self._bind()
        self._slots[slot] = self._ledgers[event.worker] = ledger
        self.worker = np.array([one.worker if one is not None else -1 for one in self._slots])
        self.worker.flags.writeable = False
        self.index.add(slot, sample(event.cached, self._limits.index_every_block).sampled())
        self._publish(ledger)
        self._survey()
        self._measure(event.model, event.step_model)
        return True

    def lost(self, worker: WorkerId, now: float) -> None:
        """A worker and all that it held are gone. Charges to it can still be released; that changes nothing."""
        ledger = self._ledgers.pop(worker, None)
        self._stale.pop(worker, None)
        if ledger is not None:
            self._slots[ledger.slot] = None
            self._table[ledger.slot, SILENT_AFTER] = math.inf
            self.index.remove_worker(ledger.slot)
            self._survey()
            if not self.count(ledger.model_name):
                self._away_since[ledger.model_name] = now

    def report(self, worker: WorkerId, load: WorkerLoad, model: StepModel | None, now: float) -> None:
        """A frame's common part; its other news is booked beside it."""
        ledger = self._stale[worker] = self._ledgers[worker]
        ledger.report(load, now)
        if model is not None:
            ledger.learn(model)
            self._survey()
            if not self._profiles[ledger.model_name].version:
                self._measure(ledger.model_name, model)

    def publish(self, now: float) -> None:
        """Make the arrays as new as the ledgers. Before anybody looks, not at each change: most are never looked at."""
        if now >= self._doubt_at:
            self._doubt_at = now + DOUBT_EVERY_S
            self._doubt(now)
        for ledger in self._stale.values():
            self._publish(ledger)
        self._stale.clear()

    def _doubt(self, now: float) -> None:
        """Who looks slow is not asked, and who is not asked cannot learn that it is not slow any more."""
        fastest: dict[str, float] = {}
        measured = [ledger for ledger in self._ledgers.values() if ledger.model.version > 0]
        for ledger in measured:
            name = ledger.model_name
            fastest[name] = min(fastest.get(name, math.inf), ledger.first_token_s)
        for ledger in measured:
            if not ledger.is_doubted and ledger.is_idle(now, DOUBT_AFTER_S):
                ledger.doubt(fastest[ledger.model_name])
                self._stale[ledger.worker] = ledger

    def charge(self, job: Job, forecast: Forecast, now: float) -> Charge:
        """Book a placement: at once, so that the next request in this millisecond sees it."""
        ledger = self._stale[forecast.worker] = self._ledgers[forecast.worker]
        charge = ledger.charge(job, forecast, now)
        self.dispatched += 1
        chain = job.prompt.chain
        known = bisect_left(chain.at, forecast.hit_tokens // ledger.block_tokens)
        self.index.add(ledger.slot, chain.sampled(known))
        return charge

    def release(self, charge: Charge, has_started: bool) -> None:
        """Undo a charge."""
        charge.ledger.release(charge, has_started)
        if self._ledgers.get(charge.ledger.worker) is charge.ledger:
            self._stale[charge.ledger.worker] = charge.ledger

    def stored(self, worker: WorkerId, keys: Sequence[bytes]) -> None:
        """A worker published these blocks."""
        self.index.add(self._ledgers[worker].slot, keys)

    def evicted(self, worker: WorkerId, keys: Sequence[bytes]) -> None:
        """A worker dropped these blocks."""
        self.index.remove(self._ledgers[worker].slot, keys)

    def profile(self, model: str) -> StepModel | None:
        """What the hardware of `model`'s fastest worker can do, as measured at a start. Promises are made from it, so
        it does not follow a worker that its load makes slow: a promise would loosen itself."""
        return self._profiles.get(model)

    def count(self, model: str) -> int:
        """Live workers of `model`."""
        return self._counts.get(model, 0)

    def away_s(self, model: str, now: float) -> float:
        """How long no worker of `model` has been there; 0 while one is, or before the first."""
        return now - self._away_since.get(model, now)

    def block_tokens(self, model: str) -> int:
        """Block size of `model`'s workers, also while all are away; 0 if there never was one."""
        return self._blocks.get(model, 0)

    def context_limit(self, model: str) -> int:
        """The longest prompt that any live worker of `model` takes; 0 without one."""
        return self._context_limits.get(model, 0)

    def view(self, slot: int) -> WorkerView:
        view = self._views.get(slot)
        if view is None:
            self._views[slot] = view = _view(self._columns[slot], WorkerId(int(self.worker[slot])))
        return view

    def serves(self, model: str, tokens: int, avoid: WorkerId | None) -> Bools:
        serving = self._serving.get(model)
        if serving is None:
            return np.zeros(len(self._slots), dtype=np.bool_)
        able: Bools = serving if tokens <= self._context_min else serving & (self.context_max >= tokens)
        if avoid is not None:
            others: Bools = able & (self.worker != avoid)
            return others if others.any() else able
        return able

    def silence_s(self, now: float) -> Floats | None:
        if now <= self._silent_from:
            return None
        self._silent_from = float(self.silent_after.min())
        return np.maximum(now - self.silent_after, 0.0) if now > self._silent_from else None

    def ahead_of(self, slot: int, latest_start: float, now: float) -> float:
        ledger = self._slots[slot]
        return ledger.ahead_of(latest_start, now) if ledger is not None else 0.0

    def hit_tokens(self, chain: Chain, model: str) -> Floats:
        return self.index.hit_blocks(chain, len(self._slots)) * self.block_tokens(model)

    def _publish(self, ledger: Ledger) -> None:
        column = self._columns[ledger.slot] = ledger.column()
        self._views.pop(ledger.slot, None)
        PACKED.pack_into(self._buffer, ledger.slot * PACKED.size, *column)  # a third of numpy's own time
        self._silent_from = min(self._silent_from, column[SILENT_AFTER])

    def _survey(self) -> None:
        """What changes only when workers or their models do."""
        alive = [ledger for ledger in self._slots if ledger is not None]
        self.is_calibrated = all(ledger.model.version > 0 for ledger in alive)
        self._context_min = min((ledger.context_max for ledger in alive), default=0)
        self._serving, self._counts, self._context_limits = {}, {}, {}
        for ledger in alive:
            mask = self._serving.setdefault(ledger.model_name, np.zeros(len(self._slots), dtype=np.bool_))
            mask[ledger.slot] = True
            self._counts[ledger.model_name] = self.count(ledger.model_name) + 1
            self._blocks[ledger.model_name] = ledger.block_tokens
            longest = self._context_limits.get(ledger.model_name, 0)
            self._context_limits[ledger.model_name] = max(longest, ledger.context_max)
        for mask in self._serving.values():
            mask.flags.writeable = False

    def _measure(self, name: str, model: StepModel) -> None:
        """Keep the faster one; any that was measured before one that was not."""
        held = self._profiles.get(name)
        if held is None or _speed(model) > _speed(held):
            self._profiles[name] = model


def _view(row: tuple[float, ...], worker: WorkerId) -> WorkerView:
    """A row as one worker's figures: those of one name for the classes become a tuple."""
    return WorkerView._make((*row[:5], row[5:8], row[8:11], row[11:14], row[14:17], *row[17:], worker))


def _speed(model: StepModel) -> tuple[bool, float]:
    return model.version > 0, -model.unloaded_ttft_s(1024)
