"""Traces: one tree a request, below the client's own span if it sent one."""

from __future__ import annotations

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router.telemetry.receipts import Receipt
from router.telemetry.tracing import Tracing
from tests.router.telemetry.test_metrics import receipt

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def spans(of: Receipt) -> dict[str, ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, "headway", "127.0.0.1", 8080)
    tracing.ended(of)
    tracing.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def times(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return round(span.start_time / 1e9 - 1_000.0, 6), round(span.end_time / 1e9 - 1_000.0, 6)


def test_a_request_is_one_tree_of_queue_prefill_and_decode() -> None:
    tree = spans(receipt())

    assert {name: times(span) for name, span in tree.items()} == {
        "chat tiny": (0.0, 2.0),
        "queue": (0.0, 0.1),
        "prefill": (0.1, 0.5),
        "decode": (0.5, 2.0),
    }
    root = tree.pop("chat tiny")
    assert {span.parent and span.parent.span_id for span in tree.values()} == {root.context.span_id}
    assert root.parent is None
    assert root.attributes is not None
    assert root.attributes["gen_ai.request.model"] == "tiny"
    assert root.attributes["gen_ai.usage.output_tokens"] == 4
    assert root.attributes["headway.class"] == "chatbot+"
    assert root.attributes["server.port"] == 8080


def test_the_clients_own_trace_goes_on() -> None:
    root = spans(receipt(traceparent=PARENT))["chat tiny"]

    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]


def test_a_forged_traceparent_starts_a_trace_of_its_own() -> None:
    assert spans(receipt(traceparent="00-zz"))["chat tiny"].parent is None


def test_a_refusal_is_an_error_that_only_queued() -> None:
    tree = spans(receipt(outcome="refused", reason="patience", status=503, ttft_s=None, queue_s=None))

    assert set(tree) == {"chat tiny", "queue"}
    assert not tree["chat tiny"].status.is_ok
    attributes = tree["chat tiny"].attributes
    assert attributes is not None
    assert attributes["error.type"] == "patience"
