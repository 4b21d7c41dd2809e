"""Clients: one run by several client processes, each with its share of the sessions, and one clock for all.

Owns the processes, their common start and what they send back. Never paces or reads: each process is a Replay."""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import uvloop

from loadgen.client import Client, Target
from loadgen.records import Record
from loadgen.replay import Options, Progress, Replay
from loadgen.traces import Trace

CLIENTS_MAX = 64
EASY_TOKENS_PER_S = 20_000.0  # that one process reads without delaying its own sends: bench/judge.py
LEAD_S = 0.3  # between the go and second 0, for the slowest of them to hear it
TELL_S = 1.0


@dataclass(frozen=True, slots=True)
class Done:
    """What a client process leaves behind."""

    records: list[Record]
    cpu_s: float


@dataclass(slots=True)
class _Member:
    """One process, by what it last told."""

    process: BaseProcess
    pipe: Connection
    progress: Progress = Progress(0.0, 0, 0, 0, 0)  # noqa: RUF009  it is frozen
    done: Done | None = None


@dataclass(slots=True)
class Crew:
    """To its caller as one Replay: run it, cancel it, read its records."""

    trace: Trace
    target: Target
    options: Options
    count: int
    records: list[Record] = field(default_factory=list)
    origin: float = 0.0
    cpu_s: float = 0.0
    _members: list[_Member] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= CLIENTS_MAX:
            raise ValueError(f"{self.count} clients: from 1 to {CLIENTS_MAX}")
        check(self.trace)

    @property
    def not_reached(self) -> int:
        """As a Replay counts them."""
        return len(self.trace.rows) - len(self.records)

    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.origin

    def progress(self) -> Progress:
        """Of all of them."""
        told = [member.progress for member in self._members]
        sums = (sum(column) for column in zip(*((p.offered, p.open, p.done, p.other) for p in told), strict=True))
        return Progress(max(0.0, self.now()), *sums) if told else Progress(0.0, 0, 0, 0, 0)

    async def run(self) -> None:
        """Start them, let them begin together, and gather what they did. When cancelled, so are they."""
        with ThreadPoolExecutor(self.count) as threads, contextlib.ExitStack() as ends:
            self._members = [self._start(number) for number in range(self.count)]
            ends.callback(self._end)
            loop = asyncio.get_running_loop()
            await asyncio.gather(*(loop.run_in_executor(threads, member.pipe.recv) for member in self._members))
            self.origin = time.monotonic() + LEAD_S
            self._tell(self.origin)
            work = asyncio.gather(*(loop.run_in_executor(threads, _listen, member) for member in self._members))
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                self._tell(None)
                await work
                raise
            finally:
                self._gather()

    def _start(self, number: int) -> _Member:
        context = multiprocessing.get_context("spawn")  # a fork would copy this loop
        ours, theirs = context.Pipe()
        options = replace(self.options, share=(number, self.count))
        process = context.Process(target=_work, args=(theirs, self.trace, self.target, options), daemon=True)
        process.start()
        theirs.close()
        return _Member(process, ours)

    def _tell(self, word: float | None) -> None:
        for member in self._members:
            with contextlib.suppress(BrokenPipeError):
                member.pipe.send(word)

    def _gather(self) -> None:
        found = [member.done for member in self._members if member.done is not None]
        self.records = sorted((record for one in found for record in one.records), key=lambda record: record.row)
        self.cpu_s = sum(one.cpu_s for one in found)

    def _end(self) -> None:
        for member in self._members:
            member.process.kill()
            member.process.join()
            member.pipe.close()


def enough(trace: Trace, duration_s: float, cores: int) -> int:
    """How many processes read what a trace asks for, at its mean; one where its sessions cannot be parted."""
    tokens_per_s = sum(row.output_length for row in trace.rows) / duration_s
    wanted = min(math.ceil(tokens_per_s / EASY_TOKENS_PER_S), cores, CLIENTS_MAX)
    if wanted < 2:
        return 1
    try:
        check(trace)
    except ValueError:
        return 1
    return wanted


def check(trace: Trace) -> None:
    """Raises ValueError where a turn waits for one of another family: two processes could not tell each other."""
    families = {row.session_id: row.family for row in trace.rows}
    for row in trace.rows:
        for name in row.after:
            if families[name.rpartition("#")[0]] != row.family:
                raise ValueError(f"a row of {row.family!r} waits for {name!r} of another session: use one client")


def _listen(member: _Member) -> None:
    """Hear one process to its end, in a thread. Raises ValueError if it dies."""
    while member.done is None:
        try:
            told = member.pipe.recv()
        except EOFError as error:
            raise ValueError("a client process died") from error
        if isinstance(told, Done):
            member.done = told
        else:
            member.progress = told


def _work(pipe: Connection, trace: Trace, target: Target, options: Options) -> None:
    """A client process. Ctrl-C is the first process's to hear: it tells."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replay = Replay(trace, Client(target), options)
    pipe.send("ready")
    begun = time.process_time()
    uvloop.run(_replayed(replay, pipe))
    pipe.send(replay.progress())
    pipe.send(Done(replay.records, time.process_time() - begun))
    pipe.close()


async def _replayed(replay: Replay, pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    start_at = await loop.run_in_executor(None, pipe.recv)
    if start_at is None:
        return
    task = asyncio.ensure_future(replay.run(start_at))

    def stop() -> None:
        """Told to, or the first process is gone. Once: a second cancel would cut the winding down short."""
        loop.remove_reader(pipe.fileno())
        task.cancel()

    loop.add_reader(pipe.fileno(), stop)
    telling = asyncio.ensure_future(_tell(replay, pipe))
    with contextlib.suppress(asyncio.CancelledError):
        await task
    loop.remove_reader(pipe.fileno())
    telling.cancel()


async def _tell(replay: Replay, pipe: Connection) -> None:
    while True:
        await asyncio.sleep(TELL_S)
        pipe.send(replay.progress())
