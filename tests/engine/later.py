"""An executor that runs its jobs when told to: copies under way, without threads or sleeping."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any

Job = tuple[Future[Any], Any, tuple[Any, ...]]


class Later(Executor):
    """`jobs` wait, oldest first."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, fn, args))
        return future

    def run(self, count: int = 1_000_000) -> None:
        """The oldest `count` of them."""
        jobs, self.jobs = self.jobs[:count], self.jobs[count:]
        for future, fn, args in jobs:
            if future.set_running_or_notify_cancel():
                future.set_result(fn(*args))
