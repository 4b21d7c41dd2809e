"""The command: two policies side by side, reports that repeat, words for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadgen import traces
from loadgen.cli import main
from tests.loadgen.sim.small import mix


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "mix.jsonl"
    traces.write(mix(duration_s=10.0, load=1.0), path)
    return path


def test_it_judges_each_policy_and_repeats_its_reports(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", str(trace), "--workers", "2", "--policy", "headway,round_robin", "--oracle"]
    for name in ("one", "two"):
        assert main([*words, "--out", str(trace.parent / name)]) == 0
    printed = capsys.readouterr().out
    assert "simulated, not validated" in printed
    assert "round_robin" in printed.rpartition("simulated, not validated")[2]
    for policy in ("headway", "round_robin"):
        for suffix in (".json", ".jsonl", ".html"):
            one, two = (trace.parent / f"{name}-{policy}{suffix}" for name in ("one", "two"))
            assert one.read_bytes() == two.read_bytes()


def test_a_scripted_failure_is_shown_where_it_happened(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trace.parent / "loss"
    assert main(["simulate", str(trace), "--fail", "kill:w1@5:2", "--fail", "stall:w0@3:1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    told = [line for line in said.splitlines() if line.endswith(("script", "again"))]
    assert told == [
        "at 3 s: worker w0 stalls for 1 s, by the script",
        "at 5 s: worker w1 killed, by the script",
        "at 7 s: worker w1 up again",
    ]
    assert 'class="event"' in (trace.parent / "loss-headway.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "257"], "from 1 to 256"),
        (["--policy", "nobody"], "nobody"),
        (["--engine", "nothing"], "nothing"),
        (["--profile", "nowhere"], "8b-h100"),
        (["--fail", "kill:w9@1:1"], "w9"),
        (["--fail", "burn:w0@1:1"], "kill:w1@120:30"),
    ],
)
def test_a_mistake_is_told(trace: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace), "--workers", "1", *words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--workers", "0"], ["--load", "0"], ["--headers", "2"], ["--grace", "-1"]])
def test_a_number_out_of_range_is_misuse(trace: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["simulate", str(trace), *words])
    assert f"argument {words[0]}: " in capsys.readouterr().err
