"""Traces: one span a request with its queue, prefill and decode below it, made when it ends from its receipt.

Owns names and exporter. Costs nothing while a request runs, and does not exist unless an endpoint is configured."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router.telemetry.receipts import Receipt

SPANS_MAX = 2048  # waiting for the exporter; beyond it the SDK drops the newest and says so
EXPORT_S = 5.0  # a collector that answers slower must not hold the router's exit


class Tracing:
    """Turns receipts into traces; a client's `traceparent` becomes the parent."""

    def __init__(self, exporter: SpanExporter, service_name: str, address: str, port: int) -> None:
        resource = Resource.create({"service.name": service_name})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=SPANS_MAX, export_timeout_millis=EXPORT_S * 1000)
        )
        self._tracer: Tracer = self._provider.get_tracer("headway")
        self._parents = TraceContextTextMapPropagator()
        self._server: dict[str, str | int | float] = {
            "server.address": address,
            "server.port": port,
            "gen_ai.provider.name": "headway",
        }

    def ended(self, receipt: Receipt) -> None:
        """Make the whole trace of a request that ended."""
        parent = self._parents.extract({"traceparent": receipt.traceparent}) if receipt.traceparent else None
        root = self._tracer.start_span(
            f"{receipt.operation} {receipt.model}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=self._server | _attributes(receipt),
            start_time=_unix_ns(receipt, 0.0),
        )
        if receipt.outcome in ("failed", "refused"):
            root.set_status(StatusCode.ERROR, receipt.reason)
            root.set_attribute("error.type", receipt.reason)
        self._phases(receipt, root)
        root.end(_unix_ns(receipt, receipt.duration_s))

    def close(self) -> None:
        """Send what waits, for at most EXPORT_S."""
        self._provider.force_flush(int(EXPORT_S * 1000))
        self._provider.shutdown()

    def _phases(self, receipt: Receipt, root: Span) -> None:
        placed_s, first_s = receipt.queue_s, receipt.ttft_s
        self._phase(receipt, root, "queue", 0.0, receipt.duration_s if placed_s is None else placed_s)
        if placed_s is not None:
            self._phase(receipt, root, "prefill", placed_s, receipt.duration_s if first_s is None else first_s)
        if first_s is not None:
            self._phase(receipt, root, "decode", first_s, receipt.duration_s)

    def _phase(self, receipt: Receipt, root: Span, name: str, begin_s: float, end_s: float) -> None:
        span = self._tracer.start_span(name, set_span_in_context(root), start_time=_unix_ns(receipt, begin_s))
        span.end(_unix_ns(receipt, max(begin_s, end_s)))


def otlp(endpoint: str) -> SpanExporter:
    """Sends spans to a collector by HTTP."""
    return OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)


def _attributes(receipt: Receipt) -> dict[str, str | int | float]:
    named: dict[str, str | int | float | None] = {
        "gen_ai.operation.name": receipt.operation,
        "gen_ai.request.model": receipt.model,
        "gen_ai.response.model": receipt.model,
        "gen_ai.response.id": receipt.request,
        "gen_ai.usage.input_tokens": receipt.prompt_tokens,
        "gen_ai.usage.output_tokens": receipt.output_tokens,
        "http.response.status_code": receipt.status,
        "headway.class": receipt.request_class,
        "headway.class_reason": receipt.class_reason,
        "headway.worker": receipt.worker,
        "headway.place_reason": receipt.place_reason,
        "headway.attempts": receipt.attempts,
        "headway.outcome": receipt.outcome,
        "headway.cached_tokens": receipt.cached_tokens,
        "headway.budget_ttft_s": receipt.budget_ttft_s,
        "headway.budget_tpot_s": receipt.budget_tpot_s,
        "headway.predicted_ttft_s": receipt.predicted_ttft_s,
        "headway.ttft_s": receipt.ttft_s,
    }
    return {name: value for name, value in named.items() if value is not None}


def _unix_ns(receipt: Receipt, after_s: float) -> int:
    return int((receipt.arrived_unix_s + after_s) * 1e9)
