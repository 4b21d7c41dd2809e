"""Compilers beside a start: begun once for what is wanted, ended with it; a card is guessed before torch is there."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.compute.compilers import Compilers, Wanted, compilers, seen

SLEEPS = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
H100 = Wanted(Path("models/8b"), "NVIDIA H100", 90, 64, 256)


class Sleeping(Wanted):
    """Whose compiler writes its process id and sleeps."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", SLEEPS, str(self.folder)]


def pid_in(path: Path) -> int:
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    return int(path.read_text())


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_command_says_all_that_is_wanted() -> None:
    assert H100.command[1:] == [
        "-m", "engine.compute.precompile", "models/8b", "NVIDIA H100", "--capability", "90", "--block-tokens", "64",
        "--sequences-max", "256", "--ranks", "1", "--weights", "bf16", "--kv-dtype", "bf16",
    ]  # fmt: skip


def test_compilers_end_with_the_start_that_began_them(tmp_path: Path) -> None:
    seen_pid = []

    def fail() -> None:
        with compilers() as compiling:
            compiling.begin(Sleeping(tmp_path / "pid", "card", 90, 64, 256))
            seen_pid.append(pid_in(tmp_path / "pid"))
            raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        fail()
    assert is_gone(seen_pid[0])


def test_what_was_begun_early_goes_on_and_another_card_begins_anew(tmp_path: Path) -> None:
    early, other = (Sleeping(tmp_path / name, name, 90, 64, 256) for name in ("early", "other"))
    with compilers() as compiling:
        compiling.begin(early)
        pid = pid_in(tmp_path / "early")
        compiling.begin(early)
        assert not is_gone(pid)
        compiling.begin(other)
        assert is_gone(pid)
        assert not is_gone(pid_in(tmp_path / "other"))


def test_compilers_that_take_too_long_are_ended_and_the_start_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiling = Compilers()
    compiling.begin(Sleeping(tmp_path / "pid", "card", 90, 64, 256))
    pid = pid_in(tmp_path / "pid")
    compiling.wait(0.05)

    assert is_gone(pid)
    assert "the start takes longer" in caplog.text
    compiling.wait()  # nothing is left to wait for


class NVMLError(Exception):
    """As NVML's Python names it."""


def nvml(*names: str) -> SimpleNamespace:
    def by_index(number: int) -> str:
        if number >= len(names):
            raise NVMLError("no such card")
        return names[number]

    return SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"card {uuid}", nvmlDeviceGetName=str,
        nvmlDeviceGetCudaComputeCapability=lambda _: (9, 0),
    )  # fmt: skip


def test_a_card_is_seen_as_torch_will_number_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards = nvml("NVIDIA H100", "NVIDIA H200")
    assert seen("auto", cards) == seen("cuda", cards) == ("NVIDIA H100", 90)
    assert seen("cuda:1", cards) == ("NVIDIA H200", 90)
    assert seen("cuda:2", cards) is None

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-12")
    assert seen("cuda:0", cards) == ("NVIDIA H200", 90)
    assert seen("cuda:1", cards) == ("card GPU-12", 90)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert seen("cuda:0", cards) is None


def test_no_driver_is_no_card() -> None:
    def fails() -> None:
        raise NVMLError("no driver")

    assert seen("auto", SimpleNamespace(nvmlInit=fails)) is None
