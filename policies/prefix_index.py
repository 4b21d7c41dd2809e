"""Which worker holds which prefix, and which prefixes anyone has seen within the hour.

Owns two bounded maps of chain keys. Knows neither tokens nor KV: a wrong answer costs a miss, never a wrong token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from policies.api import Floats

KEY_BYTES = 16


def sampled(keys: bytes, every: int) -> list[bytes]:
    """One key in `every`, chosen by the key itself, so that a frame's keys and a prompt's chain agree on which."""
    if every == 1:
        return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
    return [keys[at * KEY_BYTES : (at + 1) * KEY_BYTES] for at in positions(keys, every)]


def positions(keys: bytes, every: int) -> list[int]:
    """Where in the chain the sampled keys are."""
    if every == 1:
        return list(range(len(keys) // KEY_BYTES))
    last_bytes = np.frombuffer(keys, dtype=np.uint8)[KEY_BYTES - 1 :: KEY_BYTES]
    chosen: list[int] = np.flatnonzero(last_bytes % every == 0).tolist()
    return chosen


class PrefixIndex:
    """chain key -> bitset of worker slots. Entries are made at dispatch, before the blocks exist: the next request of
    the same session, a millisecond later, must see them."""

    def __init__(self, every: int, nodes_per_worker: int) -> None:
        self._every = every
        self._capacity = nodes_per_worker
        self._holders: dict[bytes, int] = {}
        self._held: dict[int, dict[bytes, None]] = {}  # a worker's own keys, oldest first: removal costs its nodes only

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, slot: int, keys: bytes, after_blocks: int = 0) -> None:
        """`slot` holds these keys. A chain whose first blocks are known to be there can skip them."""
        held, holders, bit = self._held.setdefault(slot, {}), self._holders, 1 << slot
        for key in sampled(keys[after_blocks * KEY_BYTES :], self._every):
            if key not in held:
                held[key] = None
                holders[key] = holders.get(key, 0) | bit
        while len(held) > self._capacity:
            self._forget(slot, held, next(iter(held)))

    def remove(self, slot: int, keys: bytes) -> None:
        """`slot` evicted these keys."""
        held = self._held.get(slot)
        if held:
            for key in sampled(keys, self._every):
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

    def hit_blocks(self, chain: bytes, slots: int) -> Floats:
        """How many leading blocks each slot holds. Logarithmic in the chain: a holder of a key holds all before it."""
        hits = np.zeros(slots)
        if not self._holders or not chain:
            return hits
        at = positions(chain, self._every)
        holders = self._holders

        def mask(number: int) -> int:
            start = at[number] * KEY_BYTES
            return holders.get(chain[start : start + KEY_BYTES], 0)

        for number, leaving in _steps(mask, len(at)):
            for slot in _bits(leaving):
                if slot < slots:
                    hits[slot] = at[number] + 1
        return hits


def _steps(mask: Callable[[int], int], length: int) -> Iterator[tuple[int, int]]:
    """(last index, slots whose prefix ends there), for masks that only lose bits along the chain. Bisects."""
    begin, holding = 0, mask(0) if length else 0
    while holding:
        low, high = begin, length  # mask(low) == holding; everything from high on is smaller
        while high - low > 1:
            middle = (low + high) // 2
            if mask(middle) & holding == holding:
                low = middle
            else:
                high = middle
        still = mask(high) & holding if high < length else 0
        yield low, holding & ~still
        begin, holding = high, still


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


class SeenIndex:
    """The ideal cache: which blocks were sent or received within the hour. New tokens are those beyond it.

    Generations, not timestamps: forgetting is dropping a dict. Memory is bounded by generations x capacity."""

    GENERATIONS = 5
    GENERATION_S = 900.0  # so a block is remembered for 60 to 75 minutes

    def __init__(self, every: int, keys_max: int) -> None:
        self._every = every
        self._capacity = keys_max
        self._generations: list[dict[bytes, None]] = [{}]
        self._turns_at: float | None = None

    def __len__(self) -> int:
        return sum(len(generation) for generation in self._generations)

    def blocks_seen(self, chain: bytes, now: float) -> int:
        """Leading blocks of `chain` that an ideal cache would hold; then they all count as seen."""
        self._turn(now)
        at = positions(chain, self._every)
        current, generations = self._generations[0], self._generations

        def key(number: int) -> bytes:
            start = at[number] * KEY_BYTES
            return chain[start : start + KEY_BYTES]

        seen = _boundary(lambda number: any(key(number) in known for known in generations), len(at))
        fresh = _boundary(lambda number: key(number) in current, seen)
        self._note([key(number) for number in range(fresh, len(at))])
        return at[seen - 1] + 1 if seen else 0

    def note(self, keys: bytes, now: float) -> None:
        """Workers stored these blocks: the answer's part of the next prompt."""
        self._turn(now)
        self._note(sampled(keys, self._every))

    def _note(self, keys: list[bytes]) -> None:
        current = self._generations[0]
        for key in keys:
            current[key] = None
        if len(current) >= self._capacity:
            self._turns_at = None  # full: the next event opens a generation and the oldest is forgotten

    def _turn(self, now: float) -> None:
        if self._turns_at is not None and now < self._turns_at:
            return
        self._turns_at = now + self.GENERATION_S
        if self._generations[0]:
            self._generations = [{}, *self._generations[: self.GENERATIONS - 1]]


def _boundary(holds: Callable[[int], bool], length: int) -> int:
    """How many leading indices hold, for a property that once lost stays lost."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            low = middle + 1
        else:
            high = middle
    return low
