"""Aggregate workers serve all, repeat, lose nothing with a worker, come near the exact ones, and say what they are."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from loadgen import cli, traces
from loadgen.records import Record
from loadgen.sim.script import Failure
from tests.loadgen.sim.small import mix, world


def served(records: list[Record]) -> bool:
    return all(one.outcome == "done" and len(one.token_s) == one.output_tokens for one in records)


def hit_share(records: list[Record]) -> float:
    return sum(one.cached_tokens or 0 for one in records) / sum(one.input_tokens for one in records)


def test_all_is_served_whole_and_again_the_same() -> None:
    trace = mix(duration_s=20.0, load=2.0)
    one, again = (world(trace, is_aggregate=True).run() for _ in range(2))
    assert served(one)
    assert msgspec.json.encode(one) == msgspec.json.encode(again)
    assert all(a <= b for r in one for a, b in zip(r.token_s, r.token_s[1:], strict=False))


def test_a_dead_or_stalled_aggregate_worker_costs_time_and_no_request() -> None:
    failures = (Failure("kill", 1, 8.0, 6.0), Failure("stall", 0, 12.0, 2.0))
    assert served(world(mix(duration_s=20.0, load=2.0), is_aggregate=True, failures=failures).run())


def test_it_is_near_the_exact_worker_where_there_is_room() -> None:
    trace = mix(load=2.0)
    exact, rough = (world(trace, is_aggregate=each) for each in (False, True))
    exact.run()
    rough.run()
    assert hit_share(rough.records) == pytest.approx(hit_share(exact.records), abs=0.1)
    busy = [sum(worker.busy_s for worker in each.workers) for each in (exact, rough)]
    assert busy[1] == pytest.approx(busy[0], rel=0.35)


def test_the_command_labels_them_and_refuses_what_they_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces.write(mix(duration_s=10.0, load=1.0), tmp_path / "mix.jsonl")
    words = ["simulate", str(tmp_path / "mix.jsonl"), "--out", str(tmp_path / "out"), "--aggregate"]
    assert cli.main([*words, "--workers", "300"]) == 0
    assert "simulated, not validated; aggregate workers" in capsys.readouterr().out
    assert cli.main([*words, "--engine", "niyama"]) != 0
    assert cli.main([*words[:-1], "--workers", "300"]) != 0
