"""The embedded model's folder: fake workers need none, but the router's text does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder() -> Path:
    command = [sys.executable, "-m", "engine", "convert", "smollm2"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return Path(made.stdout.split("\n")[-2])
