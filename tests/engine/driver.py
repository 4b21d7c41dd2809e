"""A small driver for runner tests: prompts in, greedy ids out, over real pages.

Owns shuffled block tables and how prompts are cut into chunks. Knows nothing of the engine's scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.step import StepBatch
from engine.wire import Sampling

GREEDY = Sampling(temperature=0.0)


@dataclass(slots=True)
class Generation:
    """One sequence: its ids so far, how many have KV, and its blocks."""

    ids: list[int]
    prompt: int
    blocks: list[int]
    sampling: Sampling = GREEDY
    computed: int = 0
    is_bad: bool = False

    @property
    def output(self) -> list[int]:
        return self.ids[self.prompt :]


@dataclass(slots=True)
class Blocks:
    """Free blocks, handed out in a shuffled order so that no test passes because tables happen to be contiguous."""

    total: int
    block_tokens: int
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = np.random.default_rng(7).permutation(self.total).tolist()

    def start(self, prompt: list[int], new: int, sampling: Sampling = GREEDY) -> Generation:
        count = -(-(len(prompt) + new) // self.block_tokens)
        return Generation(list(prompt), len(prompt), [self.free.pop() for _ in range(count)], sampling)

    def give(self, generation: Generation) -> None:
        self.free.extend(generation.blocks)


def batch_of(turns: list[tuple[Generation, int]], block_tokens: int) -> StepBatch:
    """One step that computes the next `rows` rows of each generation; those that reach their end are sampled."""
    ids, positions, slots, starts, sample_rows, wanted = [], [], [], [0], [], []
    for generation, rows in turns:
        for position in range(generation.computed, generation.computed + rows):
            ids.append(generation.ids[position])
            positions.append(position)
            slots.append(generation.blocks[position // block_tokens] * block_tokens + position % block_tokens)
        starts.append(len(ids))
        if generation.computed + rows == len(generation.ids):
            sample_rows.append(len(ids) - 1)
            wanted.append(generation)
    tables = np.zeros((len(turns), max(len(generation.blocks) for generation, _ in turns)), np.int32)
    for row, (generation, _) in enumerate(turns):
        tables[row, : len(generation.blocks)] = generation.blocks
    return StepBatch(
        ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int32),
        write_slots=np.array(slots, np.int64),
        row_starts=np.array(starts, np.int32),
        contexts=np.array([generation.computed + rows for generation, rows in turns], np.int32),
        block_tables=tables,
        sample_rows=np.array(sample_rows, np.int32),
        sampling=tuple(generation.sampling for generation in wanted),
        sample_positions=np.array([len(generation.output) for generation in wanted], np.int32),
    )
