"""A prompt's chain keys as the router's indexes read them: one key in every few, chosen by the key itself.

Owns the sampling, so that a frame's keys, which come without their place in any chain, agree with a prompt's on which
are kept. Knows no worker and no token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEY_BYTES = 16
FEW = 32  # keys below which a loop beats numpy


@dataclass(frozen=True, slots=True)
class Chain:
    """`keys`: 16 bytes a full block. `at`: the numbers of the sampled blocks, ascending."""

    keys: bytes
    at: Sequence[int]

    def __len__(self) -> int:
        """How many keys are sampled."""
        return len(self.at)

    def key(self, number: int) -> bytes:
        """The sampled key `number`."""
        start = self.at[number] * KEY_BYTES
        return self.keys[start : start + KEY_BYTES]

    def sampled(self, begin: int = 0) -> list[bytes]:
        """The sampled keys from number `begin` on."""
        keys = self.keys
        return [keys[at * KEY_BYTES : (at + 1) * KEY_BYTES] for at in self.at[begin:]]


def sample(keys: bytes, every: int) -> Chain:
    """One key in `every` on average; all of them if that is 1."""
    count = len(keys) // KEY_BYTES
    if every == 1:
        return Chain(keys, range(count))
    if count <= FEW:
        return Chain(keys, [at for at in range(count) if not keys[at * KEY_BYTES + KEY_BYTES - 1] % every])
    is_kept = np.frombuffer(keys[KEY_BYTES - 1 :: KEY_BYTES].translate(_kept(every)), dtype=np.bool_)
    return Chain(keys, is_kept.nonzero()[0].tolist())


@functools.cache
def _kept(every: int) -> bytes:
    """For each value of a key's last byte, whether the key is sampled: one table look-up a key, half of a modulo."""
    return bytes(not value % every for value in range(256))


NO_CHAIN = Chain(b"", ())
