"""Prompt lookup: what followed the same words before is drafted, and computed beside the next token in one step.

Owns drafts and when they are worth their rows. A draft counts only where it is the very token that the runner chose for
that place, with that place's own random number: the text is the one that single steps would have given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.kv.keys import Ids
from engine.scheduling.launch import Launch
from engine.scheduling.sequence import Sequence
from engine.step import Int32, StepBatch, StepResult
from policies.costs import StepFeatures, StepModel

NOTHING: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Start values; each bounds one sequence."""

    tokens_max: int = 8  # in one step
    words: int = 3  # so many tokens must have occurred before, in this order
    lookback_tokens: int = 32_768  # how far: 20 us a step


@dataclass(frozen=True, slots=True)
class Drafted:
    """A decode step with drafts: `batch` computes them, `features` say what that costs."""

    batch: StepBatch
    features: StepFeatures
    drafts: tuple[Int32, ...]  # of each sequence, empty where there is none


def lookup(ids: Ids, count: int, words: int) -> Int32:
    """Up to `count` tokens that followed the latest earlier place where the last `words` tokens stood."""
    known = len(ids) - 1
    if known < words or count < 1:
        return NOTHING
    found = ids[words - 1 : known] == ids[known]
    for back in range(1, words):
        found &= ids[words - 1 - back : known - back] == ids[known - back]
    places = np.flatnonzero(found)
    if not len(places):
        return NOTHING
    after = int(places[-1]) + words
    return ids[after : after + count].astype(np.int32)


class Speculator:
    """Stands between scheduler and runner. Only steps that decode alone are touched: a chunk's size is planned."""

    def __init__(self, block_tokens: int, vocab_size: int, limits: DraftLimits = DraftLimits()) -> None:
        self._block_tokens = block_tokens
        self._vocab_size = vocab_size
        self._limits = limits
        self.drafted = self.right = 0  # tokens, ever

    def draft(self, step: Launch, batch: StepBatch, model: StepModel) -> Drafted | None:
        """The step with drafts, if there are any that are likely to pay for themselves."""
        # Drafts move the sampled rows that masks, penalties and scores are told by: such a row keeps its step plain.
        if not step.is_pure_decode or not all(sequence.may_speculate for sequence in step.sampled):
            return None
        drafts = [self._draft(sequence, known) for sequence, known in zip(step.sampled, batch.contexts, strict=True)]
        counts = np.array([len(draft) for draft in drafts])
        if not counts.any():
            return None
        features = step.features._replace(rows=step.features.rows + int(counts.sum()))
        likely = sum(
            count * sequence.habit.right for count, sequence in zip(counts.tolist(), step.sampled, strict=True)
        )
        if model.step_s(features) * len(drafts) >= model.step_s(step.features) * (len(drafts) + likely):
            return None
        return Drafted(self._extended(batch, drafts, counts), features, tuple(drafts))

    def judge(self, step: Launch, drafted: Drafted, result: StepResult) -> StepResult:
        """The step's own tokens, and behind them what the drafts got right."""
        ends = drafted.batch.row_starts.tolist()
        more: dict[int, list[int]] = {}
        for at, (sequence, draft) in enumerate(zip(step.sampled, drafted.drafts, strict=True)):
            if len(draft):
                chosen, is_bad = result.ids[ends[at] : ends[at + 1]], result.is_bad[ends[at] : ends[at + 1]]
                more[at] = self._right(draft, chosen, is_bad)
                sequence.habit.note(len(draft), len(more[at]))
                self.drafted += len(draft)
                self.right += len(more[at])
        own = drafted.batch.row_starts[:-1]
        return StepResult(result.ids[own], result.is_bad[own], result.seconds, more=more)

    def _draft(self, sequence: Sequence, known: int) -> Int32:
        """Within the sequence's last block, its last place excepted: so no step but a plain one ever fills a block."""
        if not sequence.may_speculate or sequence.habit.is_resting():
            return NOTHING
        room = self._block_tokens - 2 - (known - 1) % self._block_tokens
        count = min(self._limits.tokens_max, room, sequence.length_max - sequence.length - 1)
        return lookup(sequence.known[-self._limits.lookback_tokens :], count, self._limits.words)

    def _right(self, draft: Int32, chosen: Int32, is_bad: np.typing.NDArray[np.bool_]) -> list[int]:
        is_wrong = (draft != chosen[:-1]) | is_bad[1:] | (chosen[1:] < 0) | (chosen[1:] >= self._vocab_size)
        right = int(is_wrong.argmax()) if is_wrong.any() else len(draft)
        accepted: list[int] = chosen[1 : right + 1].tolist()
        return accepted

    def _extended(self, batch: StepBatch, drafts: list[Int32], counts: np.typing.NDArray[np.int64]) -> StepBatch:
        size, each = self._block_tokens, counts + 1
        starts = np.concatenate(([0], np.cumsum(each)))
        behind = np.arange(starts[-1]) - np.repeat(starts[:-1], each)  # 0 for a sequence's own row
        sequences = np.repeat(np.arange(len(drafts)), each)
        positions = batch.positions[sequences] + behind
        slots = batch.block_tables[sequences, positions // size].astype(np.int64) * size + positions % size
        ids = [part for at, draft in enumerate(drafts) for part in (batch.ids[at : at + 1], draft)]
        return replace(
            batch,
            ids=np.concatenate(ids).astype(np.int32),
            positions=positions.astype(np.int32),
            write_slots=np.where(behind == 0, batch.write_slots[sequences], slots),
            row_starts=starts.astype(np.int32),
            contexts=(batch.contexts + counts).astype(np.int32),
            sample_rows=np.arange(starts[-1], dtype=np.int32),
            sampling=tuple(batch.sampling[at] for at in sequences.tolist()),
            sample_positions=(batch.sample_positions[sequences] + behind).astype(np.int32),
        )
