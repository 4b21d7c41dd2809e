"""Metrics of upstreams, under the names that own workers use, with `upstream` in them.

Owns nothing but the translation; read when scraped."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.upstreams.fleet import Upstreams


class UpstreamMetrics(Collector):
    """Upstreams as they are when somebody asks."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("headway_upstream_up", "1 while it answers", labels=["worker"])
        calls = GaugeMetricFamily("headway_upstream_requests", "Requests of ours there", labels=["worker"])
        running = GaugeMetricFamily("headway_upstream_running", "Sequences, as it says", labels=["worker"])
        waiting = GaugeMetricFamily("headway_upstream_waiting", "Its own queue, as it says", labels=["worker"])
        losses = CounterMetricFamily("headway_upstream_losses", "Times that it fell ill", labels=["worker"])
        resident = GaugeMetricFamily("headway_upstream_kv_tokens", "Cached there, by its KV events", labels=["worker"])
        believed = GaugeMetricFamily("headway_upstream_kv_believed_tokens", "Taken to be there", labels=["worker"])
        missed = CounterMetricFamily("headway_upstream_kv_missed", "Times that its events had a gap", labels=["worker"])
        for state in self._upstreams.states:
            if state.kv is not None:
                resident.add_metric([state.name], state.kv.residence.resident_tokens)
                believed.add_metric([state.name], state.kv.residence.believed_tokens)
                missed.add_metric([state.name], state.kv.missed)
            up.add_metric([state.name], float(state.is_well))
            calls.add_metric([state.name], state.live)
            losses.add_metric([state.name], state.losses)
            if state.load is not None:
                running.add_metric([state.name], state.load.running)
                waiting.add_metric([state.name], state.load.waiting)
        yield from (up, calls, running, waiting, losses, resident, believed, missed)
