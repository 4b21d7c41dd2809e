"""Which worker holds which prefix, and which prefixes anyone has seen within the hour.

Owns two bounded maps of chain keys. Knows neither tokens nor KV: a wrong answer costs a miss, never a wrong token."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from policies.api import Floats
from policies.chain import KEY_BYTES, Chain

# Hot: a prompt of 142k tokens has 2,200 keys; every question here is logarithmic in them. bench/dispatcher.py.


class PrefixIndex:
    """chain key -> bitset of worker slots. Entries are made at dispatch, before the blocks exist: the next request of
    the same session, a millisecond later, must see them."""

    def __init__(self, nodes_per_worker: int) -> None:
        self._capacity = nodes_per_worker
        self._holders: dict[bytes, int] = {}
        self._held: dict[int, dict[bytes, None]] = {}  # a worker's own keys, oldest first: removal costs its nodes only

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, slot: int, keys: Iterable[bytes]) -> None:
        """`slot` holds these keys, or soon will."""
        held, holders, bit = self._held.setdefault(slot, {}), self._holders, 1 << slot
        for key in keys:
            if key not in held:
                held[key] = None
                holders[key] = holders.get(key, 0) | bit
        while len(held) > self._capacity:
            self._forget(slot, held, next(iter(held)))

    def remove(self, slot: int, keys: Iterable[bytes]) -> None:
        """`slot` evicted these keys."""
        held = self._held.get(slot)
        if held:
            for key in keys:
                if key in held:
                    self._forget(slot, held, key)

    def remove_worker(self, slot: int) -> None:
        """`slot` is gone, in the time of its own nodes."""
        held = self._held.pop(slot, {})
        for key in list(held):
            self._forget(slot, held, key)

    def _forget(self, slot: int, held: dict[bytes, None], key: bytes) -> None:
        del held[key]
        left = self._holders[key] & ~(1 << slot)
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]

    def hit_blocks(self, chain: Chain, slots: int) -> Floats:
        """How many leading blocks each slot holds, as far as the sample tells. Bisects: whoever holds a key holds all
        before it, so the set of holders only shrinks along a chain."""
        hits = np.zeros(slots)
        find, keys, at, length = self._holders.get, chain.keys, chain.at, len(chain.at)
        begin = 0
        holding = find(chain.key(0), 0) if length else 0
        while holding:
            low, high, beyond = begin, length, 0  # `holding` at low; fewer at high, namely `beyond`
            while high - low > 1:
                middle = (low + high) // 2
                start = at[middle] * KEY_BYTES  # chain.key(middle), without the call
                found = find(keys[start : start + KEY_BYTES], 0) & holding
                if found == holding:
                    low = middle
                else:
                    high, beyond = middle, found
            _write(hits, holding & ~beyond, at[low] + 1)
            begin, holding = high, beyond
        return hits


def _write(hits: Floats, slots: int, blocks: int) -> None:
    while slots:
        lowest = slots & -slots
        hits[lowest.bit_length() - 1] = blocks
        slots ^= lowest


class SeenIndex:
    """The ideal cache: which blocks were sent or received within the hour. New tokens are those beyond it.

    Generations, not timestamps: forgetting is dropping a dict. Memory is bounded by generations x capacity."""

    GENERATIONS = 5
    GENERATION_S = 900.0  # so a block is remembered for 60 to 75 minutes

    def __init__(self, keys_max: int) -> None:
        self._capacity = keys_max
        self._generations: list[dict[bytes, None]] = [{}]
        self._turns_at: float | None = None

    def __len__(self) -> int:
        return sum(len(generation) for generation in self._generations)

    def blocks_seen(self, chain: Chain, now: float) -> int:
        """Leading blocks of `chain` that an ideal cache would hold; then they all count as seen."""
        self._turn(now)
        seen = _leading(chain, self._generations, len(chain))
        current = self._generations[0]
        is_fresh = seen == 0 or chain.key(seen - 1) in current  # then all before it are, too
        self._note(chain.sampled(seen if is_fresh else _leading(chain, [current], seen)))
        return chain.at[seen - 1] + 1 if seen else 0

    def note(self, keys: Iterable[bytes], now: float) -> None:
        """Workers stored these blocks: the answer's part of the next prompt."""
        self._turn(now)
        self._note(keys)

    def _note(self, keys: Iterable[bytes]) -> None:
        current = self._generations[0]
        for key in keys:
            current[key] = None
        if len(current) >= self._capacity:
            self._turns_at = None  # full: the next event opens a generation, and the oldest is forgotten early

    def _turn(self, now: float) -> None:
        if self._turns_at is not None and now < self._turns_at:
            return
        self._turns_at = now + self.GENERATION_S
        if self._generations[0]:
            self._generations = [{}, *self._generations[: self.GENERATIONS - 1]]


def _leading(chain: Chain, generations: Collection[dict[bytes, None]], length: int) -> int:
    """How many of the first `length` sampled keys some generation knows. Bisects: seeing a key means having seen all
    before it, in the same generation or a later one."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        key = chain.key(middle)
        for known in generations:
            if key in known:
                low = middle + 1
                break
        else:
            high = middle
    return low
