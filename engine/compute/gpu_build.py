"""Makes a GPU runner: weights loaded while kernels compile, a self-check, KV memory from what is left, steps captured.

Owns the order of a GPU worker's start and its fall-backs. Never computes a step."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.compute import ranks
from engine.compute.arrange import bucket, most
from engine.compute.compilers import Compilers, Wanted, compilers
from engine.compute.device_sum import DeviceSum
from engine.compute.gpu_runner import FREE_SHARE, GpuRunner
from engine.compute.runner import RunnerConfig, TorchRunner
from engine.kernels import check, tuned
from engine.kernels.paged import Shape
from engine.loading import manifest, weights
from engine.models import config as model_config
from engine.models import gpu
from engine.models.config import ModelError, is_random
from engine.models.shard import WHOLE, Shard
from engine.phases import Phases

log = logging.getLogger(__name__)

DTYPE = torch.bfloat16
RESERVE_BYTES = 2 * 2**30  # for what is allocated after KV: graphs, libraries, work lists


def load(
    folder: Path,
    device: torch.device,
    *,
    block_tokens: int,
    kv_bytes: int,
    sequences_max: int,
    shard: Shard = WHOLE,
    has_one_shot: bool = True,
    has_fp8_weights: bool = False,
    is_kv_fp8: bool = False,
    begun: Compilers | None = None,
    phases: Phases | None = None,
) -> GpuRunner | TorchRunner:
    """A runner for a Hugging Face folder on this device, or for a rank's part of it where all ranks have met and call
    this at once. `begun`: compilers that may be at it already. Raises ModelError when the folder cannot be served."""
    phases = phases or Phases()
    torch.cuda.set_device(device)
    is_part = shard.ranks > 1
    with torch.inference_mode():
        with compilers() as own:
            compiling = begun or own
            if not shard.rank:
                weights, kv_dtype = ("fp8" if is_asked else "bf16" for is_asked in (has_fp8_weights, is_kv_fp8))
                compiling.begin(
                    wanted(folder, device, block_tokens, sequences_max, shard, weights=weights, kv_dtype=kv_dtype)
                )
            made = on_device(folder, device, shard, has_fp8_weights=has_fp8_weights)
            torch.cuda.synchronize()
            phases.end("weights")
            compiling.wait()
        if is_part:
            ranks.least(0)  # rank 0's compilers are done
        phases.end("waiting for compilers")
        shape = gpu.shape_of(made.config, block_tokens, is_kv_fp8=is_kv_fp8)
        wrong = check.failures(device, DTYPE, shape, has_fp8=made.has_fp8)
        phases.end("self-check")
        wishes = {"tensor parallel": is_part, "weights of 8 bits": has_fp8_weights, "fp8 KV": is_kv_fp8}
        needing = next((wish for wish, is_asked in wishes.items() if is_asked), "")
        if needing and {"attention", "prefill", "sampling"} & set(wrong):
            raise ModelError(f"{needing} needs our own kernels, which failed their self-check on {device}: {wrong}")
        if {"attention", "prefill", "sampling"} & set(wrong):
            log.warning("serving by plain torch instead: correct, and several times slower")
            options = RunnerConfig(block_tokens, kv_bytes or 4 * 2**30, DTYPE, str(device))
            return TorchRunner.load(folder, options)
        if {check.FP8_OWN, check.FP8_LIBRARY} & set(wrong):
            log.warning("weights are widened to bfloat16 again: twice the memory, and the time of bfloat16")
            made = gpu.widened(made)
        table = tuned.library(str(device)) if "products" in wrong else None
        joined = None
        if is_part:
            rows, like = most(sequences_max).rows, made.embedding
            joined = DeviceSum(shard, rows, made.config.hidden, like, has_one_shot=has_one_shot)
        blocks = blocks_for(made, shape, kv_bytes)
        blocks = ranks.least(blocks) if is_part else blocks
        runner = GpuRunner(made, block_tokens, blocks, sequences_max, table, ranks=joined, is_kv_fp8=is_kv_fp8)
    phases.end("memory")
    runner.warm(bucket(sequences_max))
    phases.end("capturing steps")
    log.info("%s: %d KV blocks; %s", torch.cuda.get_device_name(device), runner.blocks_total, phases)
    return runner


def wanted(
    folder: Path, device: torch.device, block_tokens: int, sequences_max: int, shard: Shard = WHOLE,
    *, weights: str = "bf16", kv_dtype: str = "bf16",
) -> Wanted:  # fmt: skip
    """What has to be compiled for the card at hand."""
    major, minor = torch.cuda.get_device_capability(device)
    card = torch.cuda.get_device_name(device)
    return Wanted(
        folder, card, 10 * major + minor, block_tokens, sequences_max, shard.ranks, weights=weights, kv_dtype=kv_dtype
    )


def on_device(
    folder: Path, device: torch.device, shard: Shard = WHOLE, *, has_fp8_weights: bool = False
) -> gpu.Weights:
    """The folder's weights, or made-up ones if its config.json asks for them."""
    config = model_config.read(folder)
    if is_random(folder):
        return gpu.random_weights(config, device, DTYPE, shard=shard, is_fp8=has_fp8_weights)
    manifest.verify(folder)
    return gpu.from_decoder(weights.load(folder, DTYPE, device, shard), is_fp8=has_fp8_weights)


def blocks_for(made: gpu.Weights, shape: Shape, kv_bytes: int) -> int:
    """KV blocks in `kv_bytes`, or if that is 0 in what is free beside the weights and a step's buffers."""
    if not kv_bytes:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        rows = most(256).rows
        widths = 2 * made.config.hidden + 2 * made.config.q_width + 2 * made.config.kv_width + 3 * made.config.ffn
        step_bytes = rows * widths * DTYPE.itemsize + 256 * made.config.vocab_size * 4
        step_bytes += rows * gpu.widest(made.config) if made.has_fp8 else 0
        kv_bytes = int(FREE_SHARE * free) - RESERVE_BYTES - step_bytes
    return kv_bytes // shape.layout.block_bytes(DTYPE)
