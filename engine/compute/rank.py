"""`python -m engine.compute.rank FD FD FD`: a process that computes one rank's part of every step it is told.

Owns nothing but its part. Never decides, never samples, and never outlives the link to rank 0."""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch

from engine.compute import parallel, parts
from engine.kv.link import Way
from engine.models.config import ModelError

STEPS_MAX = 8  # told and not begun; rank 0 has three in flight at most


def main() -> int:
    """Build the part, then follow until rank 0 is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 drains, and closes the link
    link, *copies = [Connection(int(number)) for number in sys.argv[1:]]
    member: parallel.Member = link.recv()
    logging.basicConfig(level=logging.WARNING, format=f"%(levelname)s rank {member.shard.rank} %(name)s: %(message)s")
    steps: queue.Queue[Any] = queue.Queue(STEPS_MAX)
    threading.Thread(target=_read, args=(link, steps), name="link", daemon=True).start()
    torch.set_num_threads(member.config.threads)
    try:
        runner = parallel.part_of(member)
    except ModelError as error:
        print(f"engine: rank {member.shard.rank}: {error}", file=sys.stderr)
        return 2
    assert runner.kv is not None
    for way, copying in zip(Way, copies, strict=True):
        what = (copying, way, runner.kv, member.shard, member.config.pool_fd)
        threading.Thread(target=parts.serve, args=what, name=way.name, daemon=True).start()
    while True:
        runner.follow(steps.get())


def _read(link: Connection, steps: queue.Queue[Any]) -> None:
    """Beside the steps, so that the end of rank 0 ends a step that waits for it."""
    try:
        while True:
            steps.put(link.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
