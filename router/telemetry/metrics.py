"""Metrics for Prometheus: what requests got, counted when they end, and what workers hold, read when scraped.

Owns names and labels. A name ends in its unit; labels are class, worker and outcome, never a tenant or a prompt.
Nothing here runs per token."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.wire import Load
from policies.request import CLASS_LABELS
from policies.reservations import Counts
from router.delivery.kept import KeptAnswers
from router.telemetry import tier_metrics
from router.telemetry.receipts import Receipt
from router.telemetry.tally import Tally, TallyTable
from router.workers.fleet import Fleet, WorkerState

# GenAI semantic conventions, gen_ai.server.*: their buckets, doubled up to a slow CPU's minutes.
SECONDS = tuple(0.01 * 2**power for power in range(15))  # 10 ms ... 164 s
PACE_SECONDS = tuple(0.0025 * 2**power for power in range(11))  # 2.5 ms ... 2.6 s a token
RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)  # 1: as forecast; 1.25 is the prior's q90
TOKENS = tuple(float(4**power) for power in range(12))  # powers of 4 from 1: gen_ai.client.token.usage


@dataclass(frozen=True, slots=True)
class _Row:
    """One class's own metrics, looked up once."""

    attempts: Counter
    saved: Counter
    cached: Counter
    in_time: Counter
    late: Counter
    queue: Tally
    duration: Tally
    ttft: Tally
    tpot: Tally
    forecast: Tally
    tokens_in: Tally
    tokens_out: Tally
    lost: Tally


class Metrics:
    """All metrics of one router, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests = self._counter("headway_requests", "Requests that ended", "worker", "outcome")
        self._attempts = self._counter("headway_attempts", "Placements on workers")
        self._saved = self._counter("headway_task_slack_seconds", "Budget that earlier turns of a task had left")
        self._cached = self._counter("headway_prompt_tokens_cached", "Prompt tokens that were cached")
        self._first_tokens = self._counter("headway_first_tokens", "First tokens, by the budget", "outcome")
        self._queue = self._histogram("headway_queue_seconds", "Arrival until sent to a worker", SECONDS)
        self._duration = self._histogram("gen_ai_server_request_duration_seconds", "Arrival to the end", SECONDS)
        self._ttft = self._histogram("gen_ai_server_time_to_first_token_seconds", "Arrival to first token", SECONDS)
        self._tpot = self._histogram("gen_ai_server_time_per_output_token_seconds", "Mean pace", PACE_SECONDS)
        self._forecast = self._histogram(
            "headway_ttft_forecast_ratio", "Sent to a worker until first token, over what was forecast", RATIOS
        )
        self._lost = self._histogram(
            "headway_lost_prefix_tokens", "Last turn's tokens behind the first that differs", TOKENS
        )
        self._tokens = self._histogram("gen_ai_client_token_usage", "Tokens", TOKENS, "gen_ai_token_type")
        self._rows: dict[str, _Row] = {}

    def ended(self, receipt: Receipt) -> None:
        """Count a request that ended."""
        row = self._rows.get(receipt.request_class) or self._row(receipt.request_class)
        self._requests.labels(receipt.request_class, receipt.worker, receipt.outcome).inc()
        row.attempts.inc(receipt.attempts)
        if receipt.budget_saved_s:
            row.saved.inc(receipt.budget_saved_s)
        row.duration.observe(receipt.duration_s)
        if receipt.queue_s is not None:
            row.queue.observe(receipt.queue_s)
        if receipt.ttft_s is None:
            return
        row.ttft.observe(receipt.ttft_s)
        row.tokens_in.observe(receipt.prompt_tokens)
        row.tokens_out.observe(receipt.output_tokens)
        if receipt.lost_tokens is not None:
            row.lost.observe(receipt.lost_tokens)
        row.cached.inc(receipt.cached_tokens)
        if receipt.budget_ttft_s is not None:
            (row.in_time if receipt.ttft_s <= receipt.budget_ttft_s else row.late).inc()
        if (ratio := _forecast_ratio(receipt)) is not None:
            row.forecast.observe(ratio)
        if (tpot_s := receipt.tpot_s) is not None:
            row.tpot.observe(tpot_s)

    def _row(self, cls: str) -> _Row:
        row = self._rows[cls] = _Row(
            attempts=self._attempts.labels(cls),
            saved=self._saved.labels(cls),
            cached=self._cached.labels(cls),
            in_time=self._first_tokens.labels(cls, "in_time"),
            late=self._first_tokens.labels(cls, "late"),
            queue=self._queue.labels(cls),
            duration=self._duration.labels(cls),
            ttft=self._ttft.labels(cls),
            tpot=self._tpot.labels(cls),
            forecast=self._forecast.labels(cls),
            tokens_in=self._tokens.labels(cls, "input"),
            tokens_out=self._tokens.labels(cls, "output"),
            lost=self._lost.labels(cls),
        )
        return row

    def watch(self, fleet: Fleet, live_count: Callable[[], int], dropped_events: Callable[[], int]) -> None:
        """Read workers and mind at each scrape."""
        self.registry.register(_Fleet(fleet, live_count, dropped_events))

    def watch_kept(self, kept: KeptAnswers) -> None:
        """Read the answers that clients may come back for at each scrape."""
        self.registry.register(_Kept(kept))

    def exposition(self) -> bytes:
        """All of it as text for a scraper."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, ["class", *labels], registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> TallyTable:
        table = TallyTable(name, help_text, ("class", *labels), buckets)
        self.registry.register(table)
        return table


