"""Where public traces lie, for the tests that need real input; elsewhere those are skipped, with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def shared_trace(name: str) -> Path:
    """A file of the traces folder: $HEADWAY_SHARED/traces, or ../shared/traces beside the repository."""
    places = [Path(os.environ["HEADWAY_SHARED"])] if "HEADWAY_SHARED" in os.environ else [ROOT.parent / "shared"]
    path = places[0] / "traces" / name
    if not path.is_file():
        pytest.skip(f"{name} is not at {path.parent}: set HEADWAY_SHARED to the folder that holds traces/")
    return path
