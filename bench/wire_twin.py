"""A worker without an engine: it speaks the wire and steps at a scripted pace, so that a router is measured alone.

Owns its sequences and which chain keys it has told. Never computes: tokens are a fixed cycle of ids.
Lines `TTFT_US ITL_US` on stdin set the pace; an ITL of 0 steps as fast as the router reads.
Run: python -m bench.wire_twin SOCKET NAME VOCABULARY"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from typing import cast

import numpy as np
import uvloop

from engine.kv import keys
from engine.wire import (
    PROTOCOL_VERSION,
    Abort,
    End,
    FrameReader,
    Hello,
    Load,
    Start,
    StepFrame,
    StepModelParts,
    Submit,
    decode_from_router,
    encode,
)
from policies.api import PolicySpec

BLOCK_TOKENS = 64
CONTEXT_MAX = 262_144
BLOCKS_TOTAL = 1_000_000
IDLE_S = 0.5
MODEL = StepModelParts(1e-4, 1e-8, 1e-5, 1e-13, 1e-15, 1e-8, 1.0, 1.25, 1)
ROOT = keys.root("twin")
FIRST_ID, CYCLE = 1000, 2000  # ordinary words of any vocabulary of this size


@dataclass(slots=True)
class Sequence:
    handle: int
    ready_at: float
    left: int
    output: int
    cached: int
    stored: bytes
    has_started: bool = False


class Twin(asyncio.Protocol):
    """The one link. All sequences advance together, a token a step."""

    def __init__(self, name: str, vocabulary: int) -> None:
        self.ttft_s = self.itl_s = 0.0
        self._name, self._vocabulary = name, vocabulary
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._running: dict[int, Sequence] = {}
        self._chains: dict[str, tuple[bytes, bytes]] = {}  # last prompt of each session and its chain
        self._told: set[bytes] = set()
        self._steps = 0
        self._is_writable = True
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            worker=self._name,
            epoch=1,
            model="mock",
            model_digest="twin",
            device="none",
            block_tokens=BLOCK_TOKENS,
            blocks_total=BLOCKS_TOTAL,
            context_max=CONTEXT_MAX,
            vocab_size=self._vocabulary,
            root=ROOT,
            policy_digest=PolicySpec().digest,
            step_model=MODEL,
            cached=b"".join(self._told),
            nonce=b"",
        )
        self._transport.write(encode(hello))
        self._arm(0.0)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._running.clear()

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._arm(0.0)

    def data_received(self, data: bytes) -> None:
        was_idle = not self._running
        for frame in self._reader.feed(data):
            match decode_from_router(frame):
                case Submit() as order:
                    self._running[order.handle] = self._sequence(order)
                case Abort(handle):
                    self._running.pop(handle, None)
        if was_idle and self._running:
            self._arm(self.ttft_s)

    def _sequence(self, order: Submit) -> Sequence:
        old_ids, old_chain = self._chains.get(order.session, (b"", b""))
        both = min(len(old_ids), len(order.ids))
        same = np.frombuffer(old_ids[:both], "<i4") == np.frombuffer(order.ids[:both], "<i4")
        kept = int(same.argmin() if not same.all() else len(same)) // BLOCK_TOKENS
        ids = np.frombuffer(order.ids, "<i4")
        if kept:
            last = keys.ChainKey(old_chain[16 * kept - 16 : 16 * kept])
            chain = old_chain[: 16 * kept] + keys.chain(last, ids[kept * BLOCK_TOKENS :], BLOCK_TOKENS)
        else:
            chain = keys.chain(ROOT, ids, BLOCK_TOKENS, order.salt)
        self._chains[order.session] = (order.ids, chain)
        fresh = [key for key in keys.split(chain) if key not in self._told]
        self._told.update(fresh)
        cached = len(ids) // BLOCK_TOKENS * BLOCK_TOKENS - len(fresh) * BLOCK_TOKENS
        ready_at = time.monotonic() + self.ttft_s
        return Sequence(order.handle, ready_at, order.sampling.max_tokens, 0, cached, b"".join(fresh))

    def _arm(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._step) if seconds else self._loop.call_soon(self._step)

    def _step(self) -> None:
        assert self._transport is not None
        self._timer = None
        if self._transport.is_closing():
            return
        if self._is_writable:
            begun = time.monotonic()
            self._transport.write(self._frame(begun))
        self._arm(self.itl_s if self._running and self._is_writable else IDLE_S)

    def _frame(self, now: float) -> bytes:
        ready = [one for one in self._running.values() if one.ready_at <= now]
        starts, ends, stored = [], [], b""
        for one in ready:
            if not one.has_started:
                one.has_started = True
                starts.append(Start(one.handle, one.cached, 0.0, self.ttft_s))
                stored += one.stored
            one.output += 1
            if one.output == one.left:
                ends.append(End(one.handle, "length", one.cached, one.output))
                del self._running[one.handle]
        self._steps += bool(ready)
        ids = np.array([FIRST_ID + (one.handle + one.output) % CYCLE for one in ready], "<i4").tobytes()
        load = Load(
            running=len(self._running),
            waiting=0,
            waiting_uncached_tokens=0,
            blocks_free=BLOCKS_TOTAL,
            blocks_cached=len(self._told),
            decode_context=0,
            step_s=self.itl_s,
            steps=self._steps,
            oldest_running_s=0.0,
        )
        handles = [one.handle for one in ready]
        return encode(StepFrame(handles, [1] * len(handles), ids, starts, ends, load, stored, b"", None))


async def main(path: str, name: str, vocabulary: int) -> None:
    loop = asyncio.get_running_loop()
    twin = Twin(name, vocabulary)
    await loop.create_unix_server(lambda: twin, path)
    over = loop.create_future()

    def pace() -> None:
        line = sys.stdin.readline().split()
        if not line:
            over.set_result(None)
            loop.remove_reader(sys.stdin)
            return
        twin.ttft_s, twin.itl_s = (int(number) / 1e6 for number in line)

    loop.add_reader(sys.stdin, pace)
    await over


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
