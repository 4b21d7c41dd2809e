"""Grammar masks of a step, filled in a thread of their own while the device computes the logits that they cover.

Owns that thread and nothing else. A grammar that outran its fuel costs its own sequence alone."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from engine.step import Int32, Masked


class GrammarError(Exception):
    """The client's grammar is malformed, unsupported, impossible or too large; the message says which."""


class Grammar(Protocol):
    """Where one sequence stands in its grammar. engine.grammar has the real one; nothing else needs its library."""

    @property
    def mask_words(self) -> int:
        """32 ids each."""

    def fill(self, mask: Int32) -> None:
        """Set the bits of the ids that may come next. Raises GrammarError."""

    def accept(self, token: int) -> None:
        """Step over a token. Raises GrammarError."""


class MaskMaker:
    """One thread, made when the first grammar comes."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "masks")

    def start(self, grammars: Mapping[int, Grammar]) -> MaskJob:
        """Begin to fill the masks of these sampled rows. The grammars must not move until they are taken."""
        return MaskJob(self._thread.submit(fill, grammars))


class MaskJob:
    """engine.step.Masks of one step."""

    def __init__(self, job: Future[Masked]) -> None:
        self._job = job

    def take(self) -> Masked:
        """Wait for them; bounded by the grammars' fuel."""
        return self._job.result()


def fill(grammars: Mapping[int, Grammar]) -> Masked:
    """The masks, one after the other."""
    words = next(iter(grammars.values())).mask_words
    bits, messages = np.zeros((len(grammars), words), np.int32), {}
    for at, (row, grammar) in enumerate(grammars.items()):
        try:
            grammar.fill(bits[at])
        except GrammarError as error:
            bits[at] = 0
            messages[row] = f"the grammar could not go on: {error}"
    return Masked(list(grammars), bits, messages)
