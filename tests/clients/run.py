"""`make clients`: real agents against a router and the actor: two turns, a tool of theirs, and a context that is full.

Owns the acts and what counts as played. Prints what Headway saw of every request."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from router.settings.config import Config, Model
from tests.clients import tiny_agent
from tests.clients.actor import FILL, PROOF, RUN
from tests.clients.agents import AGENTS, MODEL, Agent
from tests.clients.screen import Screen
from tests.clients.tiny_agent import SENTENCE
from tests.faults.house import House, house

TURN_S = 180.0
CONTEXT = 131_072
ROOM = 15_000  # beyond an agent's first prompt: its first tool result fits, its second does not (9,000 tokens each)
HELLO, AGAIN = "Say hello", "And again"
FIELDS = ("request_class", "class_reason", "outcome", "prompt_tokens", "cached_tokens", "lost_tokens")


@asynccontextmanager
async def stage(folder: Path, context: int) -> AsyncIterator[House]:
    """A router and the actor with so much context."""
    model = folder.parent / "tiny-agent"
    _empty(folder)
    config = Config(model=Model(served_as=MODEL))
    engine = ("tests.clients.actor",)
    async with house(folder, model, config, ("w0",), engine, tokenizer=model, context=context) as built:
        yield built


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class Play:
    """One agent in a house, with a home of its own."""

    def __init__(self, agent: Agent, house: House, folder: Path, context: int) -> None:
        self._agent, self._house, self._context = agent, house, context
        self._home, self._bins = folder / "homes" / agent.name, folder / "bin"
        self._seen: set[str] = set()

    async def begin(self) -> bool:
        """An empty home, and the agent. Returns whether it can be had."""
        shutil.rmtree(self._home, ignore_errors=True)
        _empty(self._home / "work")
        self._bins.mkdir(exist_ok=True)
        for name, text in self._agent.files.items():
            (self._home / name).parent.mkdir(parents=True, exist_ok=True)
            (self._home / name).write_text(self._filled(text))
        mark = self._bins / f".{self._agent.name}"  # it is here: remove it for the newest one
        if mark.exists():
            return True
        installing = await asyncio.create_subprocess_exec(
            *self._words(self._agent.install), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if await installing.wait():
            return False
        mark.touch()
        return True

    async def turn(self, words: tuple[str, ...], say: str, expected: str) -> bool:
        """One message. Returns whether what was expected came back."""
        process = await asyncio.create_subprocess_exec(
            *self._words(words, say),
            cwd=self._home / "work",
            env=self._env(),
            stdin=subprocess.DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(TURN_S):
                printed = (await process.communicate())[0].decode(errors="replace")
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            printed = f"nothing in {TURN_S} s"
        return self._told(say, expected in printed, printed)

    async def at_the_screen(self) -> bool:
        """Two turns and its tool, typed into a terminal."""
        async with Screen(self._words(self._agent.screen), self._home / "work", self._env()) as screen:
            have_come = []
            for say, expected in ((HELLO, SENTENCE), (AGAIN, SENTENCE), (RUN, f"{SENTENCE} {PROOF}")):
                shown = await screen.say(say, expected)
                have_come.append(self._told(say, expected in shown, shown))
        return all(have_come)

    def _told(self, say: str, has_come: bool, printed: str) -> bool:
        print(f"{self._agent.name}: {say}: {'answered' if has_come else 'NOT AS EXPECTED'}")
        if not has_come:
            print(printed[-1000:])
        return has_come

    async def receipts(self) -> list[dict[str, Any]]:
        """What came since this was asked last; printed, too."""
        every = (await self._house.admin.get("/receipts")).json()
        fresh = [receipt for receipt in reversed(every) if receipt["request"] not in self._seen]
        self._seen |= {receipt["request"] for receipt in fresh}
        for receipt in fresh:
            print("   ", ", ".join(f"{name} {receipt[name]}" for name in FIELDS), receipt["reason"])
        return fresh

    def _env(self) -> dict[str, str]:
        # opencode believes PWD, not where it is started.
        own = {name: self._filled(text) for name, text in self._agent.env.items()}
        return os.environ | {"HOME": str(self._home), "PWD": str(self._home / "work")} | own

    def _filled(self, text: str) -> str:
        url = str(self._house.client.base_url).rstrip("/")
        places = {"@URL@": url, "@BIN@": str(self._bins), "@HOME@": str(self._home)}
        places |= {"@CONTEXT@": str(self._context), "@COMPACT@": str(self._context * 6 // 10)}
        for place, value in places.items():
            text = text.replace(place, value)
        return text

    def _words(self, words: tuple[str, ...], say: str = "") -> list[str]:
        return [self._filled(word).replace("@SAY@", say) for word in words]


async def conversation(agent: Agent, folder: Path) -> int:
    """Two turns and a tool. Returns the tokens of its first prompt; 0 when it did not play its part."""
    async with stage(folder / "run", CONTEXT) as built:
        play = Play(agent, built, folder, CONTEXT)
        if not await play.begin():
            print(f"{agent.name}: could not be installed here")
            return 0
        if agent.screen:
            has_played = await play.at_the_screen()
            seen = await play.receipts()
        else:
            has_played = not agent.talks or await play.turn(agent.asks, HELLO, SENTENCE)
            seen = await play.receipts()
            if agent.goes_on:
                has_played &= await play.turn(agent.goes_on, AGAIN, SENTENCE)
            if agent.has_tool:
                has_played &= await play.turn(agent.goes_on or agent.asks, RUN, PROOF)
            seen += await play.receipts()
        return max((receipt["prompt_tokens"] for receipt in seen[:2]), default=0) if has_played else 0


async def full_context(agent: Agent, folder: Path, context: int) -> bool:
    """It fills its context beyond what fits. Returns whether it went on, which it can only behind a summary."""
    print(f"{agent.name}: with {context} tokens of context")
    async with stage(folder / "run", context) as built:
        play = Play(agent, built, folder, context)
        await play.begin()
        await play.turn(agent.asks, FILL, SENTENCE)
        await play.turn(agent.goes_on, FILL, "")  # whether it answers this or says that it is full is its own affair
        await play.receipts()
        has_gone_on = await play.turn(agent.goes_on, HELLO, SENTENCE)
        await play.receipts()
        return has_gone_on


async def perform(agent: Agent, folder: Path) -> bool:
    """All that one agent plays."""
    first = await conversation(agent, folder)
    if not first or not agent.compacts:
        return bool(first)
    return await full_context(agent, folder, first + ROOM)


def main(names: list[str]) -> int:
    """All agents, or those named."""
    folder = Path("out/clients").resolve()
    tiny_agent.make(folder / "tiny-agent")
    chosen = [agent for agent in AGENTS if not names or agent.name in names]
    have_played = {agent.name: asyncio.run(perform(agent, folder)) for agent in chosen}
    print({name: "as expected" if has_played else "NOT AS EXPECTED" for name, has_played in have_played.items()})
    return 0 if all(have_played.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
