"""Public formats come in as they are, bad rows are counted by line, and what goes out is what another tool reads."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from loadgen import files, formats
from loadgen.formats import export, servegen
from loadgen.traces import Header, Row, Tally, Trace, TraceError, read
from router.telemetry.receipts import Receipt, Receipts

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.9799600,4808,10\n"
)
LOCAL = Header(block_size=16, hash_scope="local")
WINDOW = "0,2.0,1.5,Gamma,0.44,1.1\n600,0,0,,0,0\n"


def at(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_azure_rows_come_by_time_from_zero_with_microseconds(tmp_path: Path) -> None:
    trace = formats.load(at(tmp_path / "a.csv", AZURE), request_class="data-processor")
    assert [(row.timestamp, row.input_length, row.output_length) for row in trace.rows] == [
        (0, 4808, 10),
        (52, 3180, 8),
    ]
    assert {row.request_class for row in trace.rows} == {"data-processor"}


@pytest.mark.parametrize(
    "line", ["yesterday,1,1", "2023-11-16 18:17:05,many,1", "2023-11-16 18:17:05,1", "2023-11-16 18:17:05,0,1"]
)
def test_a_bad_azure_row_is_counted_by_its_line_and_strict_stops_at_it(tmp_path: Path, line: str) -> None:
    path = at(tmp_path / "a.csv", AZURE + line + "\n")
    trace = formats.load(path)
    assert (len(trace.rows), trace.bad_count, trace.bad[0].line) == (2, 1, 4)
    with pytest.raises(TraceError, match="line 4"):
        formats.load(path, strict=True)


def test_a_table_with_other_columns_is_refused_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="neither Azure's columns nor"):
        formats.load(at(tmp_path / "x.csv", "when,tokens\n1,2\n"))


def receipt(**changes: object) -> Receipt:
    plain: dict[str, object] = {"request": "r", "operation": "chat", "tenant": "acme", "model": "m"}
    plain |= {"request_class": "background-agent", "class_reason": "x", "outcome": "finished", "status": 200}
    plain |= {"reason": "stop", "arrived_unix_s": 10.5, "duration_s": 1.25, "prompt_tokens": 70, "output_tokens": 4}
    return Receipt(**(plain | changes))  # type: ignore[arg-type]


def test_the_routers_own_receipts_are_a_trace_of_what_it_served(tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    kept = Receipts(10, path)
    for one in (receipt(arrived_unix_s=12.0), receipt(), receipt(outcome="refused", prompt_tokens=0, output_tokens=0)):
        kept.ended(one)
    kept.close()
    trace = formats.load(path)
    first, second = trace.rows
    assert (first.timestamp, second.timestamp, first.user, first.recorded_ms) == (0, 1500, "acme", 1250)
    assert (first.request_class, first.input_length, first.output_length) == ("background-agent", 70, 4)
    assert (trace.bad_count, trace.bad[0].line) == (1, 3)
    assert "refused" in trace.bad[0].reason


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_text_format_may_be_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.csv{suffix}"
    path.write_bytes(gzip.compress(AZURE.encode()) if suffix == ".gz" else zstandard.compress(AZURE.encode()))
    assert len(formats.load(path).rows) == 2


def test_a_line_that_never_ends_is_cut_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = at(tmp_path / "t.jsonl", "x" * (3 * files.LINE_BYTES_MAX) + "\nnext\n")
    first, second = files.lines(path)
    assert (len(first), second) == (files.LINE_BYTES_MAX + 1, b"next\n")


def local_trace() -> Trace:
    rows = (
        Row(timestamp=0, session_id="a", input_length=32, output_length=3, recorded_ms=500, hash_ids=[1, 2]),
        Row(delay=1000, session_id="a", gap="tool", input_length=48, output_length=3, hash_ids=[1, 2, 3]),
        Row(timestamp=200, session_id="b", user="u", input_length=32, output_length=3, hash_ids=[1, 2]),
    )
    return Trace(LOCAL, rows)


def test_mooncake_rows_have_times_alone_and_ids_that_mean_the_same_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    said = export.write(local_trace(), path, "mooncake")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["timestamp"] for row in rows] == [0, 200, 1500]  # the later turn after 0.5 s of answer and 1 s of delay
    assert [row["hash_ids"] for row in rows] == [[0, 1], [3, 4], [0, 1, 2]]
    assert set(rows[0]) == {"timestamp", "input_length", "output_length", "hash_ids"}
    assert "16 tokens" in said


def test_aiperf_rows_keep_sessions_and_delays(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    said = export.write(local_trace(), path, "aiperf")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row.get("session_id"), row.get("timestamp"), row.get("delay")) for row in rows] == [
        ("a", 0, None),
        ("a", None, 1000),
        ("b", 200, None),
    ]
    assert "--isl-block-size 16" in said


def test_a_converted_trace_is_read_back_the_same(tmp_path: Path) -> None:
    export.write(local_trace(), tmp_path / "t.jsonl.zst", "headway")
    assert read(tmp_path / "t.jsonl.zst", strict=True) == local_trace()


def rates_archive(tmp_path: Path, **more: str) -> Path:
    lengths = {
        "0": {"input_tokens": "{100: 0.5, 200: 0.5}", "output_tokens": "{7: 1.0}"},
        "600": {"input_tokens": "{}"},
    }
    plain = {"chunk-0-trace.csv": WINDOW, "chunk-1-trace.csv": WINDOW.replace("2.0", "6.0")}
    plain |= {"chunk-0-dataset.json": json.dumps(lengths), "chunk-1-dataset.json": json.dumps(lengths)} | more
    path = tmp_path / "rates.tar"
    with tarfile.open(path, "w") as tar:
        for name, text in plain.items():
            info = tarfile.TarInfo(f"reason/small/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_servegens_rates_are_summed_over_its_clients(tmp_path: Path) -> None:
    path = rates_archive(tmp_path)
    (small,) = servegen.load(path, Tally(path, strict=True)).values()
    found = servegen.rates("small", small)
    assert (found.clients, found.mean_per_s, found.busiest_to_mean, found.largest_share) == (2, 4.0, 2.0, 0.75)
    assert found.cv == 1.5


def test_requests_are_drawn_at_the_rate_asked_for_with_the_clients_shares_and_lengths(tmp_path: Path) -> None:
    path = rates_archive(tmp_path)
    clients = servegen.load(path, Tally(path, strict=True), "small")["small"]
    wanted = servegen.Draw(seed=3, start_s=0.0, duration_s=600.0, rate_per_s=5.0)
    trace = servegen.draw("small", clients, wanted)
    assert len(trace.rows) == pytest.approx(3000, rel=0.15)
    shares = sum(row.user == "client-1" for row in trace.rows) / len(trace.rows)
    assert shares == pytest.approx(0.75, abs=0.05)
    assert {row.input_length for row in trace.rows} == {100, 200}
    assert servegen.draw("small", clients, wanted) == trace


def test_a_set_without_lengths_takes_them_from_a_trace_or_is_refused(tmp_path: Path) -> None:
    path = rates_archive(tmp_path)
    clients = servegen.load(path, Tally(path, strict=True))["small"]
    with pytest.raises(TraceError, match="has no lengths"):
        servegen.draw("small", clients, servegen.Draw(1, 0.0, 60.0, 1.0))
    drawn = servegen.draw("small", clients, servegen.Draw(1, 0.0, 60.0, 1.0, lengths=local_trace()))
    assert {row.input_length for row in drawn.rows} <= {32, 48}


def test_a_bad_rate_is_counted_with_its_file_and_line(tmp_path: Path) -> None:
    path = rates_archive(tmp_path, **{"chunk-2-trace.csv": "0,2.0,1.5,Gamma,0.44,1.1\n600,-1,0,,0,0\n"})
    tally = Tally(path, strict=False)
    servegen.load(path, tally)
    assert (tally.count, tally.bad[0].line) == (1, 2)
    assert "chunk-2-trace.csv" in tally.bad[0].reason


def test_a_member_over_the_bound_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = {"id": "s", "block_size": 64, "hash_id_scope": "local"}
    calls = [{"t": 0.0, "in": 64, "out": 1, "hash_ids": [1]}]
    path = tmp_path / "weka.tar"
    with tarfile.open(path, "w") as tar:
        for name, count in (("small.json", 1), ("large.json", 50)):
            content = json.dumps({**session, "requests": calls * count}).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(files, "MEMBER_BYTES_MAX", 500)
    trace = formats.load(path)
    assert (len(trace.rows), trace.bad_count, trace.bad[0].line) == (1, 1, 2)


def test_too_many_requests_are_not_drawn(tmp_path: Path) -> None:
    path = rates_archive(tmp_path)
    clients = servegen.load(path, Tally(path, strict=True), "small")["small"]
    with pytest.raises(TraceError, match="over 2000000 requests"):
        servegen.draw("small", clients, servegen.Draw(1, 0.0, 600.0, servegen.ROWS_MAX / 599))
