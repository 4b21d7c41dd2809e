"""The command line: its examples run as pasted, its errors are one line, and a run leaves three reports."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen import records
from loadgen.cli import main
from loadgen.targets import to_plain
from tests.loadgen.conftest import serve_command
from tests.loadgen.fixture import BUDGETS, RUN, TWENTY

WAIT_S = 60.0


def test_ctrl_c_ends_the_offering_and_the_report_is_written_all_the_same(url: str, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "r"
    lines = [{"timestamp": at, "input_length": 9, "output_length": 1} for at in (0, 3_600_000)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["-m", "loadgen.cli", "replay", str(trace), "--target", url, "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert any("done 1" in line for line in process.stderr)  # a progress line: one is answered, an hour remains
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "INVALID: the run was interrupted" in said
    run, found = records.read(out.with_suffix(".jsonl"))
    assert (run.is_interrupted, run.not_reached, len(found)) == (True, 1, 1)
    assert run.duration_s == run.wall_s < 3600  # what was offered until then is what goodput is counted over
    assert out.with_suffix(".html").exists()


def test_composing_says_what_it_made_and_the_same_seed_makes_the_same_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert main(["compose", "--seed", "5", "--out", str(first)]) == 0
    assert main(["compose", "--seed", "5", "--out", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    said = capsys.readouterr().out
    assert "blocks of 16 tokens, ids global" in said
    assert "dropped_over_context" in said


def test_a_mix_gives_each_trace_its_share_of_sessions_and_says_what_scaling_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tokens in (("a.jsonl", 1024), ("b.jsonl", 2048)):
        blocks = [[0, *range(10 * n, 10 * n + tokens // 512 - 1)] for n in range(1, 9)]
        rows = [
            {"timestamp": 10 * n, "input_length": tokens, "output_length": 1, "hash_ids": ids}
            for n, ids in enumerate(blocks)
        ]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(["convert", "a.jsonl", "b.jsonl", "--load", "2", "0.5", "--scale-tokens", "1/16", "--out", "m.jsonl"]) == 0
    )
    said = capsys.readouterr().out
    assert "a.jsonl: 16 rows (80.0%), 66.7% of the input tokens" in said
    assert "b.jsonl: 4 rows (20.0%), 33.3% of the input tokens" in said
    # 7 first blocks of 512 of each copy of 8, and 3 of 4: whole blocks of 32 tokens once scaled, of which none fills 64
    share = 100 * (14 + 3) * 512 / (16 * 1024 + 4 * 2048)
    assert (
        f"ideal hit {share:.1f}%, and {share:.1f}% scaled by 1/16; an engine's: {share:.1f}% in blocks of 16, 0.0%"
        in said
    )
    assert main(["convert", "a.jsonl", "b.jsonl", "--load", "1", "2", "3", "--out", "m.jsonl"]) == 1
    assert "3 figures for 2 traces" in capsys.readouterr().err


def test_a_replay_prints_the_verdict_and_leaves_three_files(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "deep" / "run"
    row = {"timestamp": 5, "input_length": 30, "output_length": 3, "class": "chatbot+", "user": "u"}
    trace.write_text(json.dumps(row) + "\n")
    assert main(["replay", str(trace), "--target", url, "--duration", "0.2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("met 1 of 1 offered requests (100.0%)")
    run, (record,) = records.read(out.with_suffix(".jsonl"))
    assert (run.model, run.budgets_from, record.outcome) == ("m", "the target's /readyz", "done")
    assert json.loads(out.with_suffix(".json").read_text())["met"] == 1
    assert "</html>" in out.with_suffix(".html").read_text()


@pytest.mark.parametrize(("deadline_s", "code"), [(60.0, 0), (1e-9, 3)])
def test_a_gate_fails_where_a_class_does(url: str, tmp_path: Path, deadline_s: float, code: int) -> None:
    trace, budgets = tmp_path / "t.jsonl", tmp_path / "b.json"
    row = {"timestamp": 5, "input_length": 30, "output_length": 3, "class": "data-processor", "user": "u"}
    trace.write_text(json.dumps(row) + "\n")
    budgets.write_text(json.dumps({"budgets": to_plain(BUDGETS) | {"data-processor": {"deadline_s": deadline_s}}}))
    asked = ["replay", str(trace), "--target", url, "--duration", "0.2", "--budgets", str(budgets)]

    assert main([*asked, "--gate", "--out", str(tmp_path / "a")]) == code
    assert main([*asked, "--out", str(tmp_path / "b")]) == 0


def test_judging_again_gives_the_same_verdict_and_other_budgets_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, again, strict = tmp_path / "kept.jsonl", tmp_path / "again", tmp_path / "strict.json"
    records.write(RUN, TWENTY, kept)
    before = kept.read_bytes()
    assert main(["judge", str(kept), "--out", str(again)]) == 0
    assert "met 10 of 20" in capsys.readouterr().out
    strict.write_text(json.dumps({"budgets": to_plain(BUDGETS) | {"chatbot+": {"ttft_s": 0.01}}}))
    assert main(["judge", str(kept), "--out", str(again), "--budgets", str(strict)]) == 0
    assert "met 5 of 20" in capsys.readouterr().out
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["describe", "missing.jsonl"], "No such file"),
        (["describe", "bad.jsonl"], "bad.jsonl: no row can be used; line 1"),
        (["judge", "bad.jsonl"], "bad.jsonl: line 1"),
        (["replay", "good.jsonl", "--target", "http://127.0.0.1:9"], "does not answer"),
        (["replay", "good.jsonl", "--target", "https://host"], "not an http:// address"),
        (["replay", "good.jsonl", "--out", "good"], "would write the records over the trace"),
        (["compose", "--scale-tokens", "1/3", "--out", "x.jsonl"], "cannot be cut"),
        (["compose", "--scale-tokens", "1", "--context", "100", "--out", "x.jsonl"], "no session fits 100 tokens"),
        (["compose", "--weka", "bad.jsonl", "--out", "x.jsonl"], "is this weka_requests.csv?"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    arguments: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "good.jsonl").write_text('{"timestamp": 0, "input_length": 3, "output_length": 1}\n')
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert why in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "replay",
        "replay t --headers 2",
        "replay t --speed 0",
        "compose --out x --scale-tokens 2",
        "convert t --out x --load 1001",
    ],
)
def test_misuse_is_exit_code_2(arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())


def test_a_warm_up_is_sent_and_kept_but_judged_apart(url: str, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "r"
    rows = [{"timestamp": at, "input_length": 30, "output_length": 3} for at in (5, 150)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["replay", str(trace), "--target", url, "--out", str(out), "--duration", "0.2", "--warmup"]
    assert main([*command, "0.1"]) == 0
    assert len(records.read(out.with_suffix(".jsonl"))[1]) == 2
    assert json.loads(out.with_suffix(".json").read_text())["offered"] == 1
    assert main([*command, "0.2"]) == 1  # nothing would be left to judge


def test_a_server_is_started_awaited_and_stopped_around_the_replay(tmp_path: Path, free_port: int) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 3, "output_length": 1, "class": "data-processor"}\n')
    serve = serve_command(tmp_path, free_port)
    target = f"http://127.0.0.1:{free_port}"
    command = [
        "replay",
        str(trace),
        "--serve",
        serve,
        "--target",
        target,
        "--duration",
        "0.1",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main(command) == 0
    assert main([*command[:2], *command[4:]]) == 1  # without --serve nobody answers there any more


def test_a_server_that_ends_before_it_is_ready_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 3, "output_length": 1}\n')
    serve = shlex.join([sys.executable, "-c", "raise SystemExit(3)"])
    assert main(["replay", str(trace), "--serve", serve, "--target", "http://127.0.0.1:9"]) == 1
    assert "the server ended with code 3 before it was ready" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named_in_plain_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "/nowhere/run.jsonl"]) == 1
    assert capsys.readouterr().err == "headway-loadgen: /nowhere/run.jsonl: No such file or directory\n"
