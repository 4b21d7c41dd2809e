"""The run folder: private to one keeper, gone when it ends, and swept up by the next one if it was killed.

Owns the folder and the lock that says its keeper lives. Standard library only; never touches what is not its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "headway-"
LOCK = "keeper.lock"  # locked as long as the keeper lives, however it ends


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """0700, gone at the end. Short on purpose: a Unix socket's path holds 104 bytes on macOS."""
    base = _base()
    sweep(base)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    try:
        with _locked(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sweep(base: Path) -> None:
    """Remove what keepers of this user left that were killed. One without a lock is somebody else's, or just begins."""
    for path in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # gone, not ours to open, or its keeper lives
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                with (path / LOCK).open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locked before it has its name: nobody finds it open."""
    unnamed = path / f"{LOCK}.new"
    with unnamed.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(path / LOCK)
        yield


def _base() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(base if os.access(base, os.W_OK) else "/tmp")
