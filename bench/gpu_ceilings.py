"""What the card at hand can do at most: reads, copies, matrix products short and held, the link to the host.

    python3 bench/gpu_ceilings.py [--out DIR]

Owns the ceilings that GPU benchmarks are compared with (bench/gpu_timing.py names them by card). Takes 15 s."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pynvml
import torch
import triton
import triton.language as tl

from bench.gpu_timing import BF16, CUDA
from engine.kernels.tuned import slug

NUMBERS = 1 << 30  # 4 GiB of float32, far past L2
READ_BLOCKS = (4096, 8192, 16384, 32768)
SIDES = (4096, 8192)
HELD_S = 3.0


@triton.jit
def total(x, out, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0)
    tl.store(out + at, tl.sum(tl.load(x + at * block + tl.arange(0, block)), 0))


def seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median by device events."""
    times = []
    for _ in range(3 + repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def memory() -> dict[str, float]:
    """GB/s of device memory and of the link."""
    x, found = torch.randn(NUMBERS, device=CUDA), {}
    other = torch.empty_like(x)
    found["copy, read and written, GB/s"] = 8 * NUMBERS / seconds(lambda: other.copy_(x)) / 1e9
    for block in READ_BLOCKS:
        out = torch.empty(NUMBERS // block, device=CUDA)
        taken = seconds(lambda b=block, o=out: total[(NUMBERS // b,)](x, o, b, num_warps=8))
        found[f"read, blocks of {block}, GB/s"] = 4 * NUMBERS / taken / 1e9
    host, part = torch.empty(NUMBERS // 4, pin_memory=True), x[: NUMBERS // 4]
    found["host to device, pinned, GB/s"] = NUMBERS / seconds(lambda: part.copy_(host, non_blocking=True)) / 1e9
    found["device to host, pinned, GB/s"] = NUMBERS / seconds(lambda: host.copy_(part, non_blocking=True)) / 1e9
    return found


def products() -> dict[str, float]:
    """TFLOP/s of square products on random data: short, and held until the card's power is the limit."""
    found: dict[str, float] = {}
    for side in SIDES:
        a, b = (torch.randn(side, side, device=CUDA, dtype=BF16) for _ in range(2))
        found[f"product of {side}, TFLOP/s"] = 2 * side**3 / seconds(lambda: a @ b) / 1e12
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    begun, count, joules = time.perf_counter(), 0, pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    while time.perf_counter() - begun < HELD_S:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        count += 20
    taken = time.perf_counter() - begun
    found[f"product of {side} held {HELD_S:g} s, TFLOP/s"] = 2 * side**3 * count / taken / 1e12
    found["power meanwhile, W"] = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 - joules) / taken
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    found = {"device": device, **{name: round(value, 1) for name, value in (memory() | products()).items()}}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"gpu_ceilings-{slug(device)}.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:44} {value}")


if __name__ == "__main__":
    main()
