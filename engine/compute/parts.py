"""KV of blocks whose parts lie with several ranks: a payload holds all of them, one behind the other.

Owns who copies which bytes: each rank its own, from and to the pool's memory, which all have mapped. Never copies more
than a part, and lets nobody have a block before every rank is done with it."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection

import numpy as np

from engine.kv.link import Way
from engine.models.shard import Shard
from engine.step import Bytes, Copied, Fence, KVMemory

log = logging.getLogger(__name__)

ANSWER_S = 60.0  # for a rank's part of a copy: 16 blocks of an 8B model take 20 ms

Links = Mapping[Way, Sequence[Connection]]  # to rank 1, 2 ..; each used by one copying thread
Answer = float | str  # seconds, or what went wrong
Place = int | bytes  # of a payload: where in the pool's memory, or a rank's part of it, from elsewhere


class PartsMemory:
    """engine.step.KVMemory of rank 0, for all ranks."""

    def __init__(self, own: KVMemory, links: Links, lost: Callable[[str], None]) -> None:
        """`lost` is called with a reason where a rank does not answer."""
        self.first_bytes_per_s = own.first_bytes_per_s
        self._lost = lost
        self._own, self._links = own, links
        self._ranks = 1 + len(links[Way.UP])
        self._asked = dict.fromkeys(Way, 0)
        self._pool, self._offset = np.zeros(0, np.uint8), 0

    @property
    def block_bytes(self) -> int:
        """All parts of a block."""
        return self._ranks * self._own.block_bytes

    def share(self, payloads: Bytes, offset: int) -> None:
        """What of the pool this process has mapped, and where in its file that begins."""
        self._pool, self._offset = payloads, offset

    def fence(self) -> Fence:
        """Rank 0's. What others launched has written all it will, where rank 0 has: it waits for their sums."""
        return self._own.fence()

    def save(self, blocks: Sequence[int], into: Sequence[Bytes]) -> Copied:
        """Begin to copy readable blocks out."""
        return self._copy(Way.DOWN, blocks, into)

    def load(self, blocks: Sequence[int], payloads: Sequence[Bytes], after: Fence) -> Copied:
        """Begin to copy blocks in, once the fence is passed: other ranks do not know it."""
        self._own.load((), (), after)()
        return self._copy(Way.UP, blocks, payloads)

    def _copy(self, way: Way, blocks: Sequence[int], payloads: Sequence[Bytes]) -> Copied:
        self._asked[way] += 1
        number, links = self._asked[way], self._links[way]
        for rank, link in enumerate(links, 1):
            link.send((number, list(blocks), [self._place(payload, rank) for payload in payloads]))
        try:
            own = copy(self._own, way, blocks, [self._part(payload, 0) for payload in payloads])
        except Exception:
            self._answers(links, number)
            raise

        def copied() -> float:
            try:
                seconds = own()
            finally:
                answers = self._answers(links, number)
            failed = [answer for answer in answers if isinstance(answer, str)]
            if failed:
                raise OSError(f"a rank's part was not copied: {failed[0]}")
            return max(seconds, *(answer for answer in answers if not isinstance(answer, str)))

        return copied

    def _answers(self, links: Sequence[Connection], number: int) -> list[Answer]:
        """Of every rank: nobody may have these blocks before."""
        return [self._answer(link, number) for link in links]

    def _answer(self, link: Connection, number: int) -> Answer:
        while link.poll(ANSWER_S):
            answered, answer = link.recv()
            if answered == number:  # else of a copy that nobody waited for
                return answer  # type: ignore[no-any-return]
        self._lost(f"a rank of tensor parallel copied nothing in {ANSWER_S:.0f} s")
        return "lost"

    def _part(self, payload: Bytes, rank: int) -> Bytes:
        return payload[rank * self._own.block_bytes : (rank + 1) * self._own.block_bytes]

    def _place(self, payload: Bytes, rank: int) -> Place:
        at = payload.ctypes.data - self._pool.ctypes.data
        is_shared = 0 <= at < self._pool.nbytes
        return self._offset + at if is_shared else self._part(payload, rank).tobytes()


def copy(memory: KVMemory, way: Way, blocks: Sequence[int], payloads: Sequence[Bytes]) -> Copied:
    """Begin a copy that waits for no fence."""
    return memory.save(blocks, payloads) if way is Way.DOWN else memory.load(blocks, payloads, None)


def serve(link: Connection, way: Way, memory: KVMemory, shard: Shard, pool_fd: int) -> None:
    """Copy this rank's part of whatever rank 0 asks for, until that is gone. In a thread of its own."""
    pool = np.frombuffer(mmap.mmap(pool_fd, 0), np.uint8) if pool_fd >= 0 else np.zeros(0, np.uint8)
    size = memory.block_bytes

    def part(place: Place) -> Bytes:
        if isinstance(place, bytes):
            return np.frombuffer(bytearray(place), np.uint8)  # torch wants memory that may be written
        return pool[place + shard.rank * size : place + (shard.rank + 1) * size]

    while True:
        try:
            number, blocks, places = link.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Answer = copy(memory, way, blocks, [part(place) for place in places])()
        except Exception as error:  # border: rank 0 is told, whatever it was
            log.warning("a part was not copied", exc_info=error)
            answer = repr(error)
        link.send((number, answer))
