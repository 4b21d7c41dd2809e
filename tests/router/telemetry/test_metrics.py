"""Metrics: what a request that ended counts, and what workers show when scraped."""

from __future__ import annotations

import gc

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.wire import TierLoad
from policies.costs import StepModel
from policies.reservations import Counts
from router.telemetry.metrics import GcPauses, Metrics, Reservations
from router.telemetry.receipts import Receipt
from router.workers.fleet import Fleet
from tests.router.frames import hello, load
from tests.router.workers.test_fleet import Quiet, linked


def receipt(**changes: object) -> Receipt:
    fields: dict[str, object] = {
        "request": "r1",
        "operation": "chat",
        "tenant": "local",
        "model": "tiny",
        "request_class": "chatbot+",
        "class_reason": "declared",
        "outcome": "finished",
        "status": 200,
        "reason": "stop",
        "worker": "w0",
        "attempts": 1,
        "arrived_unix_s": 1_000.0,
        "queue_s": 0.1,
        "ttft_s": 0.5,
        "duration_s": 2.0,
        "prompt_tokens": 100,
        "cached_tokens": 64,
        "output_tokens": 4,
        "budget_ttft_s": 1.0,
    }
    return Receipt(**{**fields, **changes})  # type: ignore[arg-type]


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names...) -> value."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_finished_request_is_counted_by_class_worker_and_outcome() -> None:
    metrics = Metrics()

    metrics.ended(receipt())
    metrics.ended(receipt(ttft_s=1.5))

    seen = samples(metrics)
    assert seen["headway_requests_total", "chatbot+", "finished", "w0"] == 2
    assert seen["headway_first_tokens_total", "chatbot+", "in_time"] == 1
    assert seen["headway_first_tokens_total", "chatbot+", "late"] == 1
    assert seen["headway_prompt_tokens_cached_total", "chatbot+"] == 128
    assert seen["gen_ai_server_time_to_first_token_seconds_sum", "chatbot+"] == 2.0
    assert seen["gen_ai_server_time_per_output_token_seconds_sum", "chatbot+"] == 0.5 + 0.5 / 3
    assert seen["gen_ai_client_token_usage_sum", "chatbot+", "input"] == 200


def test_how_well_first_tokens_were_forecast_is_told_by_class() -> None:
    metrics = Metrics()

    metrics.ended(receipt(predicted_ttft_s=0.2))  # it took 0.4 s from the worker on
    metrics.ended(receipt(predicted_ttft_s=0.2, attempts=2))  # whose forecast is not told
    metrics.ended(receipt())

    seen = samples(metrics)
    assert seen["headway_ttft_forecast_ratio_count", "chatbot+"] == 1
    assert seen["headway_ttft_forecast_ratio_sum", "chatbot+"] == pytest.approx(2.0)


def test_slack_that_a_task_handed_on_is_counted_in_seconds() -> None:
    metrics = Metrics()

    metrics.ended(receipt(budget_saved_s=12.5))
    metrics.ended(receipt())

    assert samples(metrics)["headway_task_slack_seconds_total", "chatbot+"] == 12.5


def test_a_refused_request_has_an_end_and_no_first_token() -> None:
    metrics = Metrics()

    metrics.ended(receipt(outcome="refused", worker="", status=503, attempts=0, ttft_s=None, queue_s=None))

    seen = samples(metrics)
    assert seen["headway_requests_total", "chatbot+", "refused", ""] == 1
    assert seen["gen_ai_server_request_duration_seconds_count", "chatbot+"] == 1
    assert seen["gen_ai_server_time_to_first_token_seconds_count", "chatbot+"] == 0
    assert seen["headway_queue_seconds_count", "chatbot+"] == 0


def test_reservations_are_read_when_scraped() -> None:
    metrics, counts = Metrics(), Counts()
    metrics.registry.register(Reservations(counts))
    counts.made, counts.kept, counts.missed = 5, 3, 2

    seen = samples(metrics)

    outcomes = {name: seen["headway_reservations_total", name] for name in ("made", "kept", "missed", "early", "moved")}
    assert outcomes == {"made": 5, "kept": 3, "missed": 2, "early": 0, "moved": 0}


def test_workers_are_read_when_scraped() -> None:
    metrics = Metrics()
    fleet = Fleet([("w0", "/a"), ("w1", "/b")], Quiet(), "{}")
    link, _ = linked(fleet, 0, hello())
    tiers = TierLoad(
        block_bytes=100, host_blocks=5, stored=7, restored_host=3, disk_blocks=2, missed=1, pinned_bytes=3000
    )
    counts = {"repairs": 4, "preemptions": 6, "parks": 2}
    link.load = load(running=3, step_s=0.02, tiers=tiers, joules=[5.0, 0.0, 7.5, 30.0], **counts)
    link.step_model = StepModel(1e-3, 1e-5, 1e-3, 1e-9, 1e-9, 1e-5, q90=1.3, version=2)
    metrics.watch(fleet, live_count=lambda: 7, dropped_events=lambda: 2)

    seen = samples(metrics)

    assert (seen["headway_worker_up", "w0"], seen["headway_worker_up", "w1"]) == (1, 0)
    assert seen["headway_worker_running", "w0"] == 3
    assert seen["headway_worker_step_seconds", "w0"] == 0.02
    assert seen["headway_worker_step_error_q90", "w0"] == 1.3
    assert ("headway_worker_running", "w1") not in seen
    assert (seen["headway_worker_tier_bytes", "host", "w0"], seen["headway_worker_tier_bytes", "disk", "w0"]) == (
        500,
        200,
    )
    assert seen["headway_worker_tier_stored_bytes_total", "host", "w0"] == 700
    assert seen["headway_worker_tier_hit_blocks_total", "host", "w0"] == 3
    assert seen["headway_worker_tier_missed_blocks_total", "w0"] == 1
    assert seen["headway_worker_pool_pinned_bytes", "w0"] == 3000
    assert seen["headway_worker_repairs_total", "w0"] == 4
    assert seen["headway_worker_preemptions_total", "w0"] == 6
    assert seen["headway_worker_parks_total", "w0"] == 2
    assert seen["headway_worker_energy_joules_total", "data-processor", "w0"] == 7.5
    assert seen["headway_worker_energy_joules_total", "idle", "w0"] == 30
    assert seen[("headway_requests_live",)] == 7
    assert seen[("headway_record_dropped_events_total",)] == 2


def test_pauses_of_the_collector_are_counted_while_watched() -> None:
    metrics = Metrics()
    with GcPauses() as pauses:
        metrics.registry.register(pauses)
        gc.collect()
    counted = samples(metrics)[("headway_gc_pauses_total",)]
    gc.collect()

    assert counted >= 1
    assert samples(metrics)[("headway_gc_pauses_total",)] == counted
    assert samples(metrics)[("headway_gc_pause_seconds_total",)] > 0
