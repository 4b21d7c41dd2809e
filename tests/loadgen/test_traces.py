"""Traces are read strictly, written reproducibly, and know what an ideal cache would hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loadgen.traces import Header, Row, Trace, TraceError, encode, ideal_cached, nominal_starts_s, read, write
from tests.loadgen.shared import shared_trace

MOONCAKE = '{"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}'
HEADER = '{"trace": 1, "block_size": 16}'


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def sent(at_ms: float, *hash_ids: int, session: str = "") -> Row:
    tokens = 16 * len(hash_ids)
    return Row(timestamp=at_ms, session_id=session, input_length=tokens, output_length=1, hash_ids=list(hash_ids))


def cached(*rows: Row, scope: str = "global") -> list[int]:
    assert scope in ("global", "local")
    header = Header(block_size=16, hash_scope="local" if scope == "local" else "global")
    return ideal_cached(Trace(header, rows))


def test_a_mooncake_row_is_a_trace_as_it_stands(tmp_path: Path) -> None:
    trace = read(written(tmp_path, MOONCAKE))
    assert trace.header.block_size == 512
    assert trace.rows[0] == Row(timestamp=27482, input_length=1100, output_length=52, hash_ids=[46, 47, 48])


def test_the_other_names_of_keys_are_known_and_foreign_keys_are_passed_over(tmp_path: Path) -> None:
    first = '{"created_time": 5, "input_tokens": 8, "output_tokens": 2, "session_id": "s", "colour": "red"}'
    later = '{"delay_ms": 70, "input_length": 9, "output_length": 2, "session_id": "s", "gap": "tool"}'
    trace = read(written(tmp_path, first, later))
    assert (trace.rows[0].timestamp, trace.rows[0].input_length, trace.rows[0].output_length) == (5, 8, 2)
    assert (trace.rows[1].delay, trace.rows[1].gap) == (70, "tool")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "truncated"),
        ("[1]", "not a JSON object"),
        ('{"timestamp": 1, "output_length": 1}', "input_length"),
        (
            '{"timestamp": 1, "input_length": "8", "output_length": 1}',
            "Expected `int`, got `str` - at `$.input_length`",
        ),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', ">= 1"),
        ('{"timestamp": -1, "input_length": 8, "output_length": 1}', ">= 0"),
        ('{"timestamp": NaN, "input_length": 8, "output_length": 1}', "invalid"),
        ('{"input_length": 8, "output_length": 1}', "needs a timestamp"),
        ('{"timestamp": 1, "delay": 1, "input_length": 8, "output_length": 1}', "not both"),
        ('{"delay": 1, "input_length": 8, "output_length": 1, "session_id": "x"}', "no earlier turn"),
        ('{"timestamp": 1, "after": ["s#0"], "input_length": 8, "output_length": 1}', "waits for nothing"),
        ('{"delay": 1, "after": ["s#0"], "input_length": 8, "output_length": 1}', "after 's#0'"),
        ('{"timestamp": 1, "input_length": 8, "output_length": 1, "class": "vip"}', "vip"),
        ('{"timestamp": 1, "input_length": 8, "output_length": 1, "slo": "gold"}', "no slo called 'gold'"),
        (
            '{"timestamp": 1, "input_length": 64, "output_length": 1, "hash_ids": [1]}',
            "1 hash_ids, but 64 tokens are 4",
        ),
        ('{"timestamp": 1, "input_length": 8, "output_length": 1, "timeout_s": 0}', "> 0"),
    ],
)
def test_a_bad_row_is_counted_with_its_line_and_the_reason(tmp_path: Path, line: str, reason: str) -> None:
    good = '{"timestamp": 1, "input_length": 8, "output_length": 1}'
    path = written(tmp_path, HEADER, good, line, good)
    trace = read(path)
    assert (len(trace.rows), trace.bad_count, trace.bad[0].line) == (2, 1, 3)
    assert reason in trace.bad[0].reason
    with pytest.raises(TraceError, match="line 3"):
        read(path, strict=True)


def test_reasons_are_kept_for_the_first_bad_rows_and_all_are_counted(tmp_path: Path) -> None:
    trace = read(written(tmp_path, MOONCAKE, *["{}"] * 50))
    assert (trace.bad_count, len(trace.bad)) == (50, 20)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ('{"trace": 1}', "block_size"),
        ('{"trace": 2, "block_size": 16}', "format 2"),
        ('{"trace": 1, "block_size": 0}', "block_size"),
    ],
)
def test_a_header_that_leaves_blocks_to_guesswork_stops_the_reading(tmp_path: Path, header: str, why: str) -> None:
    with pytest.raises(TraceError, match=why):
        read(written(tmp_path, header, MOONCAKE))


def test_a_file_without_one_good_row_is_an_error_that_names_the_first_bad_one(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no row can be used; line 1"):
        read(written(tmp_path, "{}"))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_what_is_written_is_read_back_and_is_the_same_bytes_each_time(tmp_path: Path, suffix: str) -> None:
    trace = Trace(
        Header(block_size=16, hash_scope="local", source="test", notes={"seed": 3}),
        (sent(1.5, 1, 2, session="s"), Row(delay=2.0, session_id="s", gap="human", input_length=40, output_length=7)),
    )
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write(trace, first)
    write(trace, second)
    assert first.read_bytes() == second.read_bytes()
    assert read(first) == trace
    assert encode(read(first)) == encode(trace)


def test_an_ideal_cache_holds_the_leading_blocks_that_were_sent_before() -> None:
    assert cached(sent(0, 1, 2, 3), sent(1, 1, 2, 9), sent(2, 7, 2, 3), sent(3, 1, 2, 9)) == [0, 32, 0, 48]


def test_an_ideal_cache_goes_by_time_not_by_the_order_of_rows() -> None:
    assert cached(sent(10, 1, 2), sent(0, 1, 2)) == [32, 0]


def test_ids_that_are_local_to_a_session_are_not_shared_with_another() -> None:
    rows = sent(0, 1, 2, session="a"), sent(1, 1, 2, session="b")
    assert (cached(*rows, scope="local"), cached(*rows)) == ([0, 0], [0, 32])


def test_a_prefix_counts_as_held_for_an_hour() -> None:
    hour_ms = 3_600_000.0
    assert cached(sent(0, 1), sent(hour_ms, 1), sent(2 * hour_ms + 1, 1)) == [0, 16, 0]


def test_a_partial_last_block_is_held_no_further_than_the_prompt_goes() -> None:
    short = replace(Trace(Header(block_size=16), ()), rows=(sent(0, 1, 2), Row(
        timestamp=1, input_length=20, output_length=1, hash_ids=[1, 2]
    )))  # fmt: skip
    assert ideal_cached(short) == [0, 20]


@pytest.mark.parametrize(
    ("name", "rows", "hit"),
    [("conversation_trace.jsonl.zst", 12_031, 0.374), ("synthetic_trace.jsonl.zst", 3_993, 0.651)],
)
def test_mooncakes_own_files_are_read_whole_with_their_published_hit(name: str, rows: int, hit: float) -> None:
    trace = read(shared_trace(name), strict=True)
    total = sum(row.input_length for row in trace.rows)
    assert len(trace.rows) == rows
    assert sum(ideal_cached(trace)) / total == pytest.approx(hit, abs=0.002)


def test_what_waits_for_two_turns_starts_after_the_later_one() -> None:
    def turn(at_ms: float | None, delay_ms: float | None, session: str, *after: str, lasts_ms: float) -> Row:
        return Row(
            timestamp=at_ms,
            delay=delay_ms,
            session_id=session,
            after=list(after),
            input_length=1,
            output_length=1,
            recorded_ms=lasts_ms,
        )

    rows = (
        turn(0, None, "s", lasts_ms=2000),
        turn(None, 500, "s/a", "s#0", lasts_ms=7000),
        turn(None, 100, "s", "s/a#0", lasts_ms=1000),
    )
    assert nominal_starts_s(rows) == [0.0, 2.5, 9.6]
