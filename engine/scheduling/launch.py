"""A step between launch and collect: whom it computes, how many tokens of each, and the arrays the runner gets.

Owns the order of rows (decodes first, then chunks). Never reserves a block."""

from __future__ import annotations

from itertools import islice

import numpy as np

from engine.compute.masks import Follower
from engine.kv.blocks import Block
from engine.scheduling.sequence import WAITING, Sequence
from engine.scheduling.table import Table, join
from engine.step import Int32, Int64, Score, StepBatch, StepResult
from policies.costs import StepFeatures
from policies.step_plan import BatchView, Chunk, StepPlan

NOTHING: Int32 = np.zeros(0, np.int32)
NOWHERE = -1  # a write slot: the KV is there already


class Launch:
    """Built by the scheduler; `build` seals it."""

    def __init__(self, view: BatchView, plan: StepPlan, residents: Int64, everyone: list[Sequence], now: float) -> None:
        self.view = view
        self.plan = plan
        self.now = now
        self.twins: list[tuple[Sequence, int, Block]] = []  # (sequence, block index, who holds the same tokens)
        self.rows: Int64 = np.empty(0, dtype=np.int64)  # of the table
        self.tokens: Int64 = np.empty(0, dtype=np.int64)
        self.sampled: list[Sequence] = []
        self.sampled_rows: Int64 = np.empty(0, dtype=np.int64)
        self.has_preempted = False
        self.full_links: frozenset[int] = frozenset()  # who listens there does not read: these give way first
        self.features = StepFeatures(0)
        self._table: Table
        self._block_tokens = 0
        self.grammars: dict[int, Follower] = {}  # by sampled row
        self.ends_prompts = False  # of all in the view, and all of them
        self._residents = residents  # rows of the table; the view's rows in front
        self._everyone = everyone
        self._decodes: list[Sequence] = []
        self._decode_rows: Int64 = np.empty(0, dtype=np.int64)
        self._chunks: list[tuple[Chunk, Sequence, int, bool]] = []  # (chunk, sequence, context, is read-only)
        self._launched: set[int] = set()

    def sequence(self, number: int) -> Sequence:
        """The one behind a row of the view."""
        return self._everyone[number]

    def rows_of(self, numbers: Int64) -> Int64:
        """Rows of the table of residents of the view."""
        return self._residents[numbers]

    def is_resident(self, number: int) -> bool:
        """Whether a row of the view had KV when the step was planned."""
        return number < len(self._residents)

    @property
    def is_pure_decode(self) -> bool:
        """Every row of the view decodes, and nobody lost its KV for it."""
        is_changed = bool(self._chunks or len(self.plan.paused) or self.has_preempted)
        return not is_changed and len(self.rows) == len(self._everyone)

    def preemptable(self) -> list[Sequence]:
        """Residents that this step does not write to yet."""
        return [
            s for s in self._everyone[: len(self._residents)] if s.row != WAITING and s.serial not in self._launched
        ]

    def add_chunk(self, chunk: Chunk, sequence: Sequence, context: int, *, is_read_only: bool) -> None:
        """Compute prompt tokens behind `context`."""
        self._launched.add(sequence.serial)
        self._chunks.append((chunk, sequence, context, is_read_only))

    def decodes(self) -> tuple[Int64, list[Sequence]]:
        """Rows and sequences that compute their newest token: as planned, less whoever was preempted since."""
        rows, numbers = self._residents[self.plan.decodes], self.plan.decodes.tolist()
        sequences = [self._everyone[number] for number in numbers]
        if self.has_preempted:
            sequences = [sequence for sequence in sequences if sequence.row != WAITING]
            rows = np.array([sequence.row for sequence in sequences], dtype=np.int64)
        self._decode_rows, self._decodes = rows, sequences
        return rows, sequences

    def build(self, table: Table, block_tokens: int) -> bool:
        """Settle who is in; False if the step is empty."""
        if not (self._decodes or self._chunks):
            return False
        decodes, chunks = self._decode_rows, self._chunks
        self.plan = self.plan._replace(chunks=tuple(chunk for chunk, *_ in chunks))
        sizes = [chunk.tokens for chunk, *_ in chunks]
        before = [context for *_, context, _ in chunks]
        self.rows = join(decodes, [s.row for _, s, *_ in chunks])
        self.tokens = join(np.ones(len(decodes), dtype=np.int64), sizes)
        # A decode wants its next token; a chunk does if it ends its prompt.
        ended = [s for (chunk, s, at, _) in chunks if at + chunk.tokens == s.length]
        self.sampled_rows = join(decodes, [s.row for s in ended])
        self.sampled = self._decodes + ended
        is_all = len(ended) == len(chunks) and not (len(self.plan.paused) or self.has_preempted)
        self.ends_prompts = is_all and np.count_nonzero(self.view.is_decoding) == len(self._everyone) - len(ended)
        self.grammars = {at: s.grammar for at, s in enumerate(self.sampled) if s.grammar is not None}
        self.features = StepFeatures(
            rows=len(decodes) + sum(sizes),
            decode_context=int(table.context[decodes].sum()),
            chunk_context=int(sum(size * (context + size / 2) for size, context in zip(sizes, before, strict=True))),
            sequences=len(self.rows),
        )
        self._table, self._block_tokens = table, block_tokens
        return True

    @property
    def batch(self) -> StepBatch:
        """The arrays for the runner, made when asked for: once, before collect, by whoever has a device."""
        table, block_tokens, decodes, chunks = self._table, self._block_tokens, self._decode_rows, self._chunks
        before = table.context[self.rows]
        starts = np.concatenate(([0], np.cumsum(self.tokens)))
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - before, self.tokens)
        blocks = table.block_table[np.repeat(self.rows, self.tokens), positions // block_tokens].astype(np.int64)
        slots = blocks * block_tokens + positions % block_tokens
        for at, (_, _, _, is_read_only) in enumerate(chunks, start=len(decodes)):
            if is_read_only:
                slots[starts[at] : starts[at + 1]] = NOWHERE
        ids = [s.ids[context : context + chunk.tokens] for chunk, s, context, _ in chunks]
        contexts = before + self.tokens
        wants = contexts == table.length[self.rows]
        scored = self._scored(starts) if any(s.needs_all_rows for _, s, *_ in chunks) else (NOTHING,) * 3
        return StepBatch(
            ids=np.concatenate((table.last_id[decodes], *ids)),
            positions=positions.astype(np.int32),
            write_slots=slots,
            row_starts=starts.astype(np.int32),
            contexts=contexts.astype(np.int32),
            block_tables=table.block_table[self.rows, : int(table.blocks[self.rows].max())],
            sample_rows=(starts[1:] - 1)[wants].astype(np.int32),
            sampling=tuple(s.sampling for s in self.sampled),
            sample_positions=table.emitted[self.sampled_rows].astype(np.int32),
            histories={at: s.history for at, s in enumerate(self.sampled) if s.has_penalties},
            room=(table.blocks[self.rows] * block_tokens).astype(np.int32),
            ends_prompts=self.ends_prompts,
            is_last=all(s.length + 1 >= s.length_max for s in self.sampled),
            scored_rows=scored[0],
            scored_ids=scored[1],
            scored_tops=scored[2],
        )

    def _scored(self, starts: Int64) -> tuple[Int32, Int32, Int32]:
        """Rows of prompts whose next tokens are to be scored, those tokens, and how many likeliest beside each."""
        rows, ids, tops = [], [], []
        for at, (chunk, sequence, context, _) in enumerate(self._chunks, start=len(self._decodes)):
            if sequence.needs_all_rows:
                count = min(chunk.tokens, sequence.prompt_len - 1 - context)
                rows.append(np.arange(starts[at], starts[at] + count))
                ids.append(sequence.ids[context + 1 : context + 1 + count])
                tops.append(np.full(count, sequence.sampling.logprobs))
        parts = [np.concatenate(part).astype(np.int32) for part in (rows, ids, tops)]
        return parts[0], parts[1], parts[2]

    def hear_scores(self, scores: list[Score]) -> None:
        """Those of the rows that were to be scored, in order. What was told of rows that are computed again goes."""
        told = iter(scores)
        for chunk, sequence, context, _ in self._chunks:
            if sequence.prompt_scores is not None and sequence.needs_all_rows:
                count = min(chunk.tokens, sequence.prompt_len - 1 - context)
                sequence.prompt_scores[context:] = islice(told, count)

    def contexts_and_classes(self) -> tuple[Int64, Int64]:
        """Of each sequence: tokens before this step, and its class. Before collect."""
        return self._table.context[self.rows], self._table.request_class[self.rows]

    def hold_back(self, late: frozenset[int], result: StepResult) -> StepResult:
        """Sampled rows whose mask came too late say nothing: they sit out steps until it is there, then compute their
        newest row again. What is left of the result."""
        if not late:
            return result
        spoken = [at for at in range(len(self.sampled)) if at not in late]
        self._table.hold_back(self.sampled_rows[sorted(late)])
        kept = np.array(spoken, dtype=np.int64)
        self.sampled, self.sampled_rows = [self.sampled[at] for at in spoken], self.sampled_rows[kept]
        place = {at: new for new, at in enumerate(spoken)}
        return StepResult(
            result.ids[kept],
            result.is_bad[kept],
            result.seconds,
            scores={place[at]: score for at, score in result.scores.items() if at in place},
            messages={place[at]: message for at, message in result.messages.items() if at in place},
            prompt_scores=result.prompt_scores,
        )
