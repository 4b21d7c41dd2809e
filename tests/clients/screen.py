"""A terminal for an agent that wants one: tmux, typed into and read.

Owns its tmux server, on a socket of its own. Knows no agent."""

from __future__ import annotations

import asyncio
import secrets
import shlex
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

STEP_S = 0.3  # between looks, and between a text and its Enter: typed at once they are taken for pasted
WAIT_S = 60.0


class Screen:
    """A program in a terminal of 120 x 50."""

    def __init__(self, words: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self._words, self._folder, self._env = words, folder, env
        self._socket = f"headway-{secrets.token_hex(4)}"

    async def __aenter__(self) -> Screen:
        size = ("-x", "120", "-y", "50")
        await self._tmux("new-session", "-d", "-s", "it", *size, "-c", str(self._folder), shlex.join(self._words))
        before = ""
        async with asyncio.timeout(WAIT_S):
            while not before.strip() or (now := await self.shown()) != before:  # until it has drawn itself
                before = await self.shown() if not before.strip() else now
                await asyncio.sleep(4 * STEP_S)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tmux("kill-server")

    async def say(self, text: str, expected: str) -> str:
        """Type a line; what is shown once the answer to it is, or after a minute."""
        await self._tmux("send-keys", "-t", "it", "-l", text)
        await asyncio.sleep(STEP_S)
        await self._tmux("send-keys", "-t", "it", "Enter")
        shown = ""
        for _ in range(int(WAIT_S / STEP_S)):
            await asyncio.sleep(STEP_S)
            shown = (await self.shown()).rpartition(text)[2]
            if expected in shown:
                break
        return shown

    async def shown(self) -> str:
        """The screen's text."""
        return await self._tmux("capture-pane", "-p", "-t", "it")

    async def _tmux(self, *words: str) -> str:
        command = ("tmux", "-L", self._socket, "-f", "/dev/null", *words)
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=DEVNULL, env=self._env)
        return (await process.communicate())[0].decode(errors="replace")
