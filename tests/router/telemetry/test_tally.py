"""A scraper reads our histograms as it reads prometheus_client's own."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from router.telemetry.tally import TallyTable

BOUNDS = (0.5, 1.0, 4.0**10)


@pytest.mark.parametrize("values", [(), (0.1,), (0.5, 0.50001, 1e7), (3.0, 3.0)])
def test_the_exposition_is_that_of_a_histogram(values: tuple[float, ...]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("wait_seconds", "Waited", ["class"], buckets=BOUNDS, registry=theirs).labels("chat")
    table = TallyTable("wait_seconds", "Waited", ("class",), BOUNDS)
    ours.register(table)
    row = table.labels("chat")
    for value in values:
        histogram.observe(value)
        row.observe(value)
    # but for the time at which each row was made
    wanted = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == wanted


def test_a_row_is_found_again_by_its_labels_and_its_name_is_taken() -> None:
    registry, table = CollectorRegistry(), TallyTable("wait_seconds", "Waited", ("class",), BOUNDS)
    registry.register(table)
    assert table.labels("chat") is table.labels("chat")
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(TallyTable("wait_seconds", "Waited", ("class",), BOUNDS))
