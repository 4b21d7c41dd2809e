"""Every command that a page or a help text shows exists, and its options are options that it has."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from loadgen import cli as loadgen_cli
from router import cli as headway_cli

ROOT = Path(__file__).resolve().parent.parent
WHAT_WAS = ("LOG.md", "CHANGELOG.md", "decisions.md", "map.md")  # or, the last, what others say
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if page.name not in WHAT_WAS)
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(\$ )?(headway|headway-loadgen|make|python3? -m) ")
PARSERS = {"headway": headway_cli._parser(), "headway-loadgen": loadgen_cli.parser()}


def shown(page: Path) -> list[str]:
    """The commands in a page's blocks."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if COMMAND.match(line)]


def mentioned(page: Path) -> list[str]:
    """Those that stand in its sentences, often cut short: their program and first word."""
    found = re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text(encoding="utf-8")))
    return [" ".join(line.split()[: 3 if "-m" in line.split() else 2]) for line in found if COMMAND.match(line)]


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """By name."""
    return next(dict(one.choices) for one in parser._actions if isinstance(one, argparse._SubParsersAction))


def taught(parser: argparse.ArgumentParser) -> list[str]:
    """The examples of all help texts; what they say follows behind two spaces, and is no part of them."""
    found = [parser, *commands_of(parser).values()]
    lines = [line.strip() for one in found for line in (one.epilog or "").splitlines()]
    examples = [re.split(r" {2,}", line)[0] for line in lines if line.startswith(f"{parser.prog} ")]
    return list(dict.fromkeys(examples))


SHOWN = [(page.name, line) for page in PAGES for line in shown(page)]
SHOWN += [("--help", line) for parser in PARSERS.values() for line in taught(parser) if "COMMAND" not in line]
MENTIONED = [(page.name, line) for page in PAGES for line in mentioned(page) if "COMMAND" not in line]


def test_the_pages_show_commands_at_all() -> None:
    assert {"README.md", "CONTRIBUTING.md", "policies.md", "--help"} <= {page for page, _ in SHOWN}
    assert len(SHOWN) > 40
    assert len(MENTIONED) > 20


@pytest.mark.parametrize(("page", "line"), dict.fromkeys(SHOWN))
def test_a_command_that_is_shown_takes_these_options(page: str, line: str) -> None:
    del page  # it is in the test's name
    program, *words = shlex.split(line, comments=True)
    if program in PARSERS:
        assert PARSERS[program].parse_args(words).run
    else:
        exists(program, words)


@pytest.mark.parametrize(("page", "line"), dict.fromkeys(MENTIONED))
def test_a_command_that_is_mentioned_exists(page: str, line: str) -> None:
    del page
    program, *words = line.split()
    if program in PARSERS:
        assert words[0] in ("--help", *commands_of(PARSERS[program]))
    else:
        exists(program, words)


def exists(program: str, words: list[str]) -> None:
    """A target of make, or a module that can be run."""
    if program == "make":
        made = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(made)
    else:
        assert importlib.util.find_spec(words[1]) is not None
