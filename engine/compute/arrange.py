"""A scheduler's step in the shape that a captured step has: few-row sequences first, padding to buckets, one part size.

Owns order and padding of rows. Never decides whom a step computes, never touches the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.compute import sampling
from engine.kernels.plan import part_tokens
from engine.step import Int32, StepBatch

# Rows of a decode bucket: padding costs at most a third.
DECODE_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
# Decode rows beside chunks: coarser, for each is captured with each bucket of chunk rows.
BESIDE_BUCKETS = (0, 1, 4, 16, 32, 64, 128, 256)
CHUNK_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)
CHUNKED_BUCKETS = (1, 4, 32)  # sequences with a chunk
# A prefix is read once for its group where that saves so many reads of a token: below, a merge costs more.
SHARED_TOKENS_MIN = 8192
PART_STEP = 16  # contexts are rounded up to it before a part size is chosen: in between a step is the one before, + 1
BELOW_ONE = np.float32(1.0 - 2.0**-24)  # the largest float32 under 1


@dataclass(frozen=True, slots=True)
class Size:
    """Rows, sequences and sampled rows of a step, padding included."""

    rows: int
    sequences: int
    sampled: int


@dataclass(frozen=True, slots=True)
class Arranged:
    """What is written to a step's static inputs, and what of the step is fixed when it is captured."""

    size: Size
    decodes: int  # rows before it belong to sequences of one row
    chunk_rows: int
    chunked: int  # sequences with a chunk, at most
    chunk_context: int  # tokens of the longest context of a chunk
    has_parts: bool
    has_shared: bool
    tables: Int32  # [sequences, blocks]
    arrays: dict[str, npt.NDArray[Any]]


def bucket(count: int, buckets: tuple[int, ...] = DECODE_BUCKETS) -> int:
    """The smallest bucket that holds `count`; asks for no more than the largest."""
    return min(size for size in buckets if size >= count)


def most(sequences_max: int) -> Size:
    """The largest step: decodes beside chunks are padded more than decodes alone."""
    sequences = bucket(sequences_max, BESIDE_BUCKETS)
    return Size(sequences + CHUNK_BUCKETS[-1], sequences + CHUNKED_BUCKETS[-1], sequences)


@dataclass(frozen=True, slots=True)
class Packing:
    """What the kernels' launches fix: heads of KV, tokens of a block, tokens of a shared part, parts in all."""

    kv_heads: int
    block_tokens: int
    shared_part_tokens: int
    parts_max: int


