"""A whole house for fault tests: a router process and fake workers, each a real process that a test may hurt.

Owns their life and a client that writes down every stream. Tokens are hash(prompt, index): an answer that was cut,
repeated or mixed up differs from the same prompt's answer on a healthy day."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from router.settings.config import Config

DEADLINE_S = 300.0  # of each wait: six times what any took beside two busy loops; only what never comes takes it
POLL_S = 0.02


class Stream:
    """One streamed answer as a client sees it."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.status = 0
        self.headers = httpx.Headers()
        self.text = ""
        self.said: dict[str, str] = {}  # all of it, by answer and part: `0.content`, `1.call 0`
        self.errors: list[Any] = []
        self.is_done = False  # [DONE] came
        self.finish_reason: str | None = None
        self.body: Any = None  # of an answer that is no stream
        self._changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def read(self, client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> None:
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            self.status, self.headers = response.status_code, response.headers
            self._changed.set()
            if not response.headers["content-type"].startswith("text/event-stream"):
                self.body = json.loads(await response.aread())
                return
            # A stream that could not go on is cut after its error; a killed router cuts it without one.
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
                async for line in response.aiter_lines():
                    self._line(line)
                    self._changed.set()

    def _line(self, line: str) -> None:
        if line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                self.errors.append(chunk["error"])
            for choice in chunk.get("choices", ()):
                delta = choice["delta"]
                self.text += delta.get("content") or ""
                parts = [(part, delta.get(part) or "") for part in ("content", "reasoning_content")]
                for call in delta.get("tool_calls") or ():
                    function = call["function"]
                    parts.append((f"call {call['index']}", function.get("name", "") + function.get("arguments", "")))
                for part, more in parts:
                    key = f"{choice['index']}.{part}"
                    self.said[key] = self.said.get(key, "") + more
                self.finish_reason = choice["finish_reason"] or self.finish_reason

    async def until(self, is_so: Callable[[Stream], bool]) -> Stream:
        """Wait until what came so far is so."""
        async with asyncio.timeout(DEADLINE_S):
            while not is_so(self):
                await self._changed.wait()
                self._changed.clear()
        return self

    async def end(self) -> Stream:
        """Wait until the server has ended it."""
        assert self.task is not None
        async with asyncio.timeout(DEADLINE_S):
            await self.task
        return self

    async def leave(self) -> None:
        """Close the connection, as a client does who has seen enough."""
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class House:
    """Fake workers and a router."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        config: Config,
        names: Sequence[str],
        engine: Sequence[str],
        *,
        flags: Mapping[str, Sequence[str]],
        **worker: object,
    ) -> None:
        self.directory = directory
        self.model = model
        self.config = config
        self.names = names
        self.engine = list(engine)
        self.flags = flags
        self.worker_flags = [f"--{name.replace('_', '-')}={value}" for name, value in worker.items()]
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.router: subprocess.Popen[bytes] | None = None
        self.client: httpx.AsyncClient
        self.admin: httpx.AsyncClient
        self._listen = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._admin = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.asked_read, self._asked = os.pipe()

    async def __aenter__(self) -> House:
        (self.directory / "config.json").write_bytes(self.config.to_json())
        for name in self.names:
            self.start_worker(name, *self.flags.get(name, ()))
        self.start_router()
        url = f"http://127.0.0.1:{self._listen.getsockname()[1]}"
        self.client = httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, limits=httpx.Limits(max_connections=256))
        self.admin = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._admin.getsockname()[1]}", timeout=DEADLINE_S)
        await self.until_up(len(self.names))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.aclose()
        await self.admin.aclose()
        self._listen.close()
        self._admin.close()
        os.close(self.asked_read)
        os.close(self._asked)
        for process in (self.router, *self.workers.values()):
            if process is not None:
                if process.poll() is None:
                    process.send_signal(signal.SIGCONT)
                    process.kill()
                process.wait()

    def start_worker(self, name: str, *flags: str) -> None:
        """Start a worker, again if it ran before."""
        if name in self.workers:
            self.workers[name].wait(DEADLINE_S)
        command = [sys.executable, "-m", *self.engine, "--socket", str(self.directory / f"{name}.sock")]
        command += ["--name", name, "--model-name", "tiny", "--calibrate-s", "0.2", *self.worker_flags, *flags]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.workers[name] = subprocess.Popen(command, stderr=log)

    def start_router(self) -> None:
        """Start the router on the same listening sockets, again if it ran before."""
        fds = (self._listen.fileno(), self._admin.fileno(), self._asked)
        command = [sys.executable, "-m", "router", "--config", str(self.directory / "config.json")]
        command += ["--model", str(self.model), "--listen-fd", str(fds[0]), "--admin-fd", str(fds[1])]
        command += ["--keeper-fd", str(fds[2])]
        for name in self.names:
            command += ["--worker", f"{name}={self.directory / name}.sock"]
        with (self.directory / "router.log").open("ab") as log:
            self.router = subprocess.Popen(command, stderr=log, pass_fds=fds)

    def hurt(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a worker."""
        self.workers[name].send_signal(number)

    async def seen(self) -> dict[str, dict[str, Any]]:
        """What the admin listener says of each worker."""
        answer = await self.admin.get("/workers")
        return {worker["worker"]: worker for worker in answer.json()}

    async def until(self, is_so: Callable[[dict[str, dict[str, Any]]], bool]) -> None:
        """Wait until the workers are so."""

        async def look() -> bool:
            return is_so(await self.seen())

        await poll(look)

    async def until_up(self, count: int) -> None:
        """Wait until so many workers are connected and the router is ready."""
        await self.until(lambda seen: sum(worker["is_up"] for worker in seen.values()) == count)

        async def is_ready() -> bool:
            return (await self.client.get("/readyz")).status_code == 200

        await poll(is_ready)

    def ask(
        self,
        prompt: str,
        *,
        tokens: int = 20,
        stream: bool = True,
        n: int = 1,
        fields: dict[str, Any] | None = None,
        **headers: str,
    ) -> Stream:
        """Send a request, with `fields` over the usual ones; its answer is read in the background."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "stream": stream}
        body |= {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "n": n, **(fields or {})}
        answer = Stream(prompt)
        answer.task = asyncio.create_task(answer.read(self.client, body, headers))
        return answer

    async def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = (await self.admin.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith((name + " ", name + "{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def poll(look: Callable[[], Awaitable[bool]]) -> None:
    """Look until it is so; what changes is in another process, so there is no event to wait for."""
    async with asyncio.timeout(DEADLINE_S):
        while not await look():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


def logs(directory: Path) -> str:
    """The last lines of every process."""
    return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(directory.glob("*.log")))


@contextlib.asynccontextmanager
async def house(
    directory: Path,
    model: Path,
    config: Config | None = None,
    names: Sequence[str] = ("w0", "w1"),
    engine: Sequence[str] = ("engine", "fake"),
    *,
    flags: Mapping[str, Sequence[str]] | None = None,
    **worker: object,
) -> AsyncIterator[House]:
    """A house that is ready; what it printed is shown when a test fails in it. `engine`: for `python -m`; `worker`:
    flags of every worker; `flags`: those of one at its first start."""
    built = House(directory, model, config or Config(), names, engine, flags=flags or {}, **worker)
    try:
        async with built:
            yield built
        assert "the cache starts over" not in logs(directory), "a worker lost blocks"
    except BaseException:
        print(logs(directory))
        raise
