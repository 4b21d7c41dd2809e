"""What is compiled ahead is all that a GPU worker launches, and a launch finds it; without Triton: skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SLEEPS = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"


def rehearsed(what: str, cache: Path) -> Any:
    """Kernels can be interpreted or compiled in one process, not both: tests interpret, so this is another one."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.engine.compute.rehearsal", what]
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=600).stdout)


def test_whatever_a_scheduler_asks_for_is_in_the_list(tmp_path: Path) -> None:
    found = rehearsed("listed", tmp_path)

    assert {name: shape["missing"] for name, shape in found.items()} == {name: [] for name in found}
    assert all(shape["launched"] > 25 for shape in found.values())


def test_the_start_of_a_runner_over_real_memory_is_in_the_list(tmp_path: Path) -> None:
    found = rehearsed("served", tmp_path)

    assert found["missing"] == []
    assert found["launched"] > 15


def test_a_launch_finds_what_other_processes_compiled_and_nothing_else(tmp_path: Path) -> None:
    assert rehearsed("compiled", tmp_path)["hits"] == [True, False]


def test_compilers_end_with_the_start_that_began_them(tmp_path: Path) -> None:
    from engine.compute.precompile import running

    pid = tmp_path / "pid"

    def fail() -> None:
        with running([sys.executable, "-c", SLEEPS, str(pid)]):
            until = time.monotonic() + 60
            while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
                time.sleep(0.02)
            raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        fail()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_compilers_that_take_too_long_are_ended_and_the_start_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    from engine.compute.precompile import running

    with running([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        process.wait(0.05)

    assert process.returncode == -signal.SIGKILL
    assert "the start takes longer" in caplog.text
