"""Several client processes are one run: each session whole in one of them, one clock, one stop, one list of records."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen import records
from loadgen.cli import main
from loadgen.client import Target
from loadgen.clients import CLIENTS_MAX, Crew, enough
from loadgen.replay import Options
from loadgen.traces import Header, Row, Trace
from tests.loadgen.server import answer_all, scripted

WAIT_S = 60.0


def rows(sessions: int) -> list[Row]:
    """Sessions of two turns, 10 ms apart."""
    found = []
    for number in range(sessions):
        common = {"session_id": f"s{number}", "input_length": 20, "output_length": 2}
        found += [Row(timestamp=10.0 * number, **common), Row(delay=20.0, **common)]
    return found


def test_the_sessions_are_shared_out_and_every_row_is_asked_once() -> None:
    async def run() -> tuple[Crew, int]:
        trace = Trace(Header(block_size=16), tuple(rows(12)))
        async with scripted(answer_all) as server:
            crew = Crew(trace, Target.parse(server.url), Options(model="m", duration_s=1.0, stripped_share=0.0), 3)
            await crew.run()
            return crew, len(server.asked)

    crew, asked = asyncio.run(run())
    assert asked == 24
    assert [record.row for record in crew.records] == list(range(24))
    assert {record.outcome for record in crew.records} == {"done"}
    first = [record for record in crew.records if record.turn == 0]
    assert [record.intended_s for record in first] == [pytest.approx(0.01 * number) for number in range(12)]
    assert all(record.sent_s >= record.intended_s for record in crew.records if record.sent_s and record.intended_s)
    later = {record.session: record for record in crew.records if record.turn == 1}
    for record in first:  # a later turn comes after its own session's answer, so they were in one process
        assert record.end_s is not None
        assert later[record.session].intended_s == pytest.approx(record.end_s + 0.02)
    assert crew.progress().done == 24
    assert (crew.not_reached, crew.cpu_s > 0) == (0, True)


def test_a_run_says_how_many_clients_it_had_and_what_they_spent(url: str, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "r"
    trace.write_text(
        "".join(json.dumps({"timestamp": at, "input_length": 9, "output_length": 1}) + "\n" for at in (0, 50))
    )
    command = ["replay", str(trace), "--target", url, "--duration", "0.2", "--out", str(out), "--clients", "2"]
    assert main(command) == 0
    run, found = records.read(out.with_suffix(".jsonl"))
    assert (run.clients, len(found)) == (2, 2)
    assert main([*command[:-1], str(CLIENTS_MAX + 1)]) == 1


def test_ctrl_c_stops_all_of_them_and_the_report_is_written_all_the_same(url: str, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "r"
    lines = [{"timestamp": at, "input_length": 9, "output_length": 1} for at in (0, 1, 3_600_000, 3_600_001)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["-m", "loadgen.cli", "replay", str(trace), "--target", url, "--out", str(out), "--clients", "2"]
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        assert any("done 2" in line for line in process.stderr)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group hears it
        said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "INVALID: the run was interrupted" in said
    run, found = records.read(out.with_suffix(".jsonl"))
    assert (run.is_interrupted, run.not_reached, len(found)) == (True, 2, 2)


def test_a_client_that_dies_is_an_error_and_takes_the_others_along() -> None:
    async def run() -> None:
        far = [Row(timestamp=50_000.0, input_length=9, output_length=1) for _ in range(2)]  # so that both still run
        trace = Trace(Header(block_size=16), (*rows(2), *far))
        async with scripted(answer_all) as server:
            crew = Crew(trace, Target.parse(server.url), Options(model="m", duration_s=60.0), 2)
            task = asyncio.ensure_future(crew.run())
            while crew.progress().offered < 1:  # noqa: ASYNC110  it is told by another process
                await asyncio.sleep(0.02)
            victim = crew._members[0].process
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            with pytest.raises(ValueError, match="a client process died"):
                await task
            assert not any(member.process.is_alive() for member in crew._members)

    asyncio.run(run())


def test_a_turn_that_waits_for_another_family_needs_one_client() -> None:
    two = [Row(timestamp=0.0, session_id=name, input_length=9, output_length=1) for name in "ab"]
    late = Row(delay=1.0, session_id="b", after=["a#0"], input_length=9, output_length=1)
    child = Row(delay=1.0, session_id="c", parent="a", after=["a#0"], input_length=9, output_length=1)
    options = Options(model="m")
    with pytest.raises(ValueError, match="use one client"):
        Crew(Trace(Header(), (*two, late)), Target("127.0.0.1", 9), options, 2)
    assert Crew(Trace(Header(), (*two, child)), Target("127.0.0.1", 9), options, 2).count == 2


@pytest.mark.parametrize(("duration_s", "cores", "wanted"), [(1.0, 8, 1), (0.01, 8, 2), (0.002, 8, 8), (0.001, 2, 2)])
def test_a_trace_gets_as_many_clients_as_it_has_tokens_for(duration_s: float, cores: int, wanted: int) -> None:
    rows = [Row(timestamp=0.0, session_id=str(number), input_length=1, output_length=30) for number in range(10)]
    assert enough(Trace(Header(block_size=1), rows), duration_s, cores) == wanted


def test_sessions_that_wait_for_each_other_have_one_client() -> None:
    rows = [Row(timestamp=0.0, session_id="a", input_length=1, output_length=10_000)]
    rows.append(Row(delay=0.0, session_id="b", after=["a#0"], input_length=1, output_length=10_000))
    assert enough(Trace(Header(block_size=1), rows), 0.1, 8) == 1
