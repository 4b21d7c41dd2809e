"""How much of its own past a conversation's next prompt still is: where the first token differs.

Owns the last ids of each conversation, under a bound of bytes. Decides nothing: it is a figure for people."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.kv.keys import Ids

Halves = npt.NDArray[np.uint64]  # of chain keys: two of them are one


class Tokens(Protocol):
    """A prompt: its ids, and the chain keys of its full blocks."""

    @property
    def ids(self) -> Ids: ...
    @property
    def chain(self) -> bytes: ...


Last = tuple[Tokens, Ids]  # a prompt and its answer, as they lie elsewhere


class Lineages:
    """The last prompt and answer by conversation, least recently used out first."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._last: OrderedDict[bytes, Last] = OrderedDict()
        self.bytes_held = 0

    def lost_tokens(self, name: bytes, prompt: Tokens, block_tokens: int) -> int | None:
        """Tokens of the last turn, its answer too, behind the first that the next prompt has not."""
        last = self._last.get(name)
        if last is None:
            return None
        before, answer = last
        named = _common(_keys(before), _keys(prompt)) // 2 * block_tokens  # equal keys are equal tokens
        common = named + _common(before.ids[named:], prompt.ids[named:])
        if common == len(before.ids):
            common += _common(answer, prompt.ids[common:])
        return len(before.ids) + len(answer) - common

    def keep(self, name: bytes, prompt: Tokens, answer: Ids) -> None:
        """What the conversation is now."""
        old = self._last.pop(name, None)
        self.bytes_held += _size((prompt, answer)) - (_size(old) if old is not None else 0)
        self._last[name] = prompt, answer
        while self.bytes_held > self._bytes_max:
            self.bytes_held -= _size(self._last.popitem(last=False)[1])


def _keys(tokens: Tokens) -> Halves:
    return np.frombuffer(tokens.chain, "<u8")


def _common(last: Ids | Halves, now: Ids | Halves) -> int:
    """How many values both begin with."""
    common = min(len(last), len(now))
    if common == 0:
        return 0
    same = last[:common] == now[:common]
    first = int(same.argmin())
    return common if same[first] else first


def _size(last: Last) -> int:
    return last[0].ids.nbytes + len(last[0].chain) + last[1].nbytes
