"""Whole captured steps on the GPU at hand, without the host: against the floor of bytes and operations, and by kernel.

    python3 bench/gpu_step.py MODEL_DIR [--weights fp8] [--kv fp8] [--out DIR]

Owns decode steps by batch and context, chunks, and both; and where the time of a step goes. Prints its table last."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from bench.gpu_timing import ceilings
from engine.compute import gpu_build
from engine.compute.calibrate import Shape, batch_of
from engine.compute.gpu_runner import GpuRunner
from engine.config import GPU_BLOCK_TOKENS, KV_DTYPES, WEIGHTS
from engine.kernels.tuned import slug
from engine.models.config import ModelConfig
from engine.step import StepBatch

DECODES = ((1, 576), (8, 576), (32, 576), (64, 576), (128, 576), (256, 576), (8, 8192), (1, 32768))
CHUNKS = (Shape(0, 512, 0), Shape(0, 2048, 0), Shape(64, 512, 576), Shape(0, 2048, 8192), Shape(0, 2048, 30720))
DETAILED = (1, 64, 256)


def floor_ms(config: ModelConfig, shape: Shape, kv_bytes_per_token: float, *, has_fp8: bool = False) -> float:
    """Bytes over the read rate or operations over the matrix rate (twice as high in 8 bits), whichever is more."""
    qkv = config.hidden * (config.q_width + 2 * config.kv_width)
    linear = config.layers * (qkv + config.q_width * config.hidden + 3 * config.hidden * config.ffn)
    head, sampled = config.hidden * config.vocab_size, shape.decodes + bool(shape.chunk)
    kv = shape.decodes * shape.context * kv_bytes_per_token
    pairs = shape.chunk * (shape.context + shape.chunk / 2)
    of_layers = 2 * (shape.decodes + shape.chunk) * linear / (2 if has_fp8 else 1)
    flop = of_layers + 2 * sampled * head + 4 * config.layers * config.q_width * pairs
    card, width = ceilings(), 1 if has_fp8 else 2
    return max((width * linear + 2 * head + kv) / card.read_bytes_s, flop / card.flop_s) * 1e3


def spread(shape: Shape, blocks: int) -> StepBatch:
    """A step of this shape over shuffled blocks, each sequence its own."""
    batch, _ = batch_of(shape, GPU_BLOCK_TOKENS)
    order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
    batch.block_tables.reshape(-1)[:] = order[np.arange(batch.block_tables.size) % blocks]
    batch.ids[:] = np.random.default_rng(1).integers(0, 10_000, len(batch.ids))
    return batch


def milliseconds(replay: Callable[[], None], repeats: int = 5) -> float:
    """Median of events around replays, back to back."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 10)
    return statistics.median(times)


def kernels(replay: Callable[[], None]) -> dict[str, float]:
    """Microseconds by kernel of one replay, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    times = {event.key[:48]: round(event.self_device_time_total, 1) for event in profile.key_averages()}
    return dict(sorted(((name, time) for name, time in times.items() if time), key=lambda item: -item[1])[:8])


def measure(runner: GpuRunner, path: Path, *, has_fp8: bool = False) -> None:
    """Every case, and kernels of some."""
    found: dict[str, dict[str, float]] = {}
    assert runner.kv is not None
    token_bytes = runner.kv.block_bytes / runner.block_tokens
    for shape in [*(Shape(batch, 0, context - 1) for batch, context in DECODES), *CHUNKS]:
        with runner.replayable(spread(shape, runner.blocks_total)) as replay:
            taken, floor = milliseconds(replay), floor_ms(runner.model, shape, token_bytes, has_fp8=has_fp8)
            name = f"{shape.decodes} decodes + {shape.chunk} rows at {shape.context}"
            found[name] = {"ms": round(taken, 3), "floor": round(floor, 3), "of floor": round(floor / taken, 3)}
            print(f"{name:40} {taken:9.3f} ms  floor {floor:9.3f}  {floor / taken:6.1%}", flush=True)
            if shape.decodes in DETAILED and not shape.chunk and shape.context < 1000:
                found[name + ", us by kernel"] = kernels(replay)
                print("   ", found[name + ", us by kernel"], flush=True)
        path.write_text(json.dumps({"device": torch.cuda.get_device_name(), **found}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16")
    parser.add_argument("--kv", choices=KV_DTYPES, default=KV_DTYPES[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    device = torch.device("cuda:0")
    has_fp8, is_kv_fp8 = options.weights == "fp8", options.kv == "fp8"
    runner = gpu_build.load(
        options.model, device, block_tokens=GPU_BLOCK_TOKENS, kv_bytes=0, sequences_max=256,
        has_fp8_weights=has_fp8, is_kv_fp8=is_kv_fp8,
    )  # fmt: skip
    if not isinstance(runner, GpuRunner):
        sys.exit("the kernels failed their self-check on this card; see the log")
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "-fp8w" * has_fp8 + "-fp8kv" * is_kv_fp8
    name = f"gpu_step-{options.model.name}{kind}-{slug(torch.cuda.get_device_name())}.json"
    measure(runner, options.out / name, has_fp8=has_fp8)


if __name__ == "__main__":
    main()
