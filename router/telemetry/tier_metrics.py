"""Metrics of the tiers below the workers' devices: what lies there, what went down, what came back.

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


def collect(loads: list[tuple[str, Load]]) -> Iterable[Metric]:
    """All of them, for the workers (name, newest load) that have said something."""
    for row in ROWS:
        make = CounterMetricFamily if row.is_total else GaugeMetricFamily
        family = make(row.name, row.help_text, labels=["worker", "tier"])
        for worker, load in loads:
            family.add_metric([worker, "host"], row.host(load.tiers))
            family.add_metric([worker, "disk"], row.disk(load.tiers))
        yield family
    missed = CounterMetricFamily(
        "headway_worker_tier_missed_blocks", "Blocks that a tier promised and then did not have", labels=["worker"]
    )
    repairs = CounterMetricFamily(
        "headway_worker_repairs", "Times that block accounts were wrong and a cache started over", labels=["worker"]
    )
    pinned = GaugeMetricFamily(
        "headway_worker_pool_pinned_bytes", "Host pool registered with the worker's device", labels=["worker"]
    )
    for worker, load in loads:
        pinned.add_metric([worker], load.tiers.pinned_bytes)
        missed.add_metric([worker], load.tiers.missed)
        repairs.add_metric([worker], load.repairs)
    yield missed
    yield pinned
    yield repairs
