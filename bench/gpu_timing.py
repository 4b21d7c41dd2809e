"""How the GPU benchmarks time: a captured graph over operands rotated past the L2 cache, device events, medians.

Owns the method alone. Never decides what is measured."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
PAST_L2_BYTES = 240e6


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a card reads from its memory (one-block Triton sum over 4 GiB) and multiplies (8192-wide bf16 product)."""

    read_bytes_s: float
    flop_s: float


MEASURED = {"NVIDIA H100 80GB HBM3": Ceilings(3.18e12, 790e12), "NVIDIA H200": Ceilings(4.45e12, 778e12)}


def ceilings() -> Ceilings:
    """The card's at hand; ends the program where nobody has measured it."""
    name = torch.cuda.get_device_name()
    if name not in MEASURED:
        sys.exit(f"nobody has measured {name}: run bench/gpu_ceilings.py and put it into MEASURED in {__file__}")
    return MEASURED[name]


def captured(launches: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all launches, warmed."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for launch in launches:
                launch()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def microseconds(launches: list[Callable[[], object]], repeats: int = 3) -> float:
    """Median time of one launch in a graph of all."""
    graph = captured(launches)
    graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    inner = max(1, min(20, int(2e-3 / max(time.perf_counter() - started, 1e-6))))
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / inner / len(launches))
    return statistics.median(times)


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative in the 2-norm; NaN counts as 9."""
    value = ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
    return 9.0 if math.isnan(value) else value


def precompile(script: str, workers: int, *arguments: str) -> float:
    """Seconds to fill the disk cache by `script --compile i/n` in parallel processes."""
    started = time.time()
    command = [sys.executable, script, *arguments, "--compile"]
    running = [subprocess.Popen([*command, f"{number}/{workers}"]) for number in range(workers)]
    for process in running:
        process.wait(timeout=240)
    return time.time() - started
