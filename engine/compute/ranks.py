"""The ranks of one model: how they find each other, and how the parts of a result become its sum on every one of them.

Owns the process group and its collectives. Never knows what a step holds, never starts a process."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from engine.models.shard import Shard

START_S = 600.0  # for all ranks to load their weights, the compiling of kernels included

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
# Multicast over NVLink is off: the host's fabric manager sets it up, and where it fails the cards of others fail too.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


def join(shard: Shard, meeting: str, device: torch.device) -> None:
    """Meet the other ranks at a file that none of them has used before. Returns when all are there."""
    os.environ.update(ENVIRONMENT)
    is_cuda, hook = device.type == "cuda", sys.excepthook
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo", init_method=f"file://{meeting}", rank=shard.rank,
        world_size=shard.ranks, timeout=timedelta(seconds=START_S), device_id=device if is_cuda else None,
    )  # fmt: skip
    sys.excepthook = hook  # torch puts "[rank0]:" before each line of every later traceback


def leave() -> None:
    """End a group of CPUs. One of cards ends with its process: NCCL waits for captured steps to be let go first."""
    if dist.is_initialized() and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        dist.destroy_process_group()


def summed(part: Tensor) -> Tensor:
    """The sum of all ranks' tensors, in place; the same numbers on every rank."""
    dist.all_reduce(part)
    return part


def least(number: int) -> int:
    """The smallest of all ranks' numbers; whoever calls waits for the others."""
    numbers = torch.tensor([number])
    dist.all_reduce(numbers, dist.ReduceOp.MIN)
    return int(numbers)
