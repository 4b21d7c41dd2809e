"""Metrics for Prometheus: what requests got, counted when they end, and what workers hold, read when scraped.

Owns names and labels. A name ends in its unit; labels are class, worker and outcome, never a tenant or a prompt.
Nothing here runs per token."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.fleet import Fleet, WorkerState
from router.receipts import Receipt

# GenAI semantic conventions, gen_ai.server.*: their buckets, doubled up to a slow CPU's minutes.
SECONDS = tuple(0.01 * 2**power for power in range(15))  # 10 ms ... 164 s
PACE_SECONDS = tuple(0.0025 * 2**power for power in range(11))  # 2.5 ms ... 2.6 s a token
TOKENS = tuple(float(4**power) for power in range(12))  # powers of 4 from 1: gen_ai.client.token.usage
GC_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class Metrics:
    """All metrics of one router, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests = self._counter("headway_requests", "Requests that ended", ["class", "worker", "outcome"])
        self._attempts = self._counter("headway_attempts", "Placements on workers", ["class"])
        self._cached = self._counter("headway_prompt_tokens_cached", "Prompt tokens that were cached", ["class"])
        self._met = self._counter("headway_budget_ttft", "First tokens by the budget's line", ["class", "outcome"])
        self._queue = self._histogram("headway_queue_seconds", "Arrival until sent to a worker", SECONDS)
        self._duration = self._histogram("gen_ai_server_request_duration_seconds", "Arrival to the end", SECONDS)
        self._ttft = self._histogram("gen_ai_server_time_to_first_token_seconds", "Arrival to first token", SECONDS)
        self._tpot = self._histogram("gen_ai_server_time_per_output_token_seconds", "Mean pace", PACE_SECONDS)
        self._tokens = Histogram(
            "gen_ai_client_token_usage",
            "Tokens of a request",
            ["class", "gen_ai_token_type"],
            buckets=TOKENS,
            registry=self.registry,
        )

    def ended(self, receipt: Receipt) -> None:
        """Count a request that ended."""
        cls = receipt.request_class
        self._requests.labels(cls, receipt.worker, receipt.outcome).inc()
        self._duration.labels(cls).observe(receipt.duration_s)
        if receipt.attempts:
            self._attempts.labels(cls).inc(receipt.attempts)
        if receipt.queue_s is not None:
            self._queue.labels(cls).observe(receipt.queue_s)
        if receipt.ttft_s is None:
            return
        self._ttft.labels(cls).observe(receipt.ttft_s)
        self._tokens.labels(cls, "input").observe(receipt.prompt_tokens)
        self._tokens.labels(cls, "output").observe(receipt.output_tokens)
        self._cached.labels(cls).inc(receipt.cached_tokens)
        if receipt.budget_ttft_s is not None:
            self._met.labels(cls, "met" if receipt.ttft_s <= receipt.budget_ttft_s else "missed").inc()
        if (tpot_s := receipt.tpot_s) is not None:
            self._tpot.labels(cls).observe(tpot_s)

    def watch(self, fleet: Fleet, waiting_count: Callable[[], int], dropped_events: Callable[[], int]) -> None:
        """Read workers and mind at each scrape."""
        self.registry.register(_Fleet(fleet, waiting_count, dropped_events))

    def watch_collector(self) -> Callable[[], None]:
        """Export the pauses of the garbage collector; the returned call stops that."""
        pauses = Histogram("headway_gc_pause_seconds", "Collector pauses", buckets=GC_SECONDS, registry=self.registry)
        begun = 0.0

        def timed(phase: str, _: dict[str, int]) -> None:
            nonlocal begun
            if phase == "start":
                begun = time.perf_counter()
            else:
                pauses.observe(time.perf_counter() - begun)

        gc.callbacks.append(timed)
        return lambda: gc.callbacks.remove(timed)

    def exposition(self) -> bytes:
        """All of it as text for a scraper."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, labels: list[str]) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, ["class"], buckets=buckets, registry=self.registry)


class _Fleet(Collector):
    """Workers as they are when somebody asks; between scrapes they cost nothing."""

    def __init__(self, fleet: Fleet, waiting_count: Callable[[], int], dropped_events: Callable[[], int]) -> None:
        self._fleet = fleet
        self._waiting_count = waiting_count
        self._dropped_events = dropped_events

    def collect(self) -> Iterable[Metric]:
        yield _single("headway_requests_live", "Requests that the mind knows", self._waiting_count())
        yield _total("headway_record_dropped_events", "Events beyond a full recording", self._dropped_events())
        workers = self._fleet.workers
        yield _by_worker("headway_worker_up", "1 while the worker is connected", workers, _is_up)
        yield _by_worker("headway_worker_running", "Sequences that it computes", workers, _load("running"))
        yield _by_worker("headway_worker_waiting", "Sequences queued in it", workers, _load("waiting"))
        yield _by_worker("headway_worker_blocks_free", "KV blocks nobody uses", workers, _load("blocks_free"))
        yield _by_worker("headway_worker_blocks_cached", "KV blocks kept as cache", workers, _load("blocks_cached"))
        yield _by_worker("headway_worker_step_seconds", "Its last step", workers, _load("step_s"))
        losses = CounterMetricFamily("headway_worker_losses", "Times that it was lost", labels=["worker"])
        late = CounterMetricFamily("headway_late_frames", "Tokens of attempts long given up", labels=["worker"])
        for state in workers:
            losses.add_metric([state.name], state.losses)
            late.add_metric([state.name], state.link.late_frames if state.link is not None else 0)
        yield losses
        yield late


def _is_up(state: WorkerState) -> float:
    return float(state.link is not None)


def _load(field: str) -> Callable[[WorkerState], float | None]:
    def read(state: WorkerState) -> float | None:
        load = state.link.load if state.link is not None else None
        return float(getattr(load, field)) if load is not None else None

    return read


def _by_worker(
    name: str, help_text: str, workers: Iterable[WorkerState], read: Callable[[WorkerState], float | None]
) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=["worker"])
    for state in workers:
        if (value := read(state)) is not None:
            family.add_metric([state.name], value)
    return family


def _single(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=value)


def _total(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(name, help_text, value=value)
