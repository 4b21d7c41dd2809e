"""The runner on a GPU: captured steps, choice on the device, and one step in flight before the host knows the last ids.

Owns KV memory, graphs and what is in flight. Never decides what a step holds.

A step of decodes alone, or with the last of all prompts, is followed at once by the step that will most likely come:
the same sequences, one token on, their ids gathered on the device. If the scheduler then asks for that step, or for a
part of it, its answer is already on the way; rows beside it are computed behind it; if it asks for something else, the
time is lost and nothing more: what was written lies where the sequence's next token belongs, and the stream's order
keeps later owners behind it."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.compute import arrange, sampling
from engine.compute.arrange import Arranged, Packing
from engine.compute.graphs import HOST_BUFFERS, Graphs, StepInputs
from engine.compute.runner import nobody
from engine.compute.warm import captured_rows_max, warm_captured, warm_compiled
from engine.kernels import rows as row_kernels
from engine.kernels import tuned
from engine.kernels.paged import CHUNK_ROWS, SHARED_PART_TOKENS, Launch, chunk_programs
from engine.kernels.plan import chunk_parts
from engine.kernels.sample import Sampler
from engine.kv.device_memory import DeviceMemory
from engine.models import gpu
from engine.models.config import ModelConfig, ModelError
from engine.step import Int32, Int64, KVMemory, StepBatch, StepResult
from engine.wire import Sampling

PARTS_MAX = 4096  # parts of KV in one step: 64 MiB of partial sums for an 8B model
GRAPHS_MAX = 256  # captured steps kept; others are launched kernel by kernel
FREE_SHARE = 0.92  # of the memory left beside the weights; the rest is for libraries and graphs
FEW, MANY = Launch(264, stages=4, pdl=2), Launch(528, stages=2, registers=128, pdl=2)  # measured: gpu_step
# A tile of fp8 KV is half as large: more stages, so that as many bytes are on their way; others were not tried.
FEW_FP8, MANY_FP8 = Launch(264, stages=6, pdl=2), Launch(528, stages=3, registers=128, pdl=2)
LAUNCHES = {False: (FEW, MANY), True: (FEW_FP8, MANY_FP8)}  # by whether KV is fp8
INTERPRETED = Launch(4)  # the interpreter knows no programmatic launch
MANY_FROM = 48  # sequences; fewer registers and more programs are faster from here on


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched and not read back."""

    batch: StepBatch
    answer: Tensor  # [2, sampled], pinned: ids, is_bad
    done: torch.cuda.Event | None
    launched_at: float
    step: Arranged
    is_straight: bool = False  # each row's id is what the same row of the step before sampled

    def read(self) -> tuple[Int32, np.typing.NDArray[np.bool_]]:
        """Wait for it; its ids, and which are bad."""
        if self.done is not None:
            self.done.synchronize()
        count = len(self.batch.sample_rows)
        ids, is_bad = self.answer.numpy()[:, :count].copy()
        return ids, is_bad != 0


