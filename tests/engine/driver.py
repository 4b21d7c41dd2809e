"""A small driver for runner tests: prompts in, greedy ids out, over real pages.

Owns shuffled block tables and how prompts are cut into chunks. Knows nothing of the engine's scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.compute.runner import TorchRunner
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


def advance(runner: TorchRunner, turns: list[tuple[Generation, int]]) -> None:
    """Run one step and take its tokens."""
    ends = [one for one, rows in turns if one.computed + rows == len(one.ids)]
    result = runner.run(batch_of(turns, runner.block_tokens))
    for one, rows in turns:
        one.computed += rows
    for one, token, is_bad in zip(ends, result.ids.tolist(), result.is_bad.tolist(), strict=True):
        one.ids.append(token)
        one.is_bad |= is_bad


def generate(runner: TorchRunner, blocks: Blocks, prompt: list[int], new: int, chunks: Sequence[int] = ()) -> list[int]:
    """Alone: the prompt in chunks of these sizes, what is left of it in one, then a row a step."""
    one = blocks.start(prompt, new)
    for rows in chunks:
        advance(runner, [(one, rows)])
    while len(one.output) < new:
        advance(runner, [(one, len(one.ids) - one.computed)])
    blocks.give(one)
    return one.output


def all_logits(runner: TorchRunner, ids: list[int], chunks: Sequence[int]) -> Tensor:
    """[tokens, vocab]: the logits at every position, computed in chunks of these sizes."""
    one = Blocks(runner.blocks_total, runner.block_tokens).start(ids, 0)
    parts = []
    for rows in chunks:
        batch = batch_of([(one, rows)], runner.block_tokens)
        parts.append(runner.logits(replace(batch, sample_rows=np.arange(rows, dtype=np.int32))))
        one.computed += rows
    return torch.cat(parts)
