"""What was timed on a card is what a plan may be made for: a new file of samples is a new name of `--hardware`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadgen.cli import main
from loadgen.sim import hardware
from loadgen.sim.profiles import H100_8B, H100_8B_OWN
from policies.costs import StepFeatures
from tests.loadgen.sim.test_profiles import samples


def write(folder: Path, device: str, *, model: str = "llama-8b", **told: int) -> Path:
    path = folder / f"step_samples-{model}-{len(list(folder.iterdir()))}.jsonl"
    lines = [
        json.dumps([one["rows"], one["decode_context"], one["chunk_context"], one["sequences"], one["seconds"]])
        for one in samples()
    ]
    path.write_text("\n".join([json.dumps({"device": device, "model": model, **told}), *lines]) + "\n")
    return path


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_card_is_called_by_the_word_that_tells_it_from_others(device: str, card: str) -> None:
    assert hardware.card_of(device) == card


def test_the_checkouts_own_file_is_the_built_in_pair() -> None:
    assert hardware.load("h100", "llama-8b") is H100_8B_OWN
    assert hardware.BUILT_IN.keys() <= {
        (hardware.card_of(head["device"]), head["model"])
        for head in (json.loads(path.read_text().splitlines()[0]) for path in hardware.RESULTS.glob(hardware.PATTERN))
    }


def test_a_new_file_is_a_new_card_with_its_own_step_times_and_memory(tmp_path: Path) -> None:
    write(tmp_path, "NVIDIA H200", kv_blocks=13_000, context_max=131_072)
    found = hardware.load("h200", "llama-8b", tmp_path)
    step = StepFeatures(1500, 20_000, 1_400_000, 20)
    assert found.model.step_s(step) == pytest.approx(H100_8B.model.step_s(step), rel=0.05)
    assert found.sigma == pytest.approx(0.03, rel=0.4)
    assert (found.name, found.blocks_total, found.context_max) == ("llama-8b-h200", 13_000, 131_072)
    assert "on one NVIDIA H200, fitted to 400 timed steps" in found.source


def test_a_file_that_tells_no_memory_has_that_of_a_known_card_and_no_other(tmp_path: Path) -> None:
    old = hardware.read(write(tmp_path, "NVIDIA H100 80GB HBM3"))
    assert old.blocks_total == pytest.approx(H100_8B_OWN.blocks_total, rel=0.005)
    assert hardware.read(write(tmp_path, "NVIDIA H200")).blocks_total > 1.9 * old.blocks_total
    with pytest.raises(ValueError, match="the memory of 'NVIDIA X1' is not known"):
        hardware.read(write(tmp_path, "NVIDIA X1"))
    with pytest.raises(ValueError, match="tiny is not known"):
        hardware.read(write(tmp_path, "NVIDIA H200", model="tiny"))


def test_a_card_that_nobody_timed_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    write(tmp_path, "NVIDIA H200")
    with pytest.raises(
        ValueError, match="no step times of b200 with llama-8b: there are h100 with llama-8b, h200 with"
    ):
        hardware.load("b200", "llama-8b", tmp_path)


def test_a_plan_takes_the_new_card_and_a_file_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "NVIDIA H200")
    monkeypatch.setattr("loadgen.sim.hardware.RESULTS", tmp_path)
    trace = tmp_path / "t.jsonl"
    rows = [{"timestamp": at, "input_length": 900, "output_length": 9} for at in (0, 9000)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for named in (["--hardware", "h200"], ["--profile", str(path)]):
        assert main(["plan", str(trace), *named, "--closed-form"]) == 0
        assert "NVIDIA H200, fitted to 400 timed steps" in capsys.readouterr().out
    assert main(["plan", str(trace), "--hardware", "b200", "--closed-form"]) == 1
    assert "there are h100 with llama-8b, h200" in capsys.readouterr().err
