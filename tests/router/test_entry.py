"""The beginning of `headway`: a package of another that hides one of ours is named, before anything of it is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = [sys.executable, "-P", "-c", "import sys; from router.entry import main; sys.exit(main())"]


def headway(*arguments: str, paths: list[Path]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run([*START, *arguments], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("name", ["policies", "engine", "loadgen"])
def test_a_package_that_hides_ours_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemExit('it was run')")

    ended = headway("check-config", paths=[tmp_path, ROOT])

    assert ended.returncode == 2
    assert f"the package '{name}' at {tmp_path / name} is not Headway's, which is at {ROOT / name}" in ended.stderr
    assert "an environment of its own" in ended.stderr


def test_alone_it_is_the_command_line() -> None:
    ended = headway("--version", paths=[ROOT])

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("headway ")


def test_the_script_begins_there() -> None:
    assert 'headway = "router.entry:main"' in (ROOT / "pyproject.toml").read_text()
