"""Makes a GPU runner: weights loaded while kernels compile, a self-check, KV memory from what is left, steps captured.

Owns the order of a GPU worker's start and its fall-backs. Never computes a step."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from engine.compute import precompile, ranks
from engine.compute.arrange import bucket, most
from engine.compute.device_sum import DeviceSum
from engine.compute.gpu_runner import FREE_SHARE, GpuRunner
from engine.compute.runner import RunnerConfig, TorchRunner
from engine.kernels import check, tuned
from engine.loading import manifest, weights
from engine.models import config as model_config
from engine.models import gpu
from engine.models.config import ModelError, is_random
from engine.models.shard import WHOLE, Shard

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
) -> GpuRunner | TorchRunner:
    """A runner for a Hugging Face folder on this device, or for a rank's part of it where all ranks have met and call
    this at once. Raises ModelError when the folder cannot be served."""
    started = time.perf_counter()
    torch.cuda.set_device(device)
    is_part = shard.ranks > 1
    with torch.inference_mode():
        compiling = precompile.beside(
            folder, device, block_tokens, sequences_max, shard, has_fp8_weights=has_fp8_weights
        )
        with nullcontext() if shard.rank else compiling:
            made = on_device(folder, device, shard, has_fp8_weights=has_fp8_weights)
            torch.cuda.synchronize()
        if is_part:
            ranks.least(0)  # rank 0's compilers are done
        log.info(
            "weights on %s and kernels compiled after %.1f s",
            torch.cuda.get_device_name(device),
            time.perf_counter() - started,
        )
        shape = gpu.shape_of(made.config, block_tokens)
        wrong = check.failures(device, DTYPE, shape, has_fp8=made.has_fp8)
        if has_fp8_weights and {"attention", "prefill", "sampling"} & set(wrong):
            raise ModelError(f"8-bit weights need our own kernels, which failed their self-check on {device}: {wrong}")
        if is_part and {"attention", "prefill", "sampling"} & set(wrong):
            raise ModelError(
                f"tensor parallel needs our own kernels, which failed their self-check on {device}: {wrong}"
            )
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
        blocks = blocks_for(made, block_tokens, kv_bytes)
        blocks = ranks.least(blocks) if is_part else blocks
        runner = GpuRunner(made, block_tokens, blocks, sequences_max, table, ranks=joined)
    log.info("self-check and memory after %.1f s", time.perf_counter() - started)
    runner.warm(bucket(sequences_max))
    log.info("%d KV blocks, steps captured after %.1f s", runner.blocks_total, time.perf_counter() - started)
    return runner


def on_device(
    folder: Path, device: torch.device, shard: Shard = WHOLE, *, has_fp8_weights: bool = False
) -> gpu.Weights:
    """The folder's weights, or made-up ones if its config.json asks for them."""
    config = model_config.read(folder)
    if is_random(folder):
        return gpu.random_weights(config, device, DTYPE, shard=shard, is_fp8=has_fp8_weights)
    manifest.verify(folder)
    return gpu.from_decoder(weights.load(folder, DTYPE, device, shard), is_fp8=has_fp8_weights)


def blocks_for(made: gpu.Weights, block_tokens: int, kv_bytes: int) -> int:
    """KV blocks in `kv_bytes`, or if that is 0 in what is free beside the weights and a step's buffers."""
    block_bytes = block_tokens * made.config.kv_bytes_per_token(DTYPE.itemsize)
    if not kv_bytes:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        rows = most(256).rows
        widths = 2 * made.config.hidden + 2 * made.config.q_width + 2 * made.config.kv_width + 3 * made.config.ffn
        step_bytes = rows * widths * DTYPE.itemsize + 256 * made.config.vocab_size * 4
        step_bytes += rows * gpu.widest(made.config) if made.has_fp8 else 0
        kv_bytes = int(FREE_SHARE * free) - RESERVE_BYTES - step_bytes
    return kv_bytes // block_bytes
