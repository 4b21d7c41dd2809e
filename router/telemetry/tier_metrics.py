"""Metrics of workers' KV: what lies below their devices, what went down, what came back, and who gave way.

Owns their names. Reads the newest frame's load part alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.wire import Load, TierLoad


@dataclass(frozen=True, slots=True)
class _Row:
    """One metric: its value for the host pool and for the disk."""

    name: str
    help_text: str
    host: Callable[[TierLoad], int]
    disk: Callable[[TierLoad], int]
    is_total: bool = True


@dataclass(frozen=True, slots=True)
class _Count:
    """One counter of a worker."""

    name: str
    help_text: str
    value: Callable[[Load], int]


ROWS = (
    _Row(
        "headway_worker_tier_bytes",
        "KV that lies there",
        lambda tiers: tiers.host_blocks * tiers.block_bytes,
        lambda tiers: tiers.disk_blocks * tiers.block_bytes,
        is_total=False,
    ),
    _Row(
        "headway_worker_tier_stored_bytes",
        "KV that was written there",
        lambda tiers: tiers.stored * tiers.block_bytes,
        lambda tiers: tiers.disk_written * tiers.block_bytes,
    ),
    _Row(
        "headway_worker_tier_hit_blocks",
        "Blocks that came back from there",
        lambda tiers: tiers.restored_host,
        lambda tiers: tiers.restored_disk,
    ),
    _Row(
        "headway_worker_tier_skipped_blocks",
        "Blocks that were not written there for want of room or time",
        lambda tiers: tiers.skipped,
        lambda tiers: tiers.disk_dropped,
    ),
)


COUNTS = (
    _Count(
        "headway_worker_tier_missed_blocks",
        "Blocks that a tier promised and then did not have",
        lambda load: load.tiers.missed,
    ),
    _Count(
        "headway_worker_repairs",
        "Times that block accounts were wrong and a cache started over",
        lambda load: load.repairs,
    ),
    _Count(
        "headway_worker_preemptions",
        "Times that a sequence gave its KV up to a more urgent one",
        lambda load: load.preemptions,
    ),
    _Count(
        "headway_worker_parks",
        "Times that a sequence gave its KV up because nobody read its stream",
        lambda load: load.parks,
    ),
)


def collect(loads: list[tuple[str, Load]]) -> Iterable[Metric]:
    """All of them, for the workers (name, newest load) that have said something."""
    for row in ROWS:
        make = CounterMetricFamily if row.is_total else GaugeMetricFamily
        family = make(row.name, row.help_text, labels=["worker", "tier"])
        for worker, load in loads:
            family.add_metric([worker, "host"], row.host(load.tiers))
            family.add_metric([worker, "disk"], row.disk(load.tiers))
        yield family
    for count in COUNTS:
        counter = CounterMetricFamily(count.name, count.help_text, labels=["worker"])
        for worker, load in loads:
            counter.add_metric([worker], count.value(load))
        yield counter
    pinned = GaugeMetricFamily(
        "headway_worker_pool_pinned_bytes", "Host pool registered with the worker's device", labels=["worker"]
    )
    for worker, load in loads:
        pinned.add_metric([worker], load.tiers.pinned_bytes)
    yield pinned
