"""The processes of ranks 1 and up, as rank 0 sees them: started, told each step, watched, ended with it.

Owns those processes and how long an answer may take. Never computes; a rank that is lost takes its worker down."""

from __future__ import annotations

import logging
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine.kv.link import Way

log = logging.getLogger(__name__)

STEP_S = 60.0  # for a step; the longest of an 8B model takes a second
POLL_S = 0.2
END_S = 5.0  # from the closed link to the kill


def end_process(why: str) -> None:
    """The keeper starts another worker. A step that waits for a lost rank inside a library ends in no other way."""
    log.error("%s; this worker ends with it", why)
    logging.shutdown()
    os._exit(1)


class Crew:
    """One process a member, which gets it as its first message, and links for copies of KV by their way. `lost` is
    called once, in a thread, with the reason."""

    def __init__(
        self,
        members: Sequence[Any],
        lost: Callable[[str], None] = end_process,
        *,
        module: str = "engine.compute.rank",
        fds: Sequence[int] = (),
    ) -> None:
        self.lost, self._module, self._fds = lost, module, fds
        self._until = math.inf  # when the ranks must have answered
        self._is_over = threading.Event()
        self._links: list[Connection] = []
        self.copies: dict[Way, list[Connection]] = {way: [] for way in Way}
        self._processes: list[subprocess.Popen[bytes]] = []
        for member in members:
            self._start(member)
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    def _start(self, member: Any) -> None:
        ours, theirs = zip(*(Pipe() for _ in range(1 + len(Way))), strict=True)
        numbers = [link.fileno() for link in theirs]
        command = [sys.executable, "-P", "-m", self._module, *map(str, numbers)]
        self._processes.append(subprocess.Popen(command, pass_fds=[*numbers, *self._fds], env=_environment()))
        for link in theirs:
            link.close()
        steps, *copies = ours
        self._links.append(steps)
        for way, link in zip(Way, copies, strict=True):
            self.copies[way].append(link)
        steps.send(member)

    def tell(self, message: object) -> None:
        """Every rank gets it, in order. What one of them does not take is waited for; the watch bounds that."""
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for link in self._links:
            link.send_bytes(payload)

    @contextmanager
    def answering(self, within_s: float) -> Iterator[None]:
        """In the body the ranks compute with this process: if it takes longer, one of them hangs."""
        self._until = time.monotonic() + within_s
        try:
            yield
        finally:
            self._until = math.inf

    def close(self) -> None:
        """The others end when their link does."""
        self._is_over.set()
        self._watcher.join()
        for link in [*self._links, *chain.from_iterable(self.copies.values())]:
            link.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_S):
            why = self._trouble()
            if why:
                self.lost(why)
                return

    def _trouble(self) -> str:
        for rank, process in enumerate(self._processes, 1):
            if (code := process.poll()) is not None:
                return f"rank {rank} of tensor parallel has ended with code {code}"
        return "the ranks of tensor parallel do not answer in time" if time.monotonic() > self._until else ""


def _environment() -> dict[str, str]:
    """The ranks import the code that this process was imported from, wherever they run."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
