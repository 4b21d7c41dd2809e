"""Which steps a GPU worker prepares at its start, and which it ever captures: made-up steps that write nowhere.

Owns their shapes. Never runs one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.compute import arrange
from engine.compute.calibrate import Shape, batch_of
from engine.kernels.plan import CHUNK_PART_TOKENS, CHUNK_PARTS
from engine.models.config import ModelConfig
from engine.step import StepBatch
from engine.wire import Sampling

WARM_CONTEXTS = (2, 2048)  # without parts, and with parts where the batch is small
WARM_CHUNKS = ((64, 1), (192, 4), (4096, 32))  # rows in all, sequences
# A step is worth its capture, 60 ms while streams wait, where its kernels take longer to launch than to compute.
LAUNCH_S, LAYER_LAUNCHES = 25e-6, 12  # micro: 15-29 us a launch
PRODUCTS_FLOP_S = 600e12  # an 8B model's 512 rows take 15 ms, its launches 9
CAPTURED_ROWS_MAX = 2048  # of any model: so many of a 0.6B one take 8.4 ms kernel by kernel, and 512 as long


def captured_rows_max(config: ModelConfig) -> int:
    """Prompt rows up to which a step takes longer to launch than to compute: 384 of an 8B model."""
    row_weights = config.hidden * (2 * config.q_width + 2 * config.kv_width + 3 * config.ffn)  # of a layer
    return min(CAPTURED_ROWS_MAX, int(LAYER_LAUNCHES * LAUNCH_S * PRODUCTS_FLOP_S / (2 * row_weights)))


def warm_captured(block_tokens: int, blocks_total: int, sequences_max: int, context_max: int) -> Iterator[StepBatch]:
    """Steps that a worker captures at its start: decodes alone, one chunk alone."""
    contexts = sorted({min(context, context_max - 1) for context in WARM_CONTEXTS})
    decodes = [Shape(rows, 0, context) for rows in arrange.DECODE_BUCKETS for context in contexts]
    chunks = [Shape(0, rows, 0) for rows in arrange.CHUNK_BUCKETS]
    for shape in [shape for shape in decodes if shape.decodes <= sequences_max] + chunks:
        if shape.context + max(shape.chunk, 1) > context_max:
            continue
        for blocks in {1, blocks_total} if shape.decodes > 1 else {1}:  # one block for all: a shared prefix
            yield batch_of(shape, block_tokens, blocks)[0]


def warm_compiled(block_tokens: int, sequences_max: int, context_max: int) -> Iterator[StepBatch]:
    """Decodes and chunks at once: compiled only, for there are hundreds. Tiles differ by rows, lists by sequences, and
    by whether decodes share a beginning."""
    for beside in (rows for rows in arrange.BESIDE_BUCKETS if 0 < rows <= sequences_max):
        for chunk_rows, chunked in WARM_CHUNKS:
            yield mixed(beside, chunk_rows, chunked, block_tokens, sequences_max)
            for context in {min(WARM_CONTEXTS[-1], context_max - 1), context_max - 1}:
                yield mixed(beside, chunk_rows, chunked, block_tokens, sequences_max, context=context)
    past = CHUNK_PARTS[-1] * CHUNK_PART_TOKENS  # of a short chunk whose tiles are cut
    if past + WARM_CHUNKS[0][0] <= context_max:
        yield mixed(0, *WARM_CHUNKS[0], block_tokens, sequences_max, past=past)


def mixed(
    decodes: int, chunk_rows: int, chunked: int, block_tokens: int, sampled_max: int, *, context: int = 1, past: int = 0
) -> StepBatch:
    """A made-up step of decodes that see `context` tokens of one block and several chunks behind `past` tokens; it
    writes nowhere."""
    counts = np.array([1] * decodes + [chunk_rows // chunked] * chunked)
    contexts = np.array([context] * decodes + [past + chunk_rows // chunked] * chunked, np.int32)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    rows = int(starts[-1])
    sampled = min(len(counts), sampled_max)
    return StepBatch(
        np.zeros(rows, np.int32), (np.arange(rows) - np.repeat(starts[:-1], counts)).astype(np.int32),
        np.full(rows, -1, np.int64), starts, contexts,
        np.zeros((len(counts), -(-int(contexts.max()) // block_tokens)), np.int32), starts[1 : sampled + 1] - 1,
        (Sampling(temperature=0.0),) * sampled, np.zeros(sampled, np.int32),
    )  # fmt: skip
