"""The host pool registered with the device's driver, in a thread of its own, while the worker serves.

Owns which pieces are registered. Never copies, and never stops serving: what is not registered is copied slowly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence

from engine.kv.pool import EXTENT_SLOTS, PoolMemory
from engine.step import Bytes, Pinner

log = logging.getLogger(__name__)

# 0.05-0.075 s of the driver's time a GiB, and 0.25 s for the kernel to make the pages (H100's host). Whoever ends the
# worker waits for one piece at most.
PIECE_BYTES = 2**30
# Steps wait for the driver meanwhile (90 ms at most) and for the host's memory: 47.5 GiB at once, at a worker's start
# under load, held first tokens up for 12 s. A quarter of the time is what this may disturb.
REST_PER_PIECE = 3.0


class Pinning:
    """Own extents first, then those of neighbours, whose slots are read as well."""

    def __init__(self, pool: PoolMemory, own: Sequence[int], pinner: Pinner, *, piece_bytes: int = PIECE_BYTES):
        self.pinned_bytes = 0
        self.total_bytes = pool.span(range(pool.shape.slots)).nbytes
        self.bytes_per_s = pinner.pinned_bytes_per_s
        self._pool, self._own, self._pinner = pool, own, pinner
        self._piece_slots = max(1, piece_bytes // pool.shape.slot_stride)
        self._pinned: list[Bytes] = []
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Register in the background; once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pin", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop, and undo what was done. No copy may be under way."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        while self._pinned:
            piece = self._pinned.pop()
            self.pinned_bytes -= piece.nbytes
            try:
                self._pinner.unpin(piece)
            except OSError as error:  # the process ends: the kernel undoes it then
                log.warning("the host pool's memory was not unregistered: %s", error)

    def _run(self) -> None:
        for slots in self._pieces():
            if self._is_over.is_set():
                return
            piece, begun_at = self._pool.span(slots), time.monotonic()
            try:
                self._pool.back(slots)
                self._pinner.pin(piece)
            except OSError as error:
                log.warning(
                    "%.1f of %.1f GiB of the host pool are registered with the device, and no more: %s",
                    self.pinned_bytes / 2**30,
                    self.total_bytes / 2**30,
                    error,
                )
                return
            self._pinned.append(piece)
            self.pinned_bytes += piece.nbytes
            self._is_over.wait(REST_PER_PIECE * (time.monotonic() - begun_at))
        log.info("the host pool is registered with the device: %.1f GiB", self.pinned_bytes / 2**30)

    def _pieces(self) -> Iterator[range]:
        """Whole slots: a copy across two pieces would be refused."""
        for run in _runs(sorted(self._own)) + _runs(self._others()):
            for start in range(run.start, run.stop, self._piece_slots):
                yield range(start, min(start + self._piece_slots, run.stop))

    def _others(self) -> list[int]:
        own = set(self._own)
        return [extent for extent in range(self._pool.shape.slots // EXTENT_SLOTS) if extent not in own]


def _runs(extents: Sequence[int]) -> list[range]:
    """Slots of adjacent extents, as long as they last."""
    runs: list[range] = []
    for extent in extents:
        slots = range(extent * EXTENT_SLOTS, (extent + 1) * EXTENT_SLOTS)
        if runs and runs[-1].stop == slots.start:
            runs[-1] = range(runs[-1].start, slots.stop)
        else:
            runs.append(slots)
    return runs
