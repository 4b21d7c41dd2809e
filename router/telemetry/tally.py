"""Histograms that are cheap to fill: a request puts a value in each of eight, a scraper reads them now and then.

Owns counts by bucket. Never locks: they are filled and read by the event loop's own callbacks alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Tally:
    """One row of a histogram."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: beyond all bounds
        self.sum = 0.0

    # Hot: eight times a request. 0.16 us; prometheus_client's own Histogram takes 1.7.
    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound it does not exceed."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class TallyTable(Collector):
    """A histogram by labels."""

    def __init__(self, name: str, help_text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._help, self._labels, self._bounds = name, help_text, labels, bounds
        self._rows: dict[tuple[str, ...], Tally] = {}

    def labels(self, *values: str) -> Tally:
        """The row of these values; look it up once."""
        return self._rows.setdefault(values, Tally(self._bounds))

    def describe(self) -> Iterable[Metric]:
        yield HistogramMetricFamily(self._name, self._help, labels=self._labels)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        names = [floatToGoString(bound) for bound in (*self._bounds, float("inf"))]  # type: ignore[no-untyped-call]
        for values, row in self._rows.items():
            family.add_metric(values, list(zip(names, accumulate(row.counts), strict=True)), row.sum)
        yield family
