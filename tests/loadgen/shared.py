"""Where public traces lie, for the tests that need real input; elsewhere those are skipped, with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def shared_folder(name: str) -> Path:
    """A folder of what is not part of the repository: $HEADWAY_SHARED/NAME, or ../shared/NAME beside it."""
    path = Path(os.environ.get("HEADWAY_SHARED", ROOT.parent / "shared")) / name
    if not path.is_dir():
        pytest.skip(f"there is no {path}: set HEADWAY_SHARED to the folder that holds {name}/")
    return path


def shared_trace(name: str) -> Path:
    """A file of the traces folder."""
    path = shared_folder("traces") / name
    if not path.is_file():
        pytest.skip(f"{name} is not at {path.parent}: set HEADWAY_SHARED to the folder that holds traces/")
    return path
