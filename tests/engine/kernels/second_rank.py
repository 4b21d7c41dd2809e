"""`python -m tests.engine.kernels.second_rank FD`: the other half of a GPU runner, on kernels that are interpreted.

Owns what both halves are made of: a small model, its part, the sums. Follows what rank 0 tells, until that is gone."""

from __future__ import annotations

import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from engine.compute import arrange, ranks
from engine.compute.device_sum import DeviceSum
from engine.compute.gpu_runner import GpuRunner
from engine.kernels import tuned
from engine.models import gpu
from engine.models.shard import Shard
from tests.engine.kernels.test_gpu_decoder import BLOCK, config, weights

BLOCKS, SEQUENCES_MAX = 40, 8
CPU, DTYPE = torch.device("cpu"), torch.float16  # the interpreter's dot knows no bfloat16
SMALL = replace(config(has_qk_norm=False), hidden=64, layers=1, heads=4, kv_heads=2, ffn=64)


def whole() -> gpu.Weights:
    """The same numbers in every process; attention and MLP move the stream enough to show in a text."""
    torch.manual_seed(7)
    made = weights(SMALL, DTYPE, CPU)
    layers = tuple(replace(layer, out=layer.out * 16, down=layer.down * 16) for layer in made.layers)
    return replace(made, layers=layers)


def half(rank: int, meeting: Path) -> GpuRunner:
    """One of two runners, when both have met."""
    shard, made = Shard(rank, 2), whole()
    ranks.join(shard, str(meeting), CPU)
    layers = tuple(gpu.part_of(layer, SMALL, shard) for layer in made.layers)
    # The second's own choice would be token 0 at every place.
    head = torch.zeros_like(made.head) if rank else made.head
    part = replace(made, config=shard.config(SMALL), layers=layers, head=head)
    joined = DeviceSum(shard, arrange.most(SEQUENCES_MAX).rows, SMALL.hidden, made.embedding)
    return GpuRunner(part, BLOCK, BLOCKS, SEQUENCES_MAX, tuned.Table.empty("none"), ranks=joined)


def main() -> None:
    link = Connection(int(sys.argv[1]))
    runner = half(1, link.recv())
    while True:
        try:
            runner.follow(link.recv())
        except EOFError:
            return


if __name__ == "__main__":
    main()
