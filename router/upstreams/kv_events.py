"""KV events of vLLM and SGLang: a ZMQ subscription becomes what an engine's residence is told.

Owns the wire format and the socket. Never places: whoever follows reports what was forgotten. pyzmq is an extra of its
own, since only this file needs it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from msgspec import Raw, Struct

from router.upstreams.residence import BlockHash, Forgotten, Residence

log = logging.getLogger(__name__)

# A larger one is not decoded, so we begin anew. ZMQ's own bound would end the subscription for good.
BATCH_BYTES_MAX = 64 * 1024 * 1024
QUEUED_BATCHES_MAX = 10_000  # in the socket, while the router is busy; beyond it they are dropped and missed
FRAMES = 3  # topic, number of 8 bytes, batch
DEVICE = (None, "GPU")  # blocks in other memories are copies, which come and go by themselves


class BlockStored(Struct, array_like=True, tag=True):
    """Blocks behind one parent. Token ids stay bytes: our keys are made of text."""

    block_hashes: list[BlockHash]
    parent_block_hash: Raw
    token_ids: Raw
    block_size: int
    lora_id: Raw = Raw(b"\xc0")
    medium: str | None = None


class BlockRemoved(Struct, array_like=True, tag=True):
    """Blocks evicted."""

    block_hashes: list[BlockHash]
    medium: str | None = None


class AllBlocksCleared(Struct, array_like=True, tag=True):
    """The cache was reset."""


class Batch(Struct, array_like=True):
    """What one engine step changed. Fields that newer engines append are passed over."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


_BATCH = msgspec.msgpack.Decoder(Batch)


@dataclass(slots=True)
class KvEvents:
    """Batches in order: what each one makes us forget. A missed number means that nobody knows what is there."""

    residence: Residence
    missed: int = 0  # gaps, restarts of the engine, batches that could not be read
    _next: int | None = field(default=None)

    def take(self, frames: list[bytes]) -> list[Forgotten]:
        """One message of the socket."""
        try:
            _, number, payload = frames
            if len(payload) > BATCH_BYTES_MAX:
                return [self._begin_anew(None)]
            events = _BATCH.decode(payload).events
        except (ValueError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return [self._begin_anew(None)]
        at = int.from_bytes(number, "big")
        forgotten = [] if self._next in (None, at) else [self._begin_anew(at)]
        self._next = at + 1
        return forgotten + [self._apply(event) for event in events]

    def _begin_anew(self, at: int | None) -> Forgotten:
        self.missed += 1
        log.warning("KV events: number %s came where %s was due: all that was there is forgotten", at, self._next)
        self._next = None
        return self.residence.cleared()

    def _apply(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> Forgotten:
        if isinstance(event, AllBlocksCleared):
            return self.residence.cleared()
        if event.medium not in DEVICE:
            return {}
        if isinstance(event, BlockStored):
            return self.residence.stored(event.block_hashes, event.block_size)
        return self.residence.removed(event.block_hashes)


async def follow(address: str, events: KvEvents, forget: Callable[[Forgotten], None]) -> None:
    """Listen until cancelled. ZMQ connects again by itself; what was missed meanwhile shows by its numbers."""
    import zmq
    import zmq.asyncio

    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, QUEUED_BATCHES_MAX)
        socket.subscribe(b"")
        socket.connect(address)
        while True:
            for forgotten in events.take(await socket.recv_multipart()):
                forget(forgotten)
