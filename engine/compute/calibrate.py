"""Calibration: a second of made-up steps at start, so that the first request already meets a planner that knows speed.

Owns the shapes tried. Writes no KV (slot -1) and reads whatever blocks hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.kv.blocks import BlockTrie
from engine.scheduling.launch import NOWHERE
from engine.step import Runner, StepBatch
from engine.wire import Sampling
from policies.costs import StepFeatures, StepFit, StepModel


@dataclass(frozen=True, slots=True)
class Shape:
    """One step: so many decodes behind `context` tokens each, and a chunk behind as many."""

    decodes: int
    chunk: int
    context: int


# The most telling first: a small model on a busy core has time for eight of them. With 25 % noise and one second, the
# worst of five predictions on four simulated devices is off by 1.8 x (15 x with shapes from cheap to dear).
SHAPES = (
    Shape(1, 0, 16),
    Shape(0, 64, 0),
    Shape(8, 0, 512),
    Shape(1, 64, 1024),
    Shape(2, 0, 16),
    Shape(0, 128, 0),
    Shape(4, 16, 256),
    Shape(1, 0, 2048),
    Shape(0, 256, 0),
    Shape(0, 512, 0),
)


GPU_SHAPES = (
    Shape(1, 0, 512),
    Shape(0, 512, 0),
    Shape(64, 0, 512),
    Shape(0, 2048, 0),
    Shape(8, 256, 2048),
    Shape(256, 0, 512),
    Shape(0, 64, 0),
    Shape(1, 0, 8192),
    Shape(32, 0, 2048),
    Shape(0, 1024, 8192),
    Shape(128, 0, 64),
)


def calibrate(
    runner: Runner,
    fit: StepFit,
    trie: BlockTrie,
    budget_s: float,
    clock: Callable[[], float],
    *,
    shapes: tuple[Shape, ...] = SHAPES,
) -> StepModel:
    """Run shapes round and round until the time is up; the first step of all only warms up."""
    tokens_max = trie.blocks_total * trie.block_tokens
    shapes = tuple(shape for shape in shapes if shape.context + max(shape.chunk, 1) <= tokens_max)
    runner.run(batch_of(shapes[0], trie.block_tokens)[0])
    until, count = clock() + budget_s, 0
    while clock() < until:
        shape = shapes[count % len(shapes)]
        count += 1
        batch, features = batch_of(shape, trie.block_tokens, trie.blocks_total)
        if count == 1 or fit.model.step_s(features) <= until - clock():
            fit.observe(features, runner.run(batch).seconds)
        elif shape == shapes[0]:
            break
    return fit.publish()


def batch_of(shape: Shape, block_tokens: int, blocks: int = 1) -> tuple[StepBatch, StepFeatures]:
    """A made-up step of this shape, which reads so many blocks in turn."""
    sizes = np.array([1] * shape.decodes + ([shape.chunk] if shape.chunk else []), dtype=np.int64)
    contexts = shape.context + sizes
    starts = np.concatenate(([0], np.cumsum(sizes)))
    rows, width = int(starts[-1]), int(-(-contexts.max() // block_tokens))
    batch = StepBatch(
        ids=np.zeros(rows, dtype=np.int32),
        positions=(np.arange(rows) - np.repeat(starts[:-1], sizes) + shape.context).astype(np.int32),
        write_slots=np.full(rows, NOWHERE, dtype=np.int64),
        row_starts=starts.astype(np.int32),
        contexts=contexts.astype(np.int32),
        block_tables=np.arange(len(sizes) * width, dtype=np.int32).reshape(len(sizes), width) % blocks,
        sample_rows=(starts[1:] - 1).astype(np.int32),
        sampling=(Sampling(temperature=0.0),) * len(sizes),
        sample_positions=np.zeros(len(sizes), dtype=np.int32),
    )
    chunk_context = int(shape.chunk * (shape.context + shape.chunk / 2))
    return batch, StepFeatures(rows, shape.decodes * shape.context, chunk_context, len(sizes))
