"""What is compiled ahead is all that a GPU worker launches, and a launch finds it; without Triton: skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


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


def test_kernels_are_compiled_while_others_are_still_found() -> None:
    from engine.compute import precompile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompile, "seconds", len)  # forked processes have it too

        assert precompile.compile_found(lambda tell: [tell("abc"), tell("de")], 2) == [3, 2]  # type: ignore[func-returns-value, arg-type]


def test_a_launcher_is_made_with_the_kernel_where_each_signature_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.compute import precompile

    made: list[Any] = []

    def launcher(source: str, metadata: str) -> None:
        made.append((source, metadata))
        if source == "no compiler":
            raise RuntimeError("failed to find a C compiler")

    monkeypatch.setattr(precompile.nvidia, "CudaLauncher", launcher)
    monkeypatch.setattr(precompile.nvidia, "make_launcher", None, raising=False)  # as in Triton 3.6
    precompile.bind(SimpleNamespace(src="source", metadata="metadata"))
    precompile.bind(SimpleNamespace(src="no compiler", metadata=""))  # a launch will say it
    assert made == [("source", "metadata"), ("no compiler", "")]

    monkeypatch.delattr(precompile.nvidia, "make_launcher")
    precompile.bind(SimpleNamespace(src="source", metadata="metadata"))
    assert len(made) == 2
