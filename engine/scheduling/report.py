"""What a worker holds right now, as its frames tell it.

Owns no state: it reads the table, the queue and the blocks' counts."""

from __future__ import annotations

import numpy as np

from engine.kv.blocks import Counts
from engine.scheduling.table import Table
from engine.scheduling.waiting import WaitingQueue
from engine.wire import Load


def held(table: Table, waiting: WaitingQueue, counts: Counts, now: float) -> Load:
    """The load part of a frame, but for what the caller alone knows: steps, tiers and repairs."""
    rows = np.flatnonzero(table.is_used)
    decoding = rows[table.is_decoding[rows]]
    unfinished = int((table.length[rows] - table.context[rows])[~table.is_decoding[rows]].sum())
    return Load(
        running=len(rows),
        waiting=len(waiting),
        waiting_uncached_tokens=waiting.uncached_tokens + unfinished,
        blocks_free=counts.free,
        blocks_cached=counts.cached,
        decode_context=int(table.context[decoding].sum()),
        step_s=0.0,
        steps=0,
        oldest_running_s=now - float(table.arrived[rows].min()) if len(rows) else 0.0,
    )