class GpuRunner:
    """engine.step.Runner on one CUDA device (elsewhere too, under Triton's interpreter: slow, and what tests use)."""

    def __init__(
        self, weights: gpu.Weights, block_tokens: int, blocks: int, sequences_max: int,
        table: tuned.Table | None = None, *, card: str = "", ranks: gpu.Ranks | None = None, is_kv_fp8: bool = False,
    ):  # fmt: skip
        """`card` names the device whose launches are rehearsed, where weights lie on none. `ranks`: the weights are a
        part of a model's."""
        config, device = weights.config, weights.embedding.device
        if blocks < 1:
            raise ModelError("no GPU memory is left for KV beside the weights")
        self._device, self._is_cuda = device, device.type == "cuda"
        shape = gpu.shape_of(config, block_tokens, is_kv_fp8=is_kv_fp8)
        pool = shape.layout.pool(blocks, weights.embedding.dtype, device)
        name = torch.cuda.get_device_name(device) if self._is_cuda else card
        few, many = LAUNCHES[is_kv_fp8] if name else (INTERPRETED, INTERPRETED)
        self._decoder = gpu.GpuDecoder(weights, shape, pool, table or tuned.load(name or "none"), few, ranks)
        self._many = replace(self._decoder, launch=many)
        most = arrange.most(sequences_max)
        width = min(-(-config.context_max // block_tokens), blocks) + 1
        self._inputs = StepInputs.make(most, width, config.head_dim, device)
        self._room = gpu.Buffers.make(weights, shape, most.rows, most.sampled, most.sequences, PARTS_MAX)
        self._sampler = Sampler.make(most.sampled, config.vocab_size, device)
        self._answers = [
            torch.zeros(2, most.sampled, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(HOST_BUFFERS)
        ]
        self._sent: list[torch.cuda.Event | None] = [None] * HOST_BUFFERS  # when who used a host buffer last is done
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._memory = DeviceMemory(pool, self._stream)
        self._graphs = Graphs(GRAPHS_MAX) if self._is_cuda else None
        self._captured_rows_max = captured_rows_max(config)
        self._packing = Packing(config.kv_heads, block_tokens, SHARED_PART_TOKENS, PARTS_MAX)
        self._tell: Callable[[Arranged], None] = nobody
        self._turn = 0
        self._tables: Int32 | None = None  # of the step last sent: what lies on the device
        self._ahead: Flight | None = None
        self._read_at = 0.0

    @property
    def blocks_total(self) -> int:
        """KV blocks that fit."""
        return len(self._decoder.pool)

    @property
    def block_tokens(self) -> int:
        """Tokens a block holds."""
        return self._decoder.shape.block_tokens

    @property
    def kv(self) -> KVMemory | None:
        """Whole blocks as bytes, for the tiers below."""
        return self._memory

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""
        return self._decoder.weights.config

    # Hot: once per step. The host's share hides behind the step in flight while decodes follow decodes.
    def run(self, batch: StepBatch) -> StepResult:
        """Compute one step: write KV, sample. Raises only on what is our own fault."""
        with torch.inference_mode():
            if self._stream is None:
                return self._run(batch)
            with torch.cuda.stream(self._stream):
                return self._run(batch)

    def _run(self, batch: StepBatch) -> StepResult:
        ahead, self._ahead = self._ahead, None
        special = _special(batch)
        at = _found(batch, ahead.batch) if ahead is not None and not special else None
        if ahead is not None and at is not None and (at >= 0).all():
            self._ahead = None if batch.is_last else self._follow(batch, at, behind=ahead)
            ids, is_bad = ahead.read()
            return self._result(ids[at], is_bad[at], ahead.launched_at)
        if ahead is not None and at is not None:
            return self._beside(batch, ahead, at)
        flight = self._launch(batch, None)
        if special:
            return self._choose_on_host(batch, flight, special)
        if _is_followed(batch):
            self._ahead = self._follow(batch, np.arange(len(batch.ids)))
        return self._result(*flight.read(), flight.launched_at)

    def _choose_on_host(self, batch: StepBatch, flight: Flight, special: list[int]) -> StepResult:
        """Rows that ask for more than the device's sampler knows; their neighbours keep what it chose for them."""
        logits = self._room.logits[: len(batch.sampling)]
        chosen = sampling.choose(
            logits, batch.sampling, batch.sample_positions, self.model.eos_ids,
            histories=batch.histories, masks=batch.masks,
        )  # fmt: skip
        ids, is_bad = flight.read()
        ids[special], is_bad[special] = chosen.ids[special], chosen.is_bad[special]
        return replace(self._result(ids, is_bad, flight.launched_at), scores=chosen.scores, messages=chosen.messages)

    def _beside(self, batch: StepBatch, ahead: Flight, at: Int64) -> StepResult:
        """Rows of this batch that are not in flight, behind those that are; what follows needs only their ids yet."""
        rest = self._launch(_part(batch, np.flatnonzero(at < 0)), None)
        ids, is_bad = ahead.read()
        sampled = at[np.searchsorted(batch.row_starts, batch.sample_rows, side="right") - 1]
        is_here = sampled >= 0
        all_ids, all_bad = np.zeros(len(sampled), np.int32), np.empty(len(sampled), bool)
        all_ids[is_here], all_bad[is_here] = ids[sampled[is_here]], is_bad[sampled[is_here]]
        if _is_followed(batch):
            self._ahead = self._follow(batch, np.where(is_here, -1, np.cumsum(~is_here) - 1), all_ids)
        all_ids[~is_here], all_bad[~is_here] = rest.read()
        return self._result(all_ids, all_bad, ahead.launched_at)

    def _result(self, ids: Int32, is_bad: np.typing.NDArray[np.bool_], launched_at: float) -> StepResult:
        before, self._read_at = self._read_at, time.perf_counter()
        return StepResult(ids, is_bad, self._read_at - max(before, launched_at))

    def _follow(
        self, batch: StepBatch, at: Int64, ids: Int32 | None = None, behind: Flight | None = None
    ) -> Flight | None:
        """Launch what comes after `batch`, whose ids the step in flight samples at `at`; where that is -1, `ids` has
        them. None if blocks are missing. `behind`: the step in flight, if that is what `batch` asks for."""
        contexts = batch.contexts
        if not len(batch.room) or (batch.room <= contexts).any() or (batch.write_slots < 0).any():
            return None
        size, rows = self.block_tokens, np.arange(len(contexts), dtype=np.int32)
        slots = batch.block_tables[rows, contexts // size].astype(np.int64) * size + contexts % size
        following = replace(
            batch, ids=np.zeros_like(contexts) if ids is None else ids, positions=contexts, write_slots=slots,
            contexts=contexts + 1, row_starts=np.arange(len(contexts) + 1, dtype=np.int32),
            sample_rows=rows, sample_positions=batch.sample_positions + 1,
        )  # fmt: skip
        is_straight = np.array_equal(at, rows) and (behind is None or len(rows) == len(behind.batch.contexts))
        known = None
        if is_straight and behind is not None and behind.is_straight:
            known = arrange.advanced(behind.step, following, size)
        return replace(self._launch(following, at.astype(np.int32), known), is_straight=is_straight)

    def lead(self, tell: Callable[[Arranged], None]) -> None:
        """From now on `tell` makes other ranks `follow` each step."""
        self._tell = tell

    def follow(self, step: Arranged) -> None:
        """Another rank's part of a step that rank 0 computes."""
        with torch.inference_mode():
            if self._stream is None:
                self._send(step)
                return
            with torch.cuda.stream(self._stream):
                self._send(step)

    def _launch(self, batch: StepBatch, sources: Int32 | None, known: Arranged | None = None) -> Flight:
        launched_at = time.perf_counter()
        step = known or arrange.arrange(batch, self._packing, sources)
        self._tell(step)
        return Flight(batch, *self._send(step), launched_at, step)

    def _send(self, step: Arranged) -> tuple[Tensor, torch.cuda.Event | None]:
        """To the device; where its answer will be, and when it is there."""
        turn, self._turn = self._turn % HOST_BUFFERS, self._turn + 1
        if (last := self._sent[turn]) is not None:
            last.synchronize()
        self._inputs.write(turn, step, has_tables=step.tables is not self._tables)
        self._tables = step.tables
        self._compute(step)
        answer, done = self._answers[turn], None
        row_kernels.carry(self._sampler.answer, answer)
        if self._is_cuda:
            done = self._sent[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return answer, done

    def _compute(self, step: Arranged) -> None:
        kind, graphs = self._kind(step), self._graphs_for(step)
        if graphs is None:
            self._forward(step, kind)
        else:
            graphs.run((step.size, kind), lambda: self._forward(step, kind))

    def _graphs_for(self, step: Arranged) -> Graphs | None:
        """Where steps of its size are kept; None: it is launched kernel by kernel."""
        return self._graphs if step.chunk_rows <= self._captured_rows_max else None

    def _kind(self, step: Arranged) -> gpu.Kind:
        shape = self._decoder.shape
        tiles = step.chunk_rows // (CHUNK_ROWS // shape.pack) + step.chunked
        parts = chunk_parts(chunk_programs(shape, tiles), step.chunk_context)
        return gpu.Kind(step.decodes, tiles, parts, step.has_shared, step.has_parts)

    def _forward(self, step: Arranged, kind: gpu.Kind, layers: int | None = None) -> None:
        """Launch all of a step: what a graph captures. `layers`: the first so many alone, which is no answer."""
        decoder = self._many if step.decodes >= MANY_FROM else self._decoder
        if layers is not None:
            decoder = replace(decoder, weights=replace(decoder.weights, layers=decoder.weights.layers[:layers]))
        inputs, knobs = self._inputs.view(step.size)
        logits = decoder.forward(inputs, kind, self._room, self._sampler.answer[0])
        self._sampler.choose(logits, knobs)
        if decoder.ranks is not None:
            decoder.ranks.agree(self._sampler.answer)

    @contextmanager
    def replayable(self, batch: StepBatch) -> Iterator[Callable[[], None]]:
        """The captured step with its inputs in place, to be timed on the device."""
        assert self._stream is not None
        for _ in range(2):
            self.run(batch)
        step = arrange.arrange(batch, self._packing)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield lambda: self._compute(step)
            torch.cuda.synchronize()

    def logits(self, batch: StepBatch) -> Tensor:
        """[sampled, vocab] float32 of a step, computed for them alone: what benchmarks compare."""
        self.run(batch)
        return self._room.logits[: len(batch.sampling)].clone()

    def rehearse(self, batch: StepBatch) -> None:
        """Make the launches of a step and nothing else: tensors may lie on no device (engine/compute/precompile.py)."""
        with torch.inference_mode():
            self._inputs.send(0, 1)
            self._compute(arrange.arrange(batch, self._packing))
            row_kernels.carry(self._sampler.answer, self._answers[0])

    def warm(self, sequences_max: int) -> None:
        """Have all kernels on the device, and steps of decodes alone and of one chunk alone captured, so that no stream
        waits for it. None of these steps is computed: a capture is 350 launches, not 350 kernels."""
        context_max = min(self.model.context_max, self.blocks_total * self.block_tokens)
        for batch in warm_captured(self.block_tokens, self.blocks_total, sequences_max, context_max):
            self._load(batch, is_captured=True)
        for batch in warm_compiled(self.block_tokens, sequences_max, context_max):
            self._load(batch)

    def _load(self, batch: StepBatch, *, is_captured: bool = False) -> None:
        """Have a step's kernels on the device: two layers launch all of them, and 256 decodes of 131,072 tokens, which
        take 1.4 s in an 8B model's 32 layers, take 0.1 s."""
        step = arrange.arrange(batch, self._packing)
        kind = self._kind(step)
        stream = torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
        with torch.inference_mode(), stream:
            self._drain()  # what is in flight may still read the host buffer
            self._inputs.write(0, step)
            self._tables = step.tables
            self._forward(step, kind, layers=2)
            self._drain()
            if is_captured and (graphs := self._graphs_for(step)) is not None:
                graphs.capture((step.size, kind), lambda: self._forward(step, kind))

    def _drain(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _is_followed(batch: StepBatch) -> bool:
    """Whether the step behind it is known: one row of each of its sequences."""
    is_sampled = len(batch.sample_rows) == len(batch.contexts) and not batch.is_last
    return is_sampled and (batch.ends_prompts or len(batch.ids) == len(batch.contexts))


def _found(batch: StepBatch, ahead: StepBatch) -> Int64 | None:
    """For each sequence of the batch where the step in flight samples its token; -1 where it does not; None if nowhere.
    Slot and position tell a token, and the Sampling object tells its sequence: blocks may have changed hands."""
    if np.array_equal(batch.write_slots, ahead.write_slots) and _are_same(batch, ahead):
        return np.arange(len(batch.contexts))
    known = {slot: at for at, slot in enumerate(ahead.write_slots.tolist())}
    counts = np.diff(batch.row_starts)
    of_row = dict(zip(batch.sample_rows.tolist(), batch.sampling, strict=True))
    at = np.full(len(counts), -1, np.int64)
    for sequence in np.flatnonzero(counts == 1).tolist():
        row = int(batch.row_starts[sequence])
        place = known.get(int(batch.write_slots[row]), -1)
        if place >= 0 and row in of_row and ahead.sampling[place] is of_row[row]:
            at[sequence] = place if batch.positions[row] == ahead.positions[place] else -1
    return at if (at >= 0).any() else None


def _are_same(batch: StepBatch, ahead: StepBatch) -> bool:
    return (
        np.array_equal(batch.positions, ahead.positions)
        and len(batch.sampling) == len(ahead.sampling)
        and all(map(operator.is_, batch.sampling, ahead.sampling))
    )


def _part(batch: StepBatch, sequences: Int64) -> StepBatch:
    """The same step of some of its sequences."""
    counts = np.diff(batch.row_starts)[sequences]
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    rows = np.concatenate([np.arange(batch.row_starts[s], batch.row_starts[s + 1]) for s in sequences])
    is_sampled = np.isin(batch.sample_rows, rows)
    chosen = tuple(one for one, wanted in zip(batch.sampling, is_sampled.tolist(), strict=True) if wanted)
    return StepBatch(
        batch.ids[rows], batch.positions[rows], batch.write_slots[rows], starts, batch.contexts[sequences],
        batch.block_tables[sequences], np.searchsorted(rows, batch.sample_rows[is_sampled]).astype(np.int32), chosen,
        batch.sample_positions[is_sampled], room=batch.room[sequences] if len(batch.room) else batch.room,
    )  # fmt: skip


def _special(batch: StepBatch) -> list[int]:
    """Sampled rows whose choice needs what the device does not have: masks, what was said before, scores."""
    positions = batch.sample_positions.tolist()
    return [
        row
        for row, (wanted, position) in enumerate(zip(batch.sampling, positions, strict=True))
        if _needs_host(wanted, position)
    ]


def _needs_host(wanted: Sampling, position: int) -> bool:
    is_steered = position < wanted.min_tokens or bool(wanted.grammar_kind or wanted.logit_bias)
    return is_steered or wanted.has_penalties or wanted.logprobs >= 0
