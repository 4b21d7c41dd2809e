"""Real agents against a whole Headway on tiny-agent, two turns each: `make clients`.

Owns how each is installed and started, with homes of their own. Prints what Headway saw of every request."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.clients import tiny_agent

START_S, TURN_S = 120.0, 180.0
OPENCODE = {
    "provider": {
        "headway": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": "@URL@/v1", "apiKey": "none"},
            "models": {"tiny-agent": {"limit": {"context": 131072, "output": 8192}}},
        }
    },
    "model": "headway/tiny-agent",
    "small_model": "headway/tiny-agent",
}
CODEX = """model = "tiny-agent"
model_provider = "headway"
[model_providers.headway]
name = "Headway"
base_url = "@URL@/v1"
wire_api = "responses"
"""


@dataclass(frozen=True, slots=True)
class Agent:
    """One client. `@URL@` and `@BIN@` in its words are filled in."""

    name: str
    install: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...] = ()  # empty: it has no second turn without a terminal
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # below HOME or, from `work/` on, where it runs


def npm(package: str) -> tuple[str, ...]:
    return ("npm", "install", "--no-audit", "--no-fund", "--prefix", "@BIN@", package)


NODE = "@BIN@/node_modules/.bin/"
EXEC = (NODE + "codex", "exec")
CODEX_FLAGS = ("--skip-git-repo-check",)
AIDER = "--model openai/tiny-agent --no-git --yes --no-show-model-warnings --no-check-update --analytics-disable"
AIDER += " --chat-history-file .chat --input-history-file .input"  # else it writes beside the .git above
AGENTS = (
    Agent(
        "claude-code",
        npm("@anthropic-ai/claude-code"),
        (NODE + "claude", "-p", "Say hello"),
        (NODE + "claude", "--continue", "-p", "And again"),
        {"ANTHROPIC_BASE_URL": "@URL@", "ANTHROPIC_API_KEY": "none", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"},
    ),
    Agent(
        "codex",
        npm("@openai/codex"),
        (*EXEC, *CODEX_FLAGS, "Say hello"),
        (*EXEC, "resume", "--last", *CODEX_FLAGS, "And again"),
        files={".codex/config.toml": CODEX},
    ),
    Agent(
        "opencode",
        npm("opencode-ai"),
        (NODE + "opencode", "run", "Say hello"),
        (NODE + "opencode", "run", "--continue", "And again"),
        files={"work/opencode.json": json.dumps(OPENCODE)},
    ),
    Agent(
        "aider",
        (sys.executable, "-m", "pip", "install", "-q", "--target", "@BIN@/aider", "aider-chat"),
        (sys.executable, "-m", "aider", *AIDER.split(), "--message", "Say hello"),
        env={"OPENAI_API_BASE": "@URL@/v1", "OPENAI_API_KEY": "none", "PYTHONPATH": "@BIN@/aider"},
    ),
)


class Bench:
    """A running Headway and a folder for the clients."""

    def __init__(self, folder: Path, url: str, admin: str) -> None:
        self._folder, self._url, self._admin = folder, url, admin

    def run(self, agent: Agent) -> bool:
        """Install, two turns, and a line a request. Returns whether both turns came back."""
        home, bins = self._folder / "homes" / agent.name, self._folder / "bin"
        shutil.rmtree(home, ignore_errors=True)
        (home / "work").mkdir(parents=True)
        bins.mkdir(exist_ok=True)
        for name, text in agent.files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text.replace("@URL@", self._url))
        # opencode believes PWD, not where it is started.
        env = (
            os.environ
            | {"HOME": str(home), "PWD": str(home / "work")}
            | {name: self._filled(text) for name, text in agent.env.items()}
        )
        if subprocess.run(self._words(agent.install), capture_output=True, text=True, check=False).returncode:
            print(f"{agent.name}: could not be installed here")
            return False
        return all(self._turn(agent, words, home / "work", env) for words in (agent.first, agent.second) if words)

    def _turn(self, agent: Agent, words: tuple[str, ...], folder: Path, env: dict[str, str]) -> bool:
        before = {receipt["request"] for receipt in self._receipts()}
        ran = subprocess.run(
            self._words(words),
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TURN_S,
            check=False,
        )
        has_answered = tiny_agent.SENTENCE in ran.stdout + ran.stderr
        print(f"{agent.name}: {'answered' if has_answered else 'NO ANSWER'}, exit {ran.returncode}")
        if not has_answered:
            print((ran.stdout + ran.stderr)[-1000:])
        for receipt in reversed(self._receipts()):
            if receipt["request"] not in before:
                fields = ("request_class", "class_reason", "outcome", "prompt_tokens", "cached_tokens", "lost_tokens")
                print("   ", ", ".join(f"{name} {receipt[name]}" for name in fields))
        return has_answered

    def _receipts(self) -> list[dict[str, object]]:
        receipts: list[dict[str, object]] = httpx.get(f"{self._admin}/receipts").json()
        return receipts

    def _filled(self, text: str) -> str:
        return text.replace("@URL@", self._url).replace("@BIN@", str(self._folder / "bin"))

    def _words(self, words: tuple[str, ...]) -> list[str]:
        return [self._filled(word) for word in words]


def main(names: list[str]) -> int:
    """All agents, or those named."""
    folder = Path("out/clients").resolve()
    model = tiny_agent.make(folder / "tiny-agent")
    command = [sys.executable, "-m", "router.cli", "serve", "--model", str(model), "--workers", "1"]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--port", "0", "--admin-port", "0"], stdout=file, stderr=file)
    try:
        url, admin = _urls(process, log)
        bench = Bench(folder, url, admin)
        chosen = [agent for agent in AGENTS if not names or agent.name in names]
        have_answered = [bench.run(agent) for agent in chosen]  # each is run, whatever became of those before
        return 0 if all(have_answered) else 1
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _urls(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"Headway serves \S+ at (\S+) .*?(http://[^/]+)/", log.read_text()):
            return found[1], found[2]
        time.sleep(0.1)
    raise SystemExit(f"no server: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
