"""Grammar masks of a step, filled in threads of their own while the device computes the logits that they cover.

Owns those threads and the masks in the making. A slow mask, or a grammar that outran its fuel, costs its own sequence
alone. Never moves a grammar over a token by itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np

from engine.step import Int32, Masked

THREADS_MAX = 4  # so many slow masks at once delay no other
LATE_S = 0.01  # what a step waits for masks once its logits are there; most take microseconds, the worst seen 110 ms


class GrammarError(Exception):
    """The client's grammar is malformed, unsupported, impossible or too large; the message says which."""


class Grammar(Protocol):
    """Where one sequence stands in its grammar. engine.compute.grammar alone needs a library for it."""

    @property
    def mask_words(self) -> int:
        """32 ids each."""

    def fill(self, mask: Int32) -> None:
        """Set the bits of the ids that may come next. Raises GrammarError."""

    def accept(self, token: int) -> None:
        """Step over a token. Raises GrammarError."""


class Follower:
    """A sequence's grammar, and the mask of its next token."""

    __slots__ = ("bits", "filled_s", "grammar", "job", "message")

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.job: Future[None] | None = None  # fills `bits`; None: not begun
        self.bits: Int32 | None = None
        self.message = ""  # why the grammar cannot go on
        self.filled_s = 0.0  # what the last mask took

    @property
    def is_ready(self) -> bool:
        """Whether a step would not wait for its mask."""
        return self.bits is not None or self.job is None or self.job.done()

    def accept(self, token: int) -> None:
        """Step over a token. Raises GrammarError."""
        self.grammar.accept(token)
        self.job = self.bits = None

    def fill(self) -> None:
        """Make the mask."""
        started, bits = time.monotonic(), np.zeros(self.grammar.mask_words, np.int32)
        try:
            self.grammar.fill(bits)
        except GrammarError as error:
            bits[:] = 0
            self.message = f"the grammar could not go on: {error}"
        if not self.message and not bits.any():
            self.message = "the grammar could not go on: it leaves no token"
        self.filled_s = time.monotonic() - started
        self.bits = bits  # last: from here on others read


class MaskMaker:
    """The threads, made when the first grammars come."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS_MAX, "masks")

    def start(self, grammars: Mapping[int, Follower]) -> MaskJob:
        """Begin to fill the masks of these sampled rows, the slow ones last. No grammar may move until its mask is
        taken."""
        new = sorted((one for one in grammars.values() if one.job is None), key=lambda one: one.filled_s)
        if new:
            job = self._threads.submit(fill, new)
            for one in new:
                one.job = job
        return MaskJob(grammars)


class MaskJob:
    """engine.step.Masks of one step."""

    def __init__(self, grammars: Mapping[int, Follower]) -> None:
        self._grammars = grammars
        self.late: frozenset[int] = frozenset()  # rows whose mask was not there when it was to be taken

    def take(self) -> Masked:
        """Those that are there within LATE_S."""
        done, _ = wait({one.job for one in self._grammars.values() if one.job}, timeout=LATE_S)
        for job in done:
            job.result()
        ready = {row: one for row, one in self._grammars.items() if one.bits is not None}
        self.late = frozenset(self._grammars) - frozenset(ready)
        words = next(iter(self._grammars.values())).grammar.mask_words
        bits = np.array([one.bits for one in ready.values()], np.int32).reshape(len(ready), words)
        return Masked(list(ready), bits, {row: one.message for row, one in ready.items() if one.message})


def fill(followers: Sequence[Follower]) -> None:
    """The masks, one after the other."""
    for one in followers:
        one.fill()
