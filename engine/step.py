"""One engine step as the runner sees it: flat arrays, made by the scheduler, torch-free.

Owns the shapes between scheduler and runner. Knows no policy and no device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.wire import Sampling

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class History(NamedTuple):
    """What a sequence has said and was told: penalties are counted from it anew, so a resumed one needs no more."""

    ids: Int32
    prompt_len: int


class Masked(NamedTuple):
    """Which ids some sampled rows may take. A row whose grammar failed has a message and no bits."""

    rows: list[int]
    bits: Int32  # [rows, words] bit i of word i // 32
    messages: dict[int, str]


class Masks(Protocol):
    """Grammar masks of a step, made beside its computation."""

    def take(self) -> Masked:
        """Wait for them."""


class Score(NamedTuple):
    """Log-probabilities of one sampled row, before any setting: of the choice, and of the likeliest, best first."""

    chosen: float
    top_ids: tuple[int, ...]
    top: tuple[float, ...]


DROPS_WEIGHTS = 2  # from this level of sleep on; below it the device's KV alone is let go


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows of all sequences of a step, one sequence after the other, decodes (one row) and chunks alike."""

    ids: Int32  # [rows]
    positions: Int32  # [rows]
    write_slots: Int64  # [rows] block * block_tokens + offset; -1 writes nowhere
    row_starts: Int32  # [sequences + 1] where each sequence's rows begin
    contexts: Int32  # [sequences] tokens visible to its last row, that row included
    block_tables: Int32  # [sequences, blocks] padded with 0
    sample_rows: Int32  # [sampled] the rows whose next token is wanted
    sampling: tuple[Sampling, ...]  # one each sampled row
    sample_positions: Int32  # [sampled] output index of the wanted token, from 0: with the seed it keys the randomness
    histories: Mapping[int, History] = field(default_factory=dict)  # by sampled row, of those with penalties
    masks: Masks | None = None
    # Rows of prompts whose next token is known and to be scored, those tokens, and how many likeliest beside each.
    scored_rows: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    scored_ids: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    scored_tops: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    # [sequences] tokens that its blocks can hold, or empty: not said. A runner may compute ahead within them.
    room: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    ends_prompts: bool = False  # no prompt is left that could be computed: its sequences decode next ...
    is_last: bool = False  # ... unless each of them ends with the token that it gets


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the device answered. `is_bad` marks rows whose logits were not finite: that sequence alone fails."""

    ids: Int32  # [sampled]
    is_bad: npt.NDArray[np.bool_]  # [sampled]
    seconds: float
    scores: Mapping[int, Score] = field(default_factory=dict)  # by sampled row, of those that asked
    messages: Mapping[int, str] = field(default_factory=dict)  # why a row is bad, if not for its logits
    prompt_scores: list[Score] = field(default_factory=list)  # one each scored row
    more: Mapping[int, list[int]] = field(default_factory=dict)  # by sampled row: tokens behind its own, drafted right


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rest of the engine must know of a loaded model."""

    name: str  # as clients ask for it
    digest: str  # of the weights: part of every chain key
    device: str  # "cpu", "cuda:0 NVIDIA H100"; for people
    kv_dtype: str
    vocab_size: int
    context_max: int
    eos_ids: tuple[int, ...]


HOST_BYTES_PER_S = 2e9  # a device in host memory copies by memcpy: a core's, halved
Copied = Callable[[], float]  # waits until blocks are copied; the seconds that the copies took, without waiting
Fence = object  # a device's own mark in the order of its steps


class KVMemory(Protocol):
    """The device's KV as the tiers below it see it: whole blocks as bytes. Copies begin off the step's thread, those
    of either way in one thread each. No step launched since writes a block that is being copied; what steps launched
    before may still write lies behind the fence."""

    @property
    def block_bytes(self) -> int:
        """KV of one block over all layers."""

    @property
    def first_bytes_per_s(self) -> float:
        """How fast blocks come in from ordinary memory: a guess, until some were timed."""

    def fence(self) -> Fence:
        """Behind all steps launched so far. By the step's thread."""

    def save(self, blocks: Sequence[int], into: Sequence[Bytes], /) -> Copied:
        """Begin to copy readable blocks out."""

    def load(self, blocks: Sequence[int], payloads: Sequence[Bytes], after: Fence, /) -> Copied:
        """Begin to copy blocks in, behind the fence."""


@runtime_checkable
class Pinner(Protocol):
    """KV memory whose device copies at its link's full speed from and to host memory that is locked for it."""

    @property
    def pinned_bytes_per_s(self) -> float:
        """How fast blocks come in from there: a guess, until some were timed."""

    def pin(self, memory: Bytes) -> None:
        """Lock memory for the device, in any thread. A copy lies in one such piece or in none. Raises OSError."""

    def unpin(self, memory: Bytes) -> None:
        """Undo `pin`, of the same memory. No copy from or to it may be under way."""


@runtime_checkable
class Sharer(Protocol):
    """KV memory of which other processes copy a part, by themselves where they have mapped the same host memory."""

    def share(self, payloads: Bytes, offset: int) -> None:
        """What of the pool is mapped here, and where in its file that begins."""


def at_once(copy: Callable[[int, Bytes], None], blocks: Sequence[int], payloads: Sequence[Bytes]) -> Copied:
    """Copies of a device that lies in host memory: done when begun."""
    started = time.perf_counter()
    for block, payload in zip(blocks, payloads, strict=True):
        copy(block, payload)
    seconds = time.perf_counter() - started
    return lambda: seconds


@runtime_checkable
class Renewable(Protocol):
    """A runner whose weights can be changed while it serves."""

    def prepare(self, folder: Path) -> Callable[[], None]:
        """Load other weights of the same shape, in any thread; calling the result, between two steps, puts them in
        place. Raises ModelError."""


@runtime_checkable
class Sleeper(Protocol):
    """A runner that can give its memory back and take it again. Between the two, no step and no copy of a block."""

    def sleep(self, level: int) -> None:
        """Let go of KV memory, and from level 2 on of the weights. Between two steps; a deeper sleep may follow."""

    def wake(self) -> Callable[[], None]:
        """Load what was let go, in any thread; calling the result puts it in place. Raises ModelError."""


class Runner(Protocol):
    """Computes steps on one device. Owns weights and KV memory; `block` numbers are the scheduler's."""

    @property
    def blocks_total(self) -> int:
        """KV blocks that fit."""

    @property
    def kv(self) -> KVMemory | None:
        """Its KV memory, for the tiers below; None where it cannot be copied."""

    def run(self, batch: StepBatch) -> StepResult:
        """Compute one step: write KV, sample. Raises only on what is our own fault."""
