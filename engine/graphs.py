"""Captured steps: one CUDA graph per bucket of rows, replayed on inputs that one packed copy brings.

Owns buckets, static inputs and capture. Never decides what a step holds, never reads results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels.paged import Step
from engine.models.gpu import Inputs

# Rows of a decode bucket: padding costs at most a third, and at most 4 ms of capture each.
DECODE_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)


def bucket(rows: int, buckets: tuple[int, ...] = DECODE_BUCKETS) -> int:
    """The smallest bucket that holds `rows`; asks for no more than the largest."""
    return min(size for size in buckets if size >= rows)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Static inputs of one bucket: one pinned int32 buffer on the host, its copy on the device, and views of both."""

    host: Tensor  # [n] int32, pinned
    device: Tensor  # [n] int32
    spans: dict[str, tuple[int, int]]
    inputs: Inputs

    @classmethod
    def make(
        cls, rows: int, sequences: int, blocks: int, sampled: int, head_dim: int, device: torch.device
    ) -> StepInputs:
        """For `rows` rows of `sequences` sequences of at most `blocks` blocks. Rows that are not used write nowhere."""
        sizes = {
            "ids": rows, "positions": rows, "slots": rows, "row_starts": sequences + 1, "contexts": sequences,
            "shared": sequences, "leads": sequences, "sample_rows": sampled, "part_size": 1,
            "table": sequences * blocks,
        }  # fmt: skip
        starts = np.cumsum([0, *(-(-size // 4) * 4 for size in sizes.values())])  # 16 bytes: what kernels assume
        spans = {name: (int(at), int(at) + size) for (name, size), at in zip(sizes.items(), starts, strict=False)}
        host = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
        on_device = torch.zeros_like(host, device=device)
        views = {name: on_device[start:end] for name, (start, end) in spans.items()}
        turns = torch.zeros(rows, head_dim, device=device)
        step = Step(
            views["row_starts"], views["contexts"], views["table"].view(sequences, blocks), views["slots"], turns,
            views["shared"], views["leads"], views["part_size"],
        )  # fmt: skip
        return cls(host, on_device, spans, Inputs(views["ids"], views["positions"], views["sample_rows"], step))

    def write(self, **arrays: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> None:
        """Fill named inputs from the front and send them all, in one copy. The host buffer is free again only when the
        step has begun, so a caller with steps in flight keeps two of these."""
        flat = self.host.numpy()
        for name, array in arrays.items():
            start, end = self.spans[name]
            flat[start:end] = -1 if name == "slots" else 0
            flat[start : start + array.size] = array.reshape(-1)
        self.device.copy_(self.host, non_blocking=True)


def capture(run: Callable[[], object], warm: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches. It runs `warm` times before, so that every kernel is compiled and loaded."""
    for _ in range(warm):
        run()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph
