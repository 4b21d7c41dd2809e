"""The examples of `headway --help` work as pasted: what serves serves, and a recording can be asked afterwards."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from router import cli as headway_cli
from tests.router.host.test_keeper import DEADLINE_S, until
from tests.test_commands import PARSERS, ROOT, taught

BANNER_END = "Ctrl-C drains and stops."

# The examples of `headway`, as pasted: but for the ports, and for a model that makes up its tokens. That `--upstream`
# serves is proved in tests/router/upstreams/test_serve.py.
SERVING = [line for line in taught(PARSERS["headway"]) if line.startswith("headway serve") and "--upstream" not in line]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples name."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for key, value in (("SERVER_PORT", "0"), ("SERVER_ADMIN_PORT", "0"), ("WORKERS_DEVICE", "fake")):
        monkeypatch.setenv(f"HEADWAY_{key}", value)
    (tmp_path / "headway.toml").write_text("version = 1\n[workers]\ncount = 1\n")
    return tmp_path


def serve(line: str, folder: Path) -> str:
    """Run one until it is ready, ask it once, stop it with Ctrl-C; the request's name."""
    printed = folder / "printed"
    command = [sys.executable, "-m", "router.cli", *shlex.split(line.replace("--port 9000", "--port 0"))[1:]]
    with (
        printed.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True) as keeper,
    ):
        try:
            until(lambda: BANNER_END in printed.read_text() or keeper.poll() is not None, f"{line} is ready")
            text = printed.read_text()
            url, body = re.search(r"http://127\.0\.0\.1:\d+", text), re.search(r"-d '(.*)'", text)
            assert url, text
            assert body
            asked = json.loads(body[1]) | {"max_tokens": 2}
            answer = httpx.post(f"{url[0]}/v1/chat/completions", json=asked, timeout=DEADLINE_S)
            assert answer.status_code == 200, answer.text
            keeper.send_signal(signal.SIGINT)
            assert keeper.wait(DEADLINE_S) == 0
        finally:
            if keeper.poll() is None:
                os.killpg(keeper.pid, signal.SIGKILL)
    return answer.headers["x-headway-request"]


@pytest.mark.model
@pytest.mark.parametrize("line", SERVING)
def test_a_served_example_serves_and_what_follows_it_works(
    line: str, here: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "model.gguf").symlink_to(model_folder)  # converted already: a folder is taken as a file is
    request = serve(line, here)
    if "--record" in line:
        assert headway_cli.main(["replay-events", "run.jsonl"]) == 0
        assert headway_cli.main(["explain-class", "run.jsonl", request[:12]]) == 0
        assert "one-shot-job" in capsys.readouterr().out


def test_the_examples_about_keys_and_files_do_as_they_say(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del here
    lines = [line for line in taught(PARSERS["headway"]) if line.split()[1] in ("keys", "check-config")]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line)[1:]
        if "revoke" in words:  # a key has its own name
            headway_cli.main(["keys", "list"])
            words[-1] = re.findall(r"^\S* *([0-9a-f]{6,})\b", capsys.readouterr().out, re.MULTILINE)[0]
        assert headway_cli.main(words) == 0, line
