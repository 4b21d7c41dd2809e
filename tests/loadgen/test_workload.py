"""The figures of a trace: by hand on a small one, and as published on the public ones where they are at hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loadgen import formats
from loadgen.describe import describe, rates_text
from loadgen.describe_html import page
from loadgen.formats import servegen
from loadgen.traces import BadRow, Header, Row, Tally, Trace
from loadgen.workload import Spread, Workload, arrivals, spread, workload
from tests.loadgen.shared import shared_trace


def asked(at_ms: float, *ids: int, user: str = "u", output: int = 2) -> Row:
    return Row(timestamp=at_ms, user=user, input_length=16 * len(ids), output_length=output, hash_ids=list(ids))


SMALL = Trace(
    Header(block_size=16, source="by hand"),
    (
        asked(0, 1, 2),
        asked(1000, 1, 2, 3),  # 32 of 48 held
        asked(2000, 9, user="v"),
        asked(3000, 1, 2, 3, 4),  # 48 of 64 held
        Row(timestamp=4000, session_id="s", input_length=16, output_length=2, hash_ids=[7]),
        Row(delay=500, session_id="s", gap="tool", request_class="background-agent", input_length=32, output_length=2,
            hash_ids=[7, 8]),
    ),
    (BadRow(9, "nonsense"),),
    1,
)  # fmt: skip


def test_the_figures_of_a_small_trace_are_those_worked_out_by_hand() -> None:
    found = workload(SMALL, cache_tokens=[32])
    assert found.whole.ideal_hit == (32 + 48 + 16) / (32 + 48 + 16 + 64 + 16 + 32)
    assert found.reuse is not None
    assert found.reuse.over_half == pytest.approx(2 / 6)  # 2 of 3 blocks and 3 of 4; 1 of 2 is not over half
    assert found.reuse.distinct_tokens == 7 * 16
    by_size = {point.tokens: point.hit for point in found.reuse.curve}
    assert by_size[32] == pytest.approx((32 + 16) / 208)  # two blocks: the second row's and the last's, each just asked
    assert by_size[7 * 16] == found.whole.ideal_hit
    assert (found.whole.tool_gap_s.count, found.whole.tool_gap_s.p50, found.whole.after_tool) == (1, 0.5, 1 / 6)
    assert [(group.name, group.requests) for group in found.by_user] == [("u", 3), ("v", 1)]
    assert [group.name for group in found.classes] == ["chatbot+", "background-agent"]


def test_a_held_prefix_counts_in_whole_blocks_of_an_engine() -> None:
    small = Trace(Header(block_size=8), (asked(0, 1, 2, 3), asked(1000, 1, 2, 3, 4, 5, 6), asked(2000, 1, 9, 8)))
    found = workload(small).reuse
    assert found is not None
    assert found.ideal_hit == (24 + 8) / 192
    assert [(one.block_tokens, one.hit) for one in found.in_blocks] == [(16, 16 / 192), (64, 0.0)]
    assert "an endless one 16.7 % (8.3 % in blocks of 16, 0.0 % in blocks of 64)" in describe(workload(small))


def test_bursts_are_seen_in_the_windows() -> None:
    found = arrivals([0.0, 0.1, 0.2, 0.3, 2.0, 4.0])
    assert (found.span_s, found.per_s) == (4.0, 1.5)
    assert found.peak_to_mean_1s == pytest.approx(4 / (5 / 4))  # windows hold 4, 0, 1, 0; the last is not full


def test_sessions_that_all_begin_at_once_say_nothing_of_rates() -> None:
    rows = tuple(Row(timestamp=0, session_id=f"s{n}", input_length=9, output_length=1) for n in range(3))
    trace = Trace(Header(), rows)
    found = workload(trace)
    assert (found.has_clock, workload(SMALL).has_clock) == (False, True)
    for shown in (describe(found), page("weka", trace, found)):
        assert "ll sessions begin at 0" in shown
        assert "CV" not in shown


def test_few_requests_in_a_long_time_are_a_rate_and_a_picture_all_the_same() -> None:
    trace = Trace(Header(), tuple(asked(at) for at in (0, 1e9, 6e9)))
    found = workload(trace)
    assert "5e-07" in describe(found)
    heights = re.findall(r'height="([0-9.]+)"/></g>', page("slow", trace, found))
    assert max(map(float, heights)) > 50


def test_a_percentile_is_a_value_that_occurred() -> None:
    assert spread(range(100)) == Spread(100, 49.5, 10, 50, 75, 90, 99, 99)
    assert spread([]) == Spread()


def test_a_trace_without_blocks_says_nothing_of_reuse() -> None:
    found = workload(Trace(Header(), (Row(timestamp=0, input_length=9, output_length=1),)))
    assert (found.reuse, found.whole.ideal_hit, found.whole.new_tokens) == (None, None, None)
    assert "no block ids" in describe(found)


def test_the_text_and_the_page_show_the_figures_and_what_was_left_out() -> None:
    found = workload(SMALL)
    said, drawn = describe(found), page("small <trace>", SMALL, found)
    for text in (said, drawn):
        assert "1 bad rows" in text
        assert "nonsense" in text
        assert "46.2" in text  # % of ideal hit
    assert "small &lt;trace&gt;" in drawn
    assert drawn.count("<svg") == 5  # arrivals, two lengths, the cache curve, gaps
    assert "<script" not in drawn
    assert "http" not in drawn.replace("http-equiv", "")


def test_of_many_blocks_some_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(asked(1000.0 * number, *range(10 * number)) for number in range(1, 20))
    exact = workload(Trace(Header(block_size=16), rows)).reuse
    monkeypatch.setattr("loadgen.workload.ACCESSES_MAX", 400)
    found = workload(Trace(Header(block_size=16), rows)).reuse
    assert exact is not None
    assert found is not None
    assert (exact.sampled_1_in, found.sampled_1_in) == (1, 5)
    assert found.ideal_hit == exact.ideal_hit
    assert found.distinct_tokens == pytest.approx(exact.distinct_tokens, rel=0.05)
    assert found.curve[-1].hit == pytest.approx(exact.curve[-1].hit, abs=0.03)


def whole(name: str, *cache: int) -> Workload:
    return workload(formats.load(shared_trace(name)), cache)


def near(value: float | None, published: float, digits: float = 0.002) -> bool:
    """Within their rounding: a unit of the last digit they give, or two in a thousand."""
    assert value is not None
    return value == pytest.approx(published, rel=digits, abs=0)


MOONCAKE_FIGURES = [
    ("conversation_trace.jsonl.zst", (3.40, 3.03, 8.2, 1.21, 7.9, 2.9), (12_035, 964, 6_909, 27_367, 85_400, 126_195)),
    ("synthetic_trace.jsonl.zst", (3.91, 1.01, 3.3, 1.17, 1.1, 1.2), (15_326, 30, 11_587, 38_611, 66_456, 191_378)),
    ("AzureLLMInferenceTrace_code.csv.zst", (2.57, 13.2, 26.1, 4.18, 13.2, 164),
     (2_048, 147, 1_469, 5_188, 7_436, 7_437)),
    ("AzureLLMInferenceTrace_conv.csv.zst", (5.53, 1.09, 2.9, 1.52, 1.4, 16),
     (1_155, 207, 1_020, 2_735, 4_142, 14_050)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "published", "lengths"), MOONCAKE_FIGURES)
def test_arrivals_and_lengths_are_as_published(
    name: str, published: tuple[float, ...], lengths: tuple[float, ...]
) -> None:
    found = whole(name).whole
    at = found.arrivals
    assert at.per_s is not None
    assert at.cv is not None
    ours = (at.per_s, at.cv, at.peak_to_mean_1s, at.peak_to_mean_60s, at.var_to_mean_1s, at.var_to_mean_60s)
    assert [_as(value, said) for value, said in zip(ours, published, strict=True)] == list(published)
    tokens = found.input_tokens
    mine = (tokens.mean, tokens.p10, tokens.p50, tokens.p90, tokens.p99, tokens.most)
    assert all(near(value, said) for value, said in zip(mine, lengths, strict=True))


def _as(value: float, published: float) -> float:
    """Rounded to as many decimals as were published."""
    text = f"{published}"
    return round(value, 0 if text.endswith(".0") else len(text.partition(".")[2]))


@pytest.mark.parametrize(
    ("name", "ideal", "over_half", "lru", "gaps"),
    [
        ("conversation_trace.jsonl.zst", 37.4, 42.4, (21.6, 36.2), (114, 519)),
        ("synthetic_trace.jsonl.zst", 65.1, 44.3, (43.2, 65.1), (59, 282)),
    ],
)
def test_mooncakes_reuse_is_as_published(
    name: str, ideal: float, over_half: float, lru: tuple[float, float], gaps: tuple[float, float]
) -> None:
    found = whole(name, 5_120_000, 25_600_000).reuse
    assert found is not None
    assert (round(100 * found.ideal_hit, 1), round(100 * found.over_half, 1)) == (ideal, over_half)
    by_size = {point.tokens: 100 * point.hit for point in found.curve}
    assert (by_size[5_120_000], by_size[25_600_000]) == pytest.approx(lru, abs=0.15)
    assert (found.gap_s.p50, found.gap_s.p90) == pytest.approx(gaps, abs=0.6)


@pytest.mark.nightly
def test_weka_is_as_published() -> None:
    found = whole("weka_requests.csv.zst").whole
    assert (found.requests, found.sessions) == (38_393, 555)
    assert found.ideal_hit == pytest.approx(0.963, abs=0.0006)
    assert round(100 * found.after_tool) == 85
    new, turns, tool, human = found.new_tokens, found.turns, found.tool_gap_s, found.human_gap_s
    assert new is not None
    assert all(near(*pair) for pair in ((new.p50, 724), (new.p90, 4872), (new.p99, 92_091)))
    assert (turns.p10, turns.p50, turns.p90, turns.most) == (7, 44, 155, 561)
    assert (tool.p50, tool.p75, tool.p90, tool.p99) == pytest.approx((8, 19, 70, 907), abs=1)
    assert (human.p50, human.p75, human.p90) == pytest.approx((136, 480, 1671), abs=1)
    tokens = found.input_tokens
    published = (121_661, 41_316, 102_121, 228_557, 509_874, 894_371)
    assert all(
        near(*pair)
        for pair in zip(
            (tokens.mean, tokens.p10, tokens.p50, tokens.p90, tokens.p99, tokens.most), published, strict=True
        )
    )


def test_servegens_sets_are_as_published() -> None:
    path = shared_trace("servegen-data.tar.zst")
    sets = servegen.load(path, Tally(Path(path), strict=True))
    rows = rates_text([servegen.rates(name, clients) for name, clients in sets.items()]).splitlines()[1:]
    assert [row.split() for row in rows] == [
        ["deepseek-r1", "73", "16.0", "2.66", "29", "2.3"],
        ["m-large", "162", "195.8", "2.98", "16", "3.4"],
        ["m-mid", "109", "1790.1", "1.92", "52", "12.0"],
        ["m-small", "43", "1174.4", "3.30", "30", "3.6"],
        ["mm-image", "35", "9.5", "1.40", "14", "2.2"],
    ]
