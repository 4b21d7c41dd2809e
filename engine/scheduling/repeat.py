"""Runs of decode steps that nothing can change: how long one is, and its effect at once instead of step by step.

Owns the arithmetic of a run. Never plans: each step of a run is the one that the planner would repeat. For whoever
turns the scheduler in virtual time; a device computes its steps one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.kv.blocks import BlockTrie
from engine.scheduling.holdings import Holdings
from engine.scheduling.launch import Launch
from engine.scheduling.table import Table
from engine.step import Int64
from policies.costs import Floats, StepModel

Commit = Callable[[Launch, float], None]


def run_length(step: Launch, table: Table, trie: BlockTrie, model: StepModel) -> int:
    """How many steps in a row, `step` included, compute just the same sequences; 1 where the planner might differ."""
    rows = step.rows
    if not step.is_pure_decode or len(rows) != table.count:
        return 1
    size = trie.block_tokens
    steps = min(size, *(s.length_max - s.length for s in step.sampled))
    until_block = _steps_until_block(table, step, size)
    if len(due := np.sort(until_block[until_block < steps])) > trie.available:
        steps = int(due[trie.available])  # the first step that would need a victim is planned anew
    if len(set(table.request_class[rows].tolist())) > 1:
        context = int(table.context[rows].sum()) + len(rows) * steps
        if model.decode_s(len(rows), context) > float(table.pace_s[rows].min()):
            return 1  # somebody may have to pause
    return max(1, steps)


def step_times(step: Launch, model: StepModel, steps: int) -> Floats:
    """Predicted seconds of each step of a run."""
    first, rows = step.features, step.features.rows
    contexts = first.decode_context + rows * np.arange(steps, dtype=np.int64)
    dense_s = max(model.floor_s, model.row_s * rows)
    attention_s = model.decode_context_s * contexts + model.chunk_context_s * first.chunk_context
    seconds_s = model.bias * (dense_s + model.base_s + attention_s + model.sequence_s * first.sequences)
    return np.asarray(seconds_s, dtype=np.float64)


def advance(
    step: Launch, ids: Sequence[int], ends: Sequence[float], table: Table, holdings: Holdings, *, commit: Commit
) -> None:
    """All but the last step of a run: each ended at one of `ends` and sampled the same `ids`. What is left of `step`
    is its last step, to be collected as any other."""
    rows, steps, size = step.rows, len(ends), holdings.block_tokens
    before = table.context[rows]
    until_block = _steps_until_block(table, step, size)
    for sequence, token in zip(step.sampled, ids, strict=True):
        sequence.extend(token, steps)
    due = sorted({*until_block.tolist(), *((-before - 1) % size).tolist()})
    for after in (number for number in due if 0 < number <= steps):
        now = ends[after - 1]
        commit(step, now)
        for at in np.flatnonzero(until_block == after).tolist():
            holdings.take(step.sampled[at], 1, now)
        for at in np.flatnonzero((before + after + 1) % size == 0).tolist():
            step.twins += holdings.publish(step.sampled[at], int(before[at]) + after, 1)
    table.skip(rows, steps)


def _steps_until_block(table: Table, step: Launch, size: int) -> Int64:
    """After how many more steps each sequence begins a block; the step that was launched has its block."""
    left: Int64 = (-table.context[step.rows]) % size
    return np.where(left == 0, size, left)