def _forecast_ratio(receipt: Receipt) -> float | None:
    """Of the first attempt alone: a second one was forecast anew."""
    forecast_s = receipt.predicted_ttft_s
    if receipt.attempts != 1 or receipt.ttft_s is None or receipt.queue_s is None or not forecast_s:
        return None
    return (receipt.ttft_s - receipt.queue_s) / forecast_s


class Reservations(Collector):
    """Rooms kept for refused clients, by what became of them; `made` counts all."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily("headway_reservations", "Rooms kept by refusals", labels=["outcome"])
        for field in dataclasses.fields(self._counts):
            family.add_metric([field.name], getattr(self._counts, field.name))
        yield family


class GcPauses(Collector):
    """The garbage collector's pauses, as a context. It may run inside any allocation, so no lock is taken here."""

    def __init__(self) -> None:
        self._count = 0
        self._total_s = 0.0
        self._begun = 0.0

    def __enter__(self) -> GcPauses:
        gc.callbacks.append(self._timed)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._timed)

    def collect(self) -> Iterable[Metric]:
        yield _total("headway_gc_pauses", "Runs of the garbage collector", self._count)
        yield _total("headway_gc_pause_seconds", "Time in the garbage collector", self._total_s)

    def _timed(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._begun = time.perf_counter()
        else:
            self._count += 1
            self._total_s += time.perf_counter() - self._begun


class _Kept(Collector):
    """Answers that outlive their clients."""

    def __init__(self, kept: KeptAnswers) -> None:
        self._kept = kept

    def collect(self) -> Iterable[Metric]:
        yield _single("headway_answers_kept", "Under an Idempotency-Key, running or ended", len(self._kept))
        yield _single("headway_answers_kept_bytes", "Of them, to be sent again", self._kept.bytes_held)
        yield _total("headway_answers_joined", "Requests that got an earlier one's answer", self._kept.joined)


class _Fleet(Collector):
    """Workers as they are when somebody asks; between scrapes they cost nothing."""

    def __init__(self, fleet: Fleet, live_count: Callable[[], int], dropped_events: Callable[[], int]) -> None:
        self._fleet = fleet
        self._live_count = live_count
        self._dropped_events = dropped_events

    def collect(self) -> Iterable[Metric]:
        yield _single("headway_requests_live", "Requests that the mind knows", self._live_count())
        yield _total("headway_record_dropped_events", "Events beyond a full recording", self._dropped_events())
        workers = self._fleet.workers
        yield _by_worker("headway_worker_up", "1 while the worker is connected", workers, _is_up)
        yield _by_worker("headway_worker_asleep", "Level of its sleep; 0: awake", workers, _asleep)
        yield _by_worker("headway_worker_running", "Sequences that it computes", workers, _load("running"))
        yield _by_worker("headway_worker_waiting", "Sequences queued in it", workers, _load("waiting"))
        yield _by_worker("headway_worker_blocks_free", "KV blocks nobody uses", workers, _load("blocks_free"))
        yield _by_worker("headway_worker_blocks_cached", "KV blocks kept as cache", workers, _load("blocks_cached"))
        yield _by_worker("headway_worker_step_seconds", "Its last step", workers, _load("step_s"))
        yield _by_worker("headway_worker_step_error_q90", "Steps by forecast: 90th percentile", workers, _step_error)
        losses = CounterMetricFamily("headway_worker_losses", "Times that it was lost", labels=["worker"])
        late = CounterMetricFamily("headway_late_frames", "Tokens of attempts long given up", labels=["worker"])
        for state in workers:
            losses.add_metric([state.name], state.losses)
            late.add_metric([state.name], state.link.late_frames if state.link is not None else 0)
        yield losses
        yield late
        loads = [(s.name, s.link.load) for s in workers if s.link is not None and s.link.load is not None]
        yield from tier_metrics.collect(loads)
        yield energy(loads)


def energy(loads: Iterable[tuple[str, Load]]) -> Metric:
    """Joules of each worker's device by class; "idle" are the seconds in which it computed nothing."""
    told = "Energy drawn by its device, attributed to classes by the step model"
    family = CounterMetricFamily("headway_worker_energy_joules", told, labels=["worker", "class"])
    for worker, load in loads:
        for label, joules in zip((*CLASS_LABELS, "idle"), load.joules, strict=False):  # empty: nothing counts them
            family.add_metric([worker, label], joules)
    return family


def _is_up(state: WorkerState) -> float:
    return float(state.link is not None)


def _step_error(state: WorkerState) -> float | None:
    """Actual over predicted step time, as its engine finds it; nothing before it has measured."""
    model = state.link.step_model if state.link is not None else None
    return model.q90 if model is not None and model.version else None


def _asleep(state: WorkerState) -> float:
    return float(state.asleep)


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
