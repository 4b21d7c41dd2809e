"""docs/clients.md shows what `make clients` runs: the same variables, the same settings, the same words."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.clients.agents import AGENTS, CODEX, LLM, MODEL, OPENCODE, Agent

URL = "http://127.0.0.1:8080"
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
BY_NAME = {agent.name: agent for agent in AGENTS}
NUMBERS = {"@CONTEXT@": "131072", "@COMPACT@": "110000"}


def as_shown(text: str) -> str:
    """A setting of `make clients` with the page's address and model."""
    for place, number in NUMBERS.items():
        text = text.replace(place, number)
    return re.sub(rf"\b{MODEL}\b", "MODEL", text.replace("@URL@", URL))


def block(begins: str) -> str:
    """The code block with this in it."""
    return next(found for found in re.findall(r"```[a-z]*\n(.*?)```", PAGE, re.DOTALL) if begins in found)


def test_files_of_settings_are_the_pages_own() -> None:
    assert tomllib.loads(block("model_provider")) == tomllib.loads(as_shown(CODEX))
    shown: Any = json.loads(block("openai-compatible"))
    assert shown == json.loads(as_shown(json.dumps(OPENCODE)))
    assert as_shown(LLM).strip() in block("model_id")


@pytest.mark.parametrize(
    ("name", "program", "words"),
    [
        ("claude-code", "claude", []),
        ("aider", "aider", ["--model", "openai/MODEL"]),
        ("mini-swe-agent", "mini", ["-m", "openai/MODEL", "-t", "..."]),
    ],
)
def test_one_liners_set_what_was_set_and_say_what_was_said(name: str, program: str, words: list[str]) -> None:
    agent = BY_NAME[name]
    said = next(found for line in PAGE.splitlines() if (found := variables(line, program)) is not None)
    variables_shown, words_shown = said
    assert words_shown == words
    assert set(variables_shown.items()) <= {(key, as_shown(value)) for key, value in agent.env.items()}
    assert {key for key in agent.env if key.endswith(("BASE", "BASE_URL", "API_KEY"))} <= set(variables_shown)
    assert [word for word in words if word != "..."] == [word for word in words if word in spoken(agent)]


def spoken(agent: Agent) -> list[str]:
    return [as_shown(word) for word in agent.asks]


def variables(line: str, program: str) -> tuple[dict[str, str], list[str]] | None:
    """Variables and words of a line that runs this program."""
    if program not in line.split() or not re.match("[A-Z_]+=", line):
        return None
    said = shlex.split(line)
    at = said.index(program)
    return dict(word.split("=", 1) for word in said[:at]), said[at + 1 :]
