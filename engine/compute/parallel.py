"""One model on several devices of a host: rank 0 is the worker, and the other ranks compute their part of its steps.

Owns what a rank is made of. Never samples twice: rank 0 alone chooses, the others are told what to compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.compute import ranks
from engine.compute.crew import STEP_S, Crew, end_process
from engine.compute.parts import PartsMemory
from engine.compute.runner import RunnerConfig, TorchRunner, refuse_what_does_not_fit
from engine.config import EngineConfig
from engine.loading import manifest, weights
from engine.models.config import ModelConfig, read
from engine.models.shard import Shard
from engine.step import KVMemory, StepBatch, StepResult

if TYPE_CHECKING:
    from engine.compute.gpu_runner import GpuRunner  # which needs Triton


@dataclass(frozen=True, slots=True)
class Member:
    """What a rank is told at its start."""

    folder: Path
    config: EngineConfig  # its own device; KV bytes of all ranks together
    shard: Shard
    meeting: Path


class ParallelRunner:
    """engine.step.Runner over all ranks."""

    def __init__(self, runner: TorchRunner | GpuRunner, crew: Crew) -> None:
        self._runner = runner
        self._crew = crew
        assert runner.kv is not None
        self._kv = PartsMemory(runner.kv, crew.copies, crew.lost)

    @property
    def blocks_total(self) -> int:
        """KV blocks that fit, on every rank."""
        return self._runner.blocks_total

    @property
    def block_tokens(self) -> int:
        """Tokens a block holds."""
        return self._runner.block_tokens

    @property
    def kv(self) -> KVMemory | None:
        """Whole blocks as bytes, each rank's part of one behind the other's."""
        return self._kv

    @property
    def model(self) -> ModelConfig:
        """The shape of a rank's part; what a worker tells of it is the whole model's."""
        return self._runner.model

    def run(self, batch: StepBatch) -> StepResult:
        """Compute one step on all ranks."""
        with self._crew.answering(STEP_S):
            return self._runner.run(batch)


@contextlib.contextmanager
def started(folder: Path, config: EngineConfig, lost: Callable[[str], None] = end_process) -> Iterator[ParallelRunner]:
    """All ranks, ready; they end with the body. Raises ModelError where the model cannot be divided."""
    count = config.tensor_parallel
    Shard(0, count).config(read(folder))  # better said once, and at once
    meeting = Path(f"{config.socket}.ranks")
    meeting.unlink(missing_ok=True)  # left behind by a worker that was killed
    members = [
        Member(folder, replace(config, device=_device(config.device, rank)), Shard(rank, count), meeting)
        for rank in range(count)
    ]
    crew = Crew(members[1:], lost, fds=[config.pool_fd] if config.pool_fd >= 0 else [])
    try:
        with crew.answering(ranks.START_S):
            runner = part_of(members[0])
        if isinstance(runner, TorchRunner):
            runner.lead(lambda batch: crew.tell(_bare(batch)))
        else:
            runner.lead(crew.tell)
        yield ParallelRunner(runner, crew)
    finally:
        crew.close()
        ranks.leave()
        meeting.unlink(missing_ok=True)


def part_of(member: Member) -> TorchRunner | GpuRunner:
    """A rank's runner, when all ranks have one."""
    config, shard, device = member.config, member.shard, torch.device(member.config.device)
    ranks.join(shard, str(member.meeting.resolve()), device)
    kv_bytes = config.kv_bytes // shard.ranks
    if device.type != "cpu":
        from engine.compute import gpu_build

        return gpu_build.load(
            member.folder, device, block_tokens=config.block_tokens, kv_bytes=kv_bytes,
            sequences_max=config.sequences_max, shard=shard, has_one_shot=config.has_one_shot,
            has_fp8_weights=config.has_fp8_weights,
            is_kv_fp8=config.kv_dtype == "fp8",
        )  # fmt: skip
    options = RunnerConfig(config.block_tokens, kv_bytes)
    manifest.verify(member.folder)
    refuse_what_does_not_fit(member.folder, shard.config(read(member.folder)), options)
    with torch.inference_mode():
        decoder = replace(weights.load(member.folder, options.dtype, device, shard), summed=ranks.summed)
        return TorchRunner(decoder, options)


def _bare(batch: StepBatch) -> StepBatch:
    """What another rank needs of a step: where its rows stand, and nothing of what is chosen then."""
    nothing = np.zeros(0, np.int32)
    return StepBatch(
        batch.ids, batch.positions, batch.write_slots, batch.row_starts, batch.contexts, batch.block_tables,
        nothing, (), nothing,
    )  # fmt: skip


def _device(first: str, rank: int) -> str:
    """Ranks take the cards behind the first one's."""
    name, _, number = first.partition(":")
    return f"{name}:{int(number) + rank}" if number else first
