"""The side-by-side benchmark of engines on a card: it goes on where its time was up, and every engine gets the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_engine
from bench.gpu_work import Item

FLAGS = ["--engines", "ours,theirs", "--batches", "1,4", "--ttft", "32", "--work", "share8x32", "--repeats", "2"]


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """An engine that takes a millisecond a token and remembers what it was asked."""

    def __init__(self, clock: Clock, asked: list[list[Item]], start_s: float) -> None:
        self._clock, self._asked = clock, asked
        clock.now += start_s
        self.is_open = True

    def generate(self, items: list[Item]) -> list[int]:
        assert self.is_open
        self._asked.append(items)
        self._clock.now += 0.001 * sum(len(item.prompt) / 100 + item.out for item in items)
        return [item.out for item in items]

    def close(self) -> None:
        self.is_open = False


class Bench:
    """The program over two fakes on one clock."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.out = Clock(), out
        self.asked: dict[str, list[list[Item]]] = {"ours": [], "theirs": []}
        self.made: list[Fake] = []
        monkeypatch.setattr(gpu_engine.time, "monotonic", self.clock)
        monkeypatch.setattr(gpu_engine.time, "perf_counter", self.clock)

    def run(self, *more: str, device: str = "card") -> int:
        def adapter(name: str, start_s: float) -> Any:
            def make(_model: Path, _log: Path) -> Fake:
                self.made.append(Fake(self.clock, self.asked[name], start_s))
                return self.made[-1]

            return make

        adapters = {"ours": adapter("ours", 20.0), "theirs": adapter("theirs", 100.0)}
        return gpu_engine.main(["shapes/8b", *FLAGS, "--out", str(self.out), *more], adapters, lambda: device)

    def kept(self, name: str, device: str = "card") -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / f"gpu_engine-8b-{name}-{device}.json").read_text())
        return content


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_both_engines_get_the_same_tokens_and_the_table_comes_last(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run("--minutes", "60") == 0

    assert bench.asked["ours"] == bench.asked["theirs"]
    prompts = [tuple(items[0].prompt) for items in bench.asked["ours"]]
    assert len(set(prompts)) == len(prompts) - 2 * 2  # only a first token's prompt is asked again, twice a repeat
    ours = bench.kept("ours")
    assert ours["TPOT batch 4, ms"] == {"median": 4.0, "all": [4.0, 4.0]}
    assert ours["start to first token, s"]["all"] == [20.0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "complete"
    assert "| TPOT batch 1, ms | 1.0 (1.0-1.0, 2x) | 1.0 (1.0-1.0, 2x) | 1.00x |" in lines[-20:]
    assert "| start to first token, s | 20.0 (20.0-20.0, 1x) | 100.0 (100.0-100.0, 1x) | 5.00x |" in lines[-20:]
    assert not any(engine.is_open for engine in bench.made)


def test_where_the_time_is_up_the_same_command_goes_on(bench: Bench) -> None:
    codes = []
    while not codes or codes[-1] == gpu_engine.GO_ON:
        codes.append(bench.run("--minutes", "3"))
        assert len(codes) < 10

    assert len(codes) > 1
    assert codes[-1] == 0
    for name in ("ours", "theirs"):
        kept = bench.kept(name)
        figures = {figure: value["all"] for figure, value in kept.items() if "all" in value}
        assert {len(values) for figure, values in figures.items() if "start" not in figure} == {2}
        assert len(figures["start to first token, s"]) == 1
    starts = len(bench.made)
    assert bench.run("--minutes", "3") == 0
    assert len(bench.made) == starts  # nothing is missing: no engine is started


def test_figures_of_another_card_are_not_mixed_in(bench: Bench) -> None:
    bench.run("--minutes", "60")

    assert bench.run("--minutes", "60", "--repeats", "1", device="another") == 0

    assert bench.kept("ours", "another")["device"] == "another"
    assert len(bench.kept("ours", "another")["TPOT batch 1, ms"]["all"]) == 1
    assert len(bench.kept("ours")["TPOT batch 1, ms"]["all"]) == 2  # and those of the first card stay


def test_a_row_says_how_many_times_faster_ours_is() -> None:
    ours, theirs = {"median": 5.0}, {"median": 6.0}

    assert gpu_engine.faster("TPOT batch 1, ms", ours, theirs) == "1.20x"
    assert gpu_engine.faster("nano256, tok/s", ours, theirs) == "0.83x"
    assert gpu_engine.faster("nano256, tok/s", ours, None) == "-"


def test_an_engine_that_gives_too_little_ends_the_run_and_is_closed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "generate", lambda _self, items: [0 for _ in items])

    with pytest.raises(RuntimeError, match="shorter than asked"):
        bench.run("--minutes", "60")

    assert not bench.made[0].is_open
