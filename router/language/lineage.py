"""How much of its own past a conversation's next prompt still is: where the first token differs.

Owns the last ids of each conversation, under a bound of bytes. Decides nothing: it is a figure for people."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from engine.kv.keys import Ids


class Lineages:
    """The last prompt and answer by conversation, least recently used out first."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._last: OrderedDict[bytes, Ids] = OrderedDict()
        self.bytes_held = 0

    def lost_tokens(self, name: bytes, ids: Ids) -> int | None:
        """Tokens of the last turn, its answer too, behind the first that the next prompt has not."""
        last = self._last.get(name)
        if last is None:
            return None
        common = min(len(last), len(ids))
        differing = np.flatnonzero(last[:common] != ids[:common])
        return len(last) - (int(differing[0]) if len(differing) else common)

    def keep(self, name: bytes, ids: Ids) -> None:
        """What the conversation is now."""
        old = self._last.pop(name, None)
        self.bytes_held += ids.nbytes - (old.nbytes if old is not None else 0)
        self._last[name] = ids
        while self.bytes_held > self._bytes_max:
            self.bytes_held -= self._last.popitem(last=False)[1].nbytes
