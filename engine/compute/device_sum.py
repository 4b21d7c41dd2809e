"""Sums over ranks inside a step: few rows by one kernel that reads all cards' memory, more by NCCL; gloo off the card.

Owns the memory that other cards read. Never decides what is summed; a kernel that disagrees with NCCL is not used."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch import distributed as dist

from engine.compute import ranks
from engine.models.shard import Shard

log = logging.getLogger(__name__)

# Each rank reads all others' parts whole: beyond this a ring moves less. vLLM and SGLang switch at about the same.
READ_BYTES_MAX = 2 * 2**20
ERROR_MAX = 1e-2  # of a sum in bfloat16, relative to the largest


class DeviceSum:
    """engine.models.gpu.Ranks. Made by all ranks at once."""

    def __init__(self, shard: Shard, rows: int, width: int, like: Tensor, *, has_one_shot: bool = True) -> None:
        """For up to so many rows of that width."""
        self._is_first = shard.rank == 0
        self._zeros = None if self._is_first else torch.zeros(rows, width, dtype=like.dtype, device=like.device)
        few = min(rows, READ_BYTES_MAX // (shard.ranks - 1) // (width * like.itemsize))
        self._shared = _shared(few, width, like) if like.is_cuda and has_one_shot else None
        if self._shared is not None:
            log.info("sums of up to %d rows are one kernel's, others NCCL's", few)

    def term(self, x: Tensor) -> Tensor:
        """The stream on rank 0, zeros elsewhere."""
        return x if self._zeros is None else self._zeros[: len(x)]

    def part(self, x: Tensor) -> Tensor:
        """Shared memory for few rows, x itself for many."""
        return self._shared[: len(x)] if self._shared is not None and len(x) <= len(self._shared) else x

    def sum_into(self, x: Tensor, part: Tensor) -> None:
        """The same numbers on every rank."""
        if part is x:
            dist.all_reduce(x)
        else:
            _one_shot(part, x)

    def agree(self, answer: Tensor) -> None:
        """Ids that the next step gathers on the device: rank 0's, even if a last bit differed elsewhere."""
        dist.broadcast(answer, 0)


def _shared(rows: int, width: int, like: Tensor) -> Tensor | None:
    """Memory that all cards read, checked; None, for all ranks alike, where it cannot be had or gives other sums."""
    memory, why = None, ""
    try:
        memory = _exchanged(rows, width, like)
    except Exception as error:  # border: drivers, links and torch's builds refuse it in many ways  # noqa: BLE001
        why = f"{error!r:.200}"
    if ranks.least(int(memory is not None)) and memory is not None:
        why = _difference(memory)
        memory = memory if ranks.least(int(not why)) else None
    if memory is None:
        log.warning(
            "all sums over ranks are NCCL's, several times slower for few rows: %s", why or "so on another rank"
        )
    return memory


def _exchanged(rows: int, width: int, like: Tensor) -> Tensor:
    from torch.distributed import _symmetric_memory as symmetric

    memory = symmetric.empty((rows, width), dtype=like.dtype, device=like.device)
    symmetric.rendezvous(memory, _world())
    return memory.zero_()


def _difference(memory: Tensor) -> str:
    """How the kernel's sums differ from NCCL's on this rank; empty: they do not."""
    generator = torch.Generator(memory.device).manual_seed(dist.get_rank())
    for rows in sorted({1, len(memory)}):
        part = memory[:rows]
        part.copy_(torch.randn(part.shape, generator=generator, device=memory.device))
        wanted, found = part.float(), torch.full_like(part, torch.nan)
        dist.all_reduce(wanted)
        _one_shot(part, found)
        error = float((found.float() - wanted).abs().max() / wanted.abs().max())
        if not error < ERROR_MAX:
            return f"sums of {rows} rows differ from NCCL's by {error:.2g}"
    return ""


def _one_shot(part: Tensor, out: Tensor) -> None:
    torch.ops.symm_mem.one_shot_all_reduce_out(part, "sum", _world().group_name, out)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "all ranks have met"
    return group
