"""What a frame and a token cost between a worker's bytes and the relay: decode, link, mind; sinks that only listen.

Prints CPU microseconds, best of 5 runs of 2,000 frames. Run: python -m bench.link"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.wire import (
    PROTOCOL_VERSION,
    End,
    Hello,
    Load,
    Sampling,
    Start,
    StepFrame,
    StepModelParts,
    Submit,
    Welcome,
    encode,
)
from policies.api import PolicySpec
from policies.request import RequestId, WorkerId
from router.control.mind import Mind
from router.control.reducer import build, load_policy
from router.settings.config import Config
from router.workers.fleet import Fleet
from router.workers.link import Link, LinkLimits

RUNS, FRAMES = 5, 2000
MODEL = StepModelParts(0.005, 1e-4, 0.001, 1e-8, 1e-8, 1e-5, 1.0, 1.25, 1)
POLICY = PolicySpec().digest
HELLO = Hello(
    PROTOCOL_VERSION, "w0", 1, "tiny", "d", "cpu", 16, 4096, 8192, 49152, b"r" * 16, POLICY, MODEL, b"", b""
)  # fmt: skip
LOAD = Load(32, 0, 0, 1000, 1000, 20_000, 0.01, 1, 0.5)
ORDER = Submit(0, b"\0" * 16, 4, b"", 0, 0, 1.0, 0.04, 10.0, "", Sampling())


@dataclass(slots=True)
class Listener:
    """A Sink that does what every sink must: look at its tokens."""

    count: int = 0

    def started(self, start: Start) -> None:
        self.count += start.cached_tokens

    def tokens(self, ids: Sequence[int]) -> None:
        self.count += len(ids)

    def ended(self, end: End) -> None:
        self.count += end.output_tokens

    def lost(self, reason: str) -> None:
        self.count += len(reason)


class Null(asyncio.Transport):
    """A transport whose peer reads everything."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        del data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        return


def frame(handles: list[int], steps: int) -> bytes:
    load = Load(32, 0, 0, 1000, 1000, 20_000, 0.01, steps, 0.5)
    ids = np.arange(len(handles), dtype="<i4").tobytes()
    return encode(StepFrame(handles, [1] * len(handles), ids, [], [], load, b"", b"", None))


def measure(streams: int) -> float:
    """CPU seconds a frame with one token for each of `streams`."""
    policy = load_policy(Config(), deque(), is_timed=True)
    mind = Mind(build(Config(), policy, seed=1), deque())
    fleet = Fleet([("w0", "")], mind, "{}")
    link = Link(WorkerId(0), fleet, Welcome(PROTOCOL_VERSION, "r", "{}", b""), LinkLimits(), time.monotonic)
    link.connection_made(Null())
    link.data_received(encode(HELLO))
    listener = Listener()
    handles = [link.submit(RequestId(f"r{number}"), ORDER, listener) for number in range(streams)]
    frames = [frame(handles, number) for number in range(FRAMES)]
    begun = time.process_time()
    for data in frames:
        link.data_received(data)
    taken_s = time.process_time() - begun
    assert listener.count == streams * FRAMES
    mind.close()
    return taken_s / FRAMES


async def main() -> dict[int, float]:
    best = {streams: min(measure(streams) for _ in range(RUNS)) * 1e6 for streams in (0, 1, 8, 32, 128)}
    print(f"link and mind, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for streams, us in best.items():
        each = f"{(us - best[0]) / streams:6.2f} us a token beyond the empty frame" if streams else ""
        print(f"  frame with {streams:3} tokens: {us:7.1f} us  {each}")
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.link", description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    out = parser.parse_args().out
    frame_us = asyncio.run(main())
    if out is not None:
        out.write_text(json.dumps({"frame_us": frame_us}, indent=1) + "\n")
