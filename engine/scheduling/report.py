"""What a worker holds right now, as its frames tell it.

Owns no state: it reads the table, the queue and the blocks' counts."""

from __future__ import annotations

from engine.kv.blocks import Counts
from engine.scheduling.table import Table
from engine.scheduling.waiting import WaitingQueue
from engine.wire import Load


def held(table: Table, waiting: WaitingQueue, counts: Counts, now: float) -> Load:
    """The load part of a frame, but for what the caller alone knows: steps, tiers, and what it had to do."""
    rows = table.is_used.nonzero()[0]
    is_decoding, context = table.is_decoding[rows], table.context[rows]
    unfinished = int((table.length[rows] - context)[~is_decoding].sum())
    return Load(
        running=len(rows),
        waiting=len(waiting),
        waiting_uncached_tokens=waiting.uncached_tokens + unfinished,
        blocks_free=counts.free,
        blocks_cached=counts.cached,
        decode_context=int(context[is_decoding].sum()),
        step_s=0.0,
        steps=0,
        oldest_running_s=now - float(table.arrived[rows].min()) if len(rows) else 0.0,
    )