def arrange(batch: StepBatch, packing: Packing, sources: Int32 | None = None) -> Arranged:
    """Rows of the batch in device order. `sources`: for each row where the step before sampled its id, or -1."""
    counts = np.diff(batch.row_starts)
    single, chunked = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
    single, shared, leads = _grouped(batch, single, packing)
    if len(chunked):
        decodes, chunk_slots = bucket(len(single), BESIDE_BUCKETS), bucket(len(chunked), CHUNKED_BUCKETS)
        chunk_rows = bucket(int(counts[chunked].sum()), CHUNK_BUCKETS)
        sampled = min(bucket(max(1, len(batch.sample_rows)), BESIDE_BUCKETS), decodes + chunk_rows)
    else:
        decodes, chunk_slots, chunk_rows = bucket(len(single)), 0, 0
        sampled = decodes
    size = Size(decodes + chunk_rows, decodes + chunk_slots, sampled)
    starts = batch.row_starts[:-1]
    origin = np.concatenate([starts[single], *(np.arange(starts[s], starts[s] + counts[s]) for s in chunked)])
    place = np.arange(len(origin))
    place[len(single) :] += decodes - len(single)  # unused decode rows lie between
    used = int(place[-1]) + 1
    target = np.empty(len(origin), np.int64)
    target[origin] = place
    own = batch.contexts[single] - 1 - shared
    taken = int((-(-shared // packing.shared_part_tokens)).sum())
    part = part_tokens(-(-own // PART_STEP) * PART_STEP, packing.kv_heads, packing.parts_max - taken)
    # Unused decodes beside chunks are sequences of one token that write nowhere.
    filler = decodes - len(single) if len(chunked) else 0
    tables = np.zeros((len(single) + filler + len(chunked), batch.block_tables.shape[1]), np.int32)
    tables[: len(single)] = batch.block_tables[single]
    tables[len(single) + filler :] = batch.block_tables[chunked]
    ones = np.ones(filler, np.int32)
    lengths = np.concatenate([counts[single], ones, counts[chunked]])
    arrays: dict[str, npt.NDArray[Any]] = {
        "ids": _spread(batch.ids, origin, place, used, 0),
        "positions": _spread(batch.positions, origin, place, used, 0),
        "slots": _spread(batch.write_slots, origin, place, used, -1),
        "row_starts": np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        "contexts": np.concatenate([batch.contexts[single], ones, batch.contexts[chunked]]).astype(np.int32),
        "sample_rows": target[batch.sample_rows].astype(np.int32),
        "part_size": np.array([part], np.int32),
    }
    if len(shared) and shared.any():
        arrays |= {"shared": shared, "leads": leads}
    if sources is not None:
        arrays["sources"] = _spread(sources, origin, place, used, -1)
    has_parts = bool((own > part).any())
    return Arranged(
        size, decodes, chunk_rows, chunk_slots, int(batch.contexts[chunked].max(initial=0)), has_parts,
        "shared" in arrays, tables, arrays | _knobs(batch),
    )  # fmt: skip


def advanced(before: Arranged, batch: StepBatch, block_tokens: int) -> Arranged | None:
    """What `arrange` makes of the same decodes one token on, from what it made of them before: a few additions. None
    where a block begins or parts may change. `batch` is in the order of the one before, as its sources say."""
    if not ((batch.positions % block_tokens != 0) & (batch.positions % PART_STEP != 1)).all():
        return None
    changed: dict[str, npt.NDArray[Any]] = {
        name: before.arrays[name] + np.int32(1) for name in ("positions", "slots", "contexts")
    }
    if before.arrays["temperature"].any():
        changed["uniform"] = _uniform(batch, before.arrays["temperature"])
    return replace(before, arrays=before.arrays | changed)


def _grouped(batch: StepBatch, single: npt.NDArray[np.int64], packing: Packing) -> tuple[Any, Int32, Int32]:
    """Decodes with those of a long common prefix side by side; for each the tokens that its group reads once, and its
    group's first."""
    shared, leads = np.zeros(len(single), np.int32), np.arange(len(single), dtype=np.int32)
    if (len(single) - 1) * int(batch.contexts[single].max(initial=0)) < SHARED_TOKENS_MIN:
        return single, shared, leads
    first = batch.block_tables[single, 0]
    single = single[np.argsort(first, kind="stable")]
    starts = np.flatnonzero(np.diff(batch.block_tables[single, 0], prepend=-1))
    ends = np.append(starts[1:], len(single))
    is_group = ends - starts > 1  # 256 loners were 1.6 ms of every step
    for start, end in zip(starts[is_group].tolist(), ends[is_group].tolist(), strict=True):
        tables = batch.block_tables[single[start:end]]
        whole = (int(batch.contexts[single[start:end]].min()) - 1) // packing.block_tokens
        is_common = (tables[:, :whole] == tables[0, :whole]).all(0)
        common = (whole if is_common.all() else int(is_common.argmin())) * packing.block_tokens
        if (end - start - 1) * common >= SHARED_TOKENS_MIN:
            shared[start:end], leads[start:end] = common, start
    parts = int((-(-shared // packing.shared_part_tokens)).sum())
    return single, shared if parts <= packing.parts_max // 2 else np.zeros_like(shared), leads


def _spread(
    values: npt.NDArray[Any], origin: npt.NDArray[Any], place: npt.NDArray[Any], used: int, filler: int
) -> Int32:
    out = np.full(used, filler, np.int32)
    out[place] = values[origin]
    return out


def _knobs(batch: StepBatch) -> dict[str, npt.NDArray[Any]]:
    wanted = batch.sampling
    temperature = np.array([w.temperature for w in wanted], np.float32)
    temperature[temperature < sampling.GREEDY_BELOW] = 0.0
    return {
        "temperature": temperature,
        "top_k": np.array([w.top_k for w in wanted], np.int32),
        "top_p": np.array([w.top_p for w in wanted], np.float32),
        "min_p": np.array([w.min_p for w in wanted], np.float32),
        "uniform": _uniform(batch, temperature),
    }


def _uniform(batch: StepBatch, temperature: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    uniform = np.zeros(len(temperature), np.float32)
    random = np.flatnonzero(temperature)
    if len(random):
        keys = [(batch.sampling[at].seed, int(batch.sample_positions[at])) for at in random.tolist()]
        uniform[random] = np.minimum(sampling.uniforms(keys).astype(np.float32), BELOW_ONE)
    return uniform
