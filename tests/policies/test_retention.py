"""Bands and leases: what stays cached, for whom and how long."""

from __future__ import annotations

from policies.request import RequestClass
from policies.retention import Band, KeepLimits, SpanView, keep

CHAT, AGENT, BATCH = RequestClass


def span(
    cls: RequestClass, *, shared: bool = False, aborted: bool = False, hits: int = 0, born: float = 0.0
) -> SpanView:
    return SpanView(cls, shared, aborted, hits, born)


def test_each_class_has_its_band() -> None:
    assert keep(span(CHAT), 1.0)[0] == Band.CHATBOT
    assert keep(span(AGENT), 1.0)[0] == Band.BACKGROUND_AGENT
    assert keep(span(BATCH, shared=True), 1.0)[0] == Band.DATA_PROCESSOR


def test_what_only_one_batch_item_used_goes_first() -> None:
    assert keep(span(BATCH), 1.0) == (Band.EXPIRED, 0.0)


def test_an_abort_leaves_ten_seconds_whatever_the_class() -> None:
    assert [keep(span(cls, aborted=True), 1.0)[1] for cls in RequestClass] == [10.0, 10.0, 10.0]


def test_a_prefix_in_demand_is_leased_by_the_pace_of_its_hits() -> None:
    assert keep(span(BATCH, shared=True, hits=10), 100.0) == (Band.DATA_PROCESSOR, 30.0)
    assert keep(span(CHAT, shared=True, hits=4), 1e6)[1] == KeepLimits().lease_s_max


def test_a_lease_waits_for_a_tool_and_not_for_a_person() -> None:
    after = {has_called: SpanView(CHAT, False, False, has_called=has_called) for has_called in (True, None, False)}
    leases_s = {has_called: keep(view, 1.0)[1] for has_called, view in after.items()}
    assert leases_s == {True: 30.0, None: 30.0, False: 0.0}
    assert keep(SpanView(CHAT, True, False, hits=10, born=0.0, has_called=False), 100.0)[1] == 30.0  # others' demand
    assert keep(SpanView(CHAT, False, True, has_called=False), 1.0)[1] == KeepLimits().abort_s
