"""The command line: what it says, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.cli import main
from router.host.plan import make_plan
from router.settings.config import KV, Config, Workers


def test_help_teaches_by_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])

    assert left.value.code == 0
    assert "headway serve --record run.jsonl" in capsys.readouterr().out


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("headway ")


def test_a_good_configuration_is_called_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "headway.toml"
    path.write_text("[workers]\ncount = 4\n")

    assert main(["check-config", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: good (digest ")


def test_a_bad_configuration_is_explained_and_serves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headway.toml"
    path.write_text("[workers]\ncuont = 4\n")

    codes = (main(["check-config", str(path)]), main(["serve", "--config", str(path)]))

    assert codes == (1, 2)
    line = f"{path}:2: workers.cuont: no such key; did you mean workers.count?\n"
    assert capsys.readouterr().err == line * 2


def test_a_policy_that_is_not_there_is_found_by_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "headway.toml"
    path.write_text('[policy]\nref = "nobody"\n')

    assert main(["check-config", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"{path}:2: policy.ref: no policy is called 'nobody'; there are " in error
    assert "headway, " in error


def test_parameters_that_a_policy_does_not_take_are_found_where_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headway.toml"
    path.write_text('[policy]\nref = "headway"\n\n[policy.params.weights]\nspred = 1\n')

    codes = (main(["check-config", str(path)]), main(["serve", "--config", str(path)]))

    assert codes == (1, 2)
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{path}:4: policy.params: policy 'headway' does not take these parameters: ")
    assert "there is no 'spred'; there are spread, " in errors[0]


def test_the_file_here_is_found_without_being_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "headway.toml").write_text("[workers]\ncount = 0\n")

    assert main(["check-config"]) == 1
    assert "headway.toml:2: workers.count: expected a whole number >= 1, got 0" in capsys.readouterr().err


def test_each_card_gets_one_worker_that_sizes_its_own_memory(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()

    plan = make_plan(Config(workers=Workers(count=5)), {}, tmp_path)

    assert [command[command.index("--device") + 1] for command in plan.workers.values()] == ["cuda:0", "cuda:1"]
    assert "--kv-bytes" not in plan.workers["w0"]
    alone = make_plan(Config(workers=Workers(count=5, device="cpu")), {}, tmp_path)
    assert len(alone.workers) == 5


def test_a_worker_takes_as_many_cards_as_it_spreads_its_model_over(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"nvidia{number}").touch()

    plan = make_plan(Config(workers=Workers(count=5, tensor_parallel=2)), {}, tmp_path)
    devices = [command[command.index("--device") + 1] for command in plan.workers.values()]
    assert devices == ["cuda:0", "cuda:2"]
    assert all(command[command.index("--tensor-parallel") + 1] == "2" for command in plan.workers.values())
    short = make_plan(Config(workers=Workers(count=5, tensor_parallel=8)), {}, tmp_path)
    assert list(short.workers) == ["w0"]  # which ends with a sentence about cards


def test_workers_are_told_of_weights_of_8_bits(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()

    (command,) = make_plan(Config(workers=Workers(weights="fp8")), {}, tmp_path).workers.values()
    (plain,) = make_plan(Config(), {}, tmp_path).workers.values()

    assert command[command.index("--weights") + 1] == "fp8"
    assert "--weights" not in plain


def test_a_worker_on_a_card_is_told_what_its_kv_is(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()

    plain, fp8 = (make_plan(Config(kv=KV(dtype=dtype)), {}, tmp_path).workers["w0"] for dtype in ("bf16", "fp8"))

    assert "--kv-dtype" not in plain
    assert fp8[fp8.index("--kv-dtype") + 1] == "fp8"


def test_children_run_the_same_code_with_their_share_of_threads() -> None:
    plan = make_plan(Config(workers=Workers(count=3, threads=2)), {"PYTHONPATH": "/mine"})

    assert list(plan.workers) == ["w0", "w1", "w2"]
    assert plan.env["OMP_NUM_THREADS"] == "2"
    root, mine = plan.env["PYTHONPATH"].split(":")
    assert (Path(root) / "router" / "cli.py").exists()
    assert mine == "/mine"
