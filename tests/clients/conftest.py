"""A whole Headway on tiny-agent: keeper, router and one CPU worker, as a person starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients import tiny_agent

START_S = 240.0  # calibration on two busy cores takes some 20


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its base URL."""
    folder = tmp_path_factory.mktemp("clients")
    model, log = tiny_agent.make(folder / "tiny-agent"), folder / "log"
    flags = ["--model", str(model), "--port", "0", "--admin-port", "0", "--workers", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder)}
    with log.open("wb") as file:
        command = [sys.executable, "-m", "router.cli", "serve", *flags]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
    try:
        yield _url(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_S)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """What it prints once it is ready."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"Headway serves \S+ at (\S+)", log.read_text()):
            assert httpx.get(f"{found[1]}/readyz", timeout=START_S).status_code == 200
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"no server: {log.read_text()[-2000:]}")
