"""One process that the keeper keeps: how it is started, how it ends, when it starts again.

Owns the process and its back-off. Standard library only; never decides whether anything should run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESTART_FIRST_S = 0.25
RESTART_MAX_S = 30.0  # who cannot start is tried twice a minute, for ever: its cause may be outside
HEALTHY_S = 60.0  # who lived so long starts again at the first delay
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(slots=True)
class Child:
    """One process that should live."""

    name: str
    command: Sequence[str]
    fds: Sequence[int] = ()
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0  # when it is due, while it does not run
    delay_s: float = RESTART_FIRST_S
    deaths: int = 0

    def start(self, env: Mapping[str, str], stdout: Any = None) -> None:
        """Run it now."""
        # A session of its own: Ctrl-C reaches the keeper alone, so that the router can drain while workers work.
        self.process = subprocess.Popen(
            self.command,
            env=dict(env),
            pass_fds=self.fds,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            start_new_session=True,
            preexec_fn=_die_with_parent(),  # noqa: PLW1509 -- the keeper has one thread
        )
        self.started_at = time.monotonic()

    def ended(self, now: float) -> int | None:
        """The exit code of a process that just ended; its next start is booked. None while it runs."""
        code = self.process.poll() if self.process is not None else None
        if code is None:
            return None
        self.process, self.deaths = None, self.deaths + 1
        delay_s = RESTART_FIRST_S if now - self.started_at > HEALTHY_S else self.delay_s
        self.start_at, self.delay_s = now + delay_s, min(delay_s * 2, RESTART_MAX_S)
        return code

    def kill(self) -> None:
        """Its whole session, at once; a stopped process dies of this, too."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def ending(code: int) -> str:
    """How a process ended, for people: "exit code 1", "SIGKILL"."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux a child is killed when the keeper dies, however it dies. Other systems have no such call."""
    if sys.platform != "linux":
        return None
    libc, keeper = ctypes.CDLL(None), os.getpid()

    def arm() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it died between fork and prctl
            os._exit(1)

    return arm
