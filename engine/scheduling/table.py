"""Resident sequences as arrays: one row each from admission to end, so that a step is planned and built without loops.

Owns the rows and the block table. Never decides who gets one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.kv.blocks import Block
from engine.scheduling.sequence import WAITING, Sequence
from engine.step import Int32, Int64
from policies.step_plan import BatchView, Owed

CATCH_UP = 0.9  # of its pace, which a stream behind its line is held to: held to all of it, it stays behind for ever


class Table:
    """Rows of sequences that hold KV. `context` counts computed tokens, `length` known ones."""

    def __init__(self, rows: int, blocks_max: int) -> None:
        self.sequences: list[Sequence | None] = [None] * rows
        self._free = list(range(rows))[::-1]
        self.is_used = np.zeros(rows, dtype=bool)
        self.is_decoding = np.zeros(rows, dtype=bool)  # it has sampled since it was added
        self.is_restoring = np.zeros(rows, dtype=bool)  # its blocks are on their way up
        self.is_late = np.zeros(rows, dtype=bool)  # its grammar's mask is in the making
        self.request_class = np.zeros(rows, dtype=np.int64)
        self.context = np.zeros(rows, dtype=np.int64)
        self.length = np.zeros(rows, dtype=np.int64)
        self.emitted = np.zeros(rows, dtype=np.int64)
        self.output_max = np.zeros(rows, dtype=np.int64)
        self.blocks = np.zeros(rows, dtype=np.int64)
        self.link = np.zeros(rows, dtype=np.int64)
        self.last_id = np.zeros(rows, dtype=np.int32)
        self.due = np.zeros(rows)
        self.first_due = np.zeros(rows)
        self.pace_s = np.zeros(rows)
        self.deadline = np.zeros(rows)
        self.arrived = np.zeros(rows)
        self.block_table = np.zeros((rows, blocks_max), dtype=np.int32)
        self.tokens_max = 0  # of all, if every answer is as long as it may be

    @property
    def has_row(self) -> bool:
        """Whether another sequence can be added."""
        return bool(self._free)

    @property
    def count(self) -> int:
        """Rows in use."""
        return len(self.sequences) - len(self._free)

    def at(self, rows: Int64) -> list[Sequence]:
        """The sequences of used rows."""
        return [sequence for row in rows.tolist() if (sequence := self.sequences[row]) is not None]

    def add(self, sequence: Sequence, context: int) -> None:
        """Give a sequence, with the blocks it has so far, a row."""
        assert sequence.row == WAITING
        row = sequence.row = self._free.pop()
        self.sequences[row] = sequence
        self.is_used[row] = True
        self.tokens_max += most_tokens(sequence)
        self.is_decoding[row] = False
        self.request_class[row] = sequence.request_class
        self.context[row] = context
        self.length[row] = sequence.length
        self.emitted[row] = sequence.output_tokens
        self.output_max[row] = sequence.sampling.max_tokens
        self.link[row] = sequence.link
        self.last_id[row] = sequence.ids[sequence.length - 1]
        self.due[row] = sequence.next_due()
        self.first_due[row] = sequence.first_due
        self.pace_s[row] = sequence.pace_s
        self.arrived[row] = sequence.submitted_at
        self.deadline[row] = sequence.deadline
        self.blocks[row] = 0
        self.show_blocks(sequence)

    def show_blocks(self, sequence: Sequence) -> None:
        """Blocks were added to the sequence."""
        known, row = int(self.blocks[sequence.row]), sequence.row
        self.block_table[row, known : len(sequence.blocks)] = [block.id for block in sequence.blocks[known:]]
        self.blocks[row] = len(sequence.blocks)

    def extend(self, sequences: list[Sequence], blocks: list[Block]) -> None:
        """One more block for each."""
        for sequence, block in zip(sequences, blocks, strict=True):
            sequence.blocks.append(block)
        rows = np.array([sequence.row for sequence in sequences], dtype=np.int64)
        self.block_table[rows, self.blocks[rows]] = [block.id for block in blocks]
        self.blocks[rows] += 1

    def advance(self, rows: Int64, tokens: Int64) -> None:
        """A step computed so many tokens of each row."""
        self.context[rows] += tokens

    def skip(self, rows: Int64, steps: int) -> None:
        """So many steps computed and sampled one token of each decoding row; the next `emit` sets when one is due."""
        self.context[rows] += steps
        self.length[rows] += steps
        self.emitted[rows] += steps

    def emit(self, rows: Int64, ids: Int32, now: float) -> None:
        """A step sampled one token for each row."""
        # Early or late, the first token begins the line: the mean pace that a client sees counts from it.
        begun = rows[~self.is_decoding[rows] & (self.emitted[rows] == 0)]
        self.first_due[begun] = now
        self.is_decoding[rows] = True
        self.last_id[rows] = ids
        self.length[rows] += 1
        self.emitted[rows] += 1
        by_line = self.first_due[rows] + self.emitted[rows] * self.pace_s[rows]
        # What fell behind its line comes back to it by and by: no step could make it up at once.
        self.due[rows] = np.maximum(by_line, now + CATCH_UP * self.pace_s[rows])

    def emit_more(self, rows: Int64, more: Mapping[int, list[int]], now: float) -> None:
        """Drafts behind tokens that were just emitted were right; their KV is there."""
        for at, ids in more.items():
            row = rows[at : at + 1]
            self.skip(row, len(ids))
            self.last_id[row] = ids[-1:] or self.last_id[row]
            by_line = self.first_due[row] + self.emitted[row] * self.pace_s[row]
            self.due[row] = np.maximum(by_line, now + CATCH_UP * self.pace_s[row])

    def hold_back(self, rows: Int64) -> None:
        """These computed their newest token in vain: as the end of a prompt they do it again. Before `advance`."""
        self.context[rows] -= 1
        self.is_decoding[rows] = False
        self.is_late[rows] = True

    def _end_lateness(self) -> None:
        if not np.count_nonzero(self.is_late):
            return
        for sequence in self.at(np.flatnonzero(self.is_late)):
            self.is_late[sequence.row] = sequence.grammar is not None and not sequence.grammar.is_ready

    def view(self, residents: Int64, heads: list[Sequence], full_links: frozenset[int], owed_s: Owed) -> BatchView:
        """These rows, then the heads of the queues, as the planner sees them."""
        context = self.context[residents]
        self._end_lateness()
        is_blocked = self.is_restoring[residents] | self.is_late[residents]
        if full_links:
            is_blocked = is_blocked | np.isin(self.link[residents], sorted(full_links))
        return BatchView(
            request_class=join(self.request_class[residents], [s.request_class for s in heads]),
            due=join(self.due[residents], [s.next_due() for s in heads]),
            pace_s=join(self.pace_s[residents], [s.pace_s for s in heads]),
            context=join(context, [s.length - s.uncached_estimate for s in heads]),
            pending=join(self.length[residents] - context, [s.uncached_estimate for s in heads]),
            arrived=join(self.arrived[residents], [s.submitted_at for s in heads]),
            deadline=join(self.deadline[residents], [s.deadline for s in heads]),
            is_decoding=join(self.is_decoding[residents], [False] * len(heads)),
            is_blocked=join(is_blocked, [False] * len(heads)),
            owed_s=owed_s,
        )

    def remove(self, sequence: Sequence) -> None:
        """The sequence gave its KV up."""
        row, sequence.row = sequence.row, WAITING
        self.sequences[row] = None
        self.is_used[row] = False
        self.tokens_max -= most_tokens(sequence)
        self.is_restoring[row] = self.is_late[row] = False
        self._free.append(row)


def most_tokens(sequence: Sequence) -> int:
    """Tokens it has if its answer is as long as it may be: the same before and after any step."""
    return sequence.prompt_len + sequence.sampling.max_tokens


def join(residents: npt.NDArray[Any], heads: list[Any]) -> npt.NDArray[Any]:
    """A column for residents and heads."""
    if not heads:
        return residents
    return np.concatenate((residents, np.array(heads, dtype=residents.dtype)))
