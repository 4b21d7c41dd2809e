"""A TCP proxy that misbehaves on schedule: delay, jitter, rate, cut, half-open, corrupt.

Owns a script of faults over time and the random numbers behind them: the same seed and traffic give the same faults.
Never looks at what passes. It exists because `tc netem` needs root and is absent from many kernels."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

CHUNK_BYTES = 16 * 1024
CONNECTIONS_MAX = 1024


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is wrong from `at_s` (seconds after start) until the next fault of the script."""

    at_s: float
    delay_s: float = 0.0  # added to every chunk, both ways
    jitter_s: float = 0.0  # uniform, on top of the delay; order is kept
    bytes_per_s: float = 0.0  # 0: unlimited
    corrupt_rate: float = 0.0  # probability a chunk that one of its bits is flipped
    cut: bool = False  # reset every connection, and refuse new ones
    half_open: bool = False  # accept, read and say nothing: a black hole that looks alive


def read_script(text: str) -> tuple[Fault, ...]:
    """A script from JSON: a list of faults in order of time. Raises ValueError naming what is wrong."""
    try:
        faults = msgspec.json.decode(text, type=tuple[Fault, ...])
    except msgspec.DecodeError as error:
        raise ValueError(f"the fault script is wrong: {error}") from error
    if list(faults) != sorted(faults, key=lambda fault: fault.at_s):
        raise ValueError("the fault script is wrong: its times must ascend")
    return faults


@dataclass(slots=True)
class Passed:
    """What the proxy did so far."""

    connections: int = 0
    refused: int = 0
    cut: int = 0
    corrupted: int = 0
    bytes: int = 0


@dataclass(slots=True)
class FaultProxy:
    """Relays 127.0.0.1:port to a target, with the script's faults. Use as `async with`."""

    target_host: str
    target_port: int
    script: Sequence[Fault] = ()
    seed: int = 0
    passed: Passed = field(default_factory=Passed)
    now: Fault = field(default_factory=lambda: Fault(at_s=0.0))
    port: int = 0
    _chance: random.Random = field(default_factory=random.Random)
    _server: asyncio.Server | None = None
    _conductor: asyncio.Task[None] | None = None
    _writers: dict[asyncio.StreamWriter, None] = field(default_factory=dict)  # ordered, unlike a set
    _serving: set[asyncio.Task[Any]] = field(default_factory=set)

    async def __aenter__(self) -> FaultProxy:
        self._chance.seed(self.seed)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]
        self._conductor = asyncio.create_task(self._conduct())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        assert self._conductor is not None
        self._server.close()
        self._conductor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._conductor
        self._reset_all()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    async def _conduct(self) -> None:
        start = asyncio.get_running_loop().time()
        for fault in self.script:
            await asyncio.sleep(start + fault.at_s - asyncio.get_running_loop().time())
            self.set(fault)

    def set(self, fault: Fault) -> None:
        """Let `fault` hold from now on."""
        self.now = fault
        if fault.cut:
            self._reset_all()

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            self.passed.cut += 1
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.now.cut or len(self._writers) >= CONNECTIONS_MAX:
            self.passed.refused += 1
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        self.passed.connections += 1
        self._writers[writer] = None
        try:
            await self._relay(reader, writer)
        except (ConnectionError, OSError):
            writer.transport.abort()
        finally:
            del self._writers[writer]
            writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self.target_host, self.target_port, limit=CHUNK_BYTES)
        self._writers[far_writer] = None
        try:
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(self._pump(reader, far_writer))
                both_ways.create_task(self._pump(far_reader, writer))
        except* (ConnectionError, OSError):
            writer.transport.abort()
        finally:
            del self._writers[far_writer]
            far_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            if self.now.half_open:
                continue
            await asyncio.sleep(self._wait_s(len(chunk)))
            writer.write(self._spoil(chunk))
            await writer.drain()
            self.passed.bytes += len(chunk)
        if writer.can_write_eof():
            writer.write_eof()

    def _wait_s(self, chunk_bytes: int) -> float:
        fault = self.now
        pacing_s = chunk_bytes / fault.bytes_per_s if fault.bytes_per_s else 0.0
        return fault.delay_s + fault.jitter_s * self._chance.random() + pacing_s

    def _spoil(self, chunk: bytes) -> bytes:
        if self._chance.random() >= self.now.corrupt_rate:
            return chunk
        self.passed.corrupted += 1
        spoiled = bytearray(chunk)
        spoiled[self._chance.randrange(len(chunk))] ^= 1 << self._chance.randrange(8)
        return bytes(spoiled)


async def stand(proxy: FaultProxy, duration_s: float | None) -> None:
    """Serve until the time is over or Ctrl-C, saying what will be wrong when, and at the end what was done."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    async with proxy:
        print(f"relaying 127.0.0.1:{proxy.port} to {proxy.target_host}:{proxy.target_port}", flush=True)
        for fault in proxy.script:
            print(f"  from {fault.at_s:g} s: {_words(fault)}", flush=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), duration_s)
    done = proxy.passed
    print(
        f"{done.connections} connections relayed, {done.refused} refused, {done.cut} cut; "
        f"{done.bytes} bytes passed, {done.corrupted} chunks corrupted"
    )


def _words(fault: Fault) -> str:
    named = msgspec.to_builtins(fault)
    return ", ".join(f"{name} {value}" for name, value in named.items() if value and name != "at_s") or "nothing wrong"
