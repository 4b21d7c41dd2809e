"""The run folder: one keeper's own, and what a killed one left is swept up by the next, nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from router.host.run_folder import LOCK, run_folder

HOLD = """
import signal
from router.host.run_folder import run_folder
with run_folder() as path:
    print(path, flush=True)
    signal.pause()
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_what_a_killed_keeper_left_is_swept_up_by_the_next(base: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        left = Path(keeper.stdout.readline().strip())
        (left / "w0.sock").touch()
        with run_folder():
            assert left.exists()  # its keeper lives
        keeper.send_signal(signal.SIGKILL)
    assert left.exists()

    with run_folder() as path:
        assert [found.name for found in base.iterdir()] == [path.name]

    assert list(base.iterdir()) == []


def test_what_is_not_a_keepers_is_left_alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / LOCK).touch()
    (base / "headway-link").symlink_to(elsewhere)  # where it leads is nobody's to remove
    (base / "headway-begins").mkdir()  # a keeper that has not locked it yet
    (base / "headway-notes").touch()

    with run_folder():
        pass

    assert {found.name for found in base.iterdir()} == {"headway-link", "headway-begins", "headway-notes"}
    assert (elsewhere / LOCK).exists()


def test_nobody_else_may_look_into_it(base: Path) -> None:
    with run_folder() as path:
        assert path.parent == base
        assert path.stat().st_mode & 0o777 == 0o700
