"""Which of equal workers a session goes to: the highest hash of the two, alike in every router.

Owns the hash, for one worker's number and for an array of them, with the same result."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from policies.request import Request

GOLDEN, ODD = -0x61C8864680B583EB, -0x40A7B892E31B1A47  # multipliers of splitmix64, as signed 64-bit numbers
HALF, MASK = 1 << 63, (1 << 64) - 1


def seed_of(request: Request) -> int:
    """Alike for all turns of a session."""
    return zlib.crc32((request.session or request.id).encode())


def weight(worker: int, seed: int) -> int:
    """The hash of one pair."""
    mixed = _signed((worker + 1) * GOLDEN) ^ seed
    mixed ^= mixed >> 29
    return _signed(mixed * ODD)


def weights(workers: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """The hashes of many pairs. 64-bit integers wrap around; int64 saves the cast to unsigned."""
    mixed = workers + 1
    mixed *= GOLDEN
    mixed ^= seed
    mixed ^= mixed >> 29
    mixed *= ODD
    return mixed


def _signed(number: int) -> int:
    return ((number + HALF) & MASK) - HALF
