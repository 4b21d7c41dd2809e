"""What a captured step reads: static inputs on the device, filled by one packed copy a step; and the capture itself.

Owns the layout of the packed copy and the graphs. Never decides what a step holds, never reads results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.compute.arrange import Arranged, Size
from engine.kernels.paged import Step
from engine.kernels.rows import carry
from engine.kernels.sample import Knobs
from engine.models.gpu import Inputs

HOST_BUFFERS = 3  # one step computes, one waits behind it, one is being filled

COUNTS = {  # what of a step each array has one number of
    "ids": "rows", "positions": "rows", "slots": "rows", "sources": "rows", "row_starts": "sequences + 1",
    "contexts": "sequences", "shared": "sequences", "leads": "sequences", "sample_rows": "sampled",
    "temperature": "sampled", "top_k": "sampled", "top_p": "sampled", "min_p": "sampled", "uniform": "sampled",
    "part_size": "one",
}  # fmt: skip


def numbers_of(name: str, size: Size) -> int:
    """Numbers in the array of that name."""
    counts = {"rows": size.rows, "sequences": size.sequences, "sampled": size.sampled, "one": 1}
    return counts.get(COUNTS[name]) or size.sequences + 1


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Static inputs of every step: int32 buffers on the host, pinned and taken in turn, and their place on the device.

    Block tables travel compact behind the rest and are laid out on the device, so that a table of 2,048 blocks a
    sequence costs only what is used of it."""

    most: Size
    hosts: tuple[Tensor, ...]  # [n] int32
    device: Tensor  # [n] int32
    spans: dict[str, tuple[int, int]]
    tables_at: int
    table: Tensor  # [sequences, blocks] int32
    turns: Tensor  # [rows, head_dim]

    @classmethod
    def make(cls, most: Size, blocks: int, head_dim: int, device: torch.device) -> StepInputs:
        """For steps up to this size, of sequences of at most `blocks` blocks."""
        sizes = [numbers_of(name, most) for name in COUNTS]
        starts = np.cumsum([0, *(-(-size // 4) * 4 for size in sizes)]).tolist()  # 16 bytes: what kernels assume
        spans = {name: (at, at + size) for name, size, at in zip(COUNTS, sizes, starts[:-1], strict=True)}
        numbers = starts[-1] + most.sequences * blocks
        is_cuda = device.type == "cuda"
        hosts = tuple(torch.zeros(numbers, dtype=torch.int32, pin_memory=is_cuda) for _ in range(HOST_BUFFERS))
        table = torch.zeros(most.sequences, blocks, dtype=torch.int32, device=device)
        turns = torch.zeros(most.rows, head_dim, device=device)
        return cls(most, hosts, torch.zeros(numbers, dtype=torch.int32, device=device), spans, starts[-1], table, turns)

    def view(self, size: Size) -> tuple[Inputs, Knobs]:
        """What a step of this size reads."""

        def at(name: str) -> Tensor:
            start, _ = self.spans[name]
            return self.device[start : start + numbers_of(name, size)]

        step = Step(
            at("row_starts"), at("contexts"), self.table[: size.sequences], at("slots"), self.turns[: size.rows],
            at("shared"), at("leads"), at("part_size"),
        )  # fmt: skip
        numbers = {name: at(name).view(torch.float32) for name in ("temperature", "top_p", "min_p", "uniform")}
        knobs = Knobs(numbers["temperature"], at("top_k"), numbers["top_p"], numbers["min_p"], numbers["uniform"])
        return Inputs(at("ids"), at("positions"), at("sample_rows"), step, at("sources")), knobs

    def write(self, turn: int, step: Arranged, *, has_tables: bool = True) -> None:
        """Send a step: its arrays from the front, padding behind them. The host buffer of this turn is read only when
        the step begins: a caller with steps in flight counts turns up. Without tables those of the step before stay."""
        host = self.hosts[turn % HOST_BUFFERS]
        flat = host.numpy()
        for name, (start, _) in self.spans.items():
            array = step.arrays.get(name)
            count = 0 if array is None else len(array)
            if array is not None:
                flat[start : start + count] = array.view(np.int32)
            flat[start + count : start + numbers_of(name, step.size)] = -1 if name in ("slots", "sources") else 0
        if not has_tables:
            self.send(turn, self.tables_at)
            return
        end = self.tables_at + step.tables.size
        flat[self.tables_at : end] = step.tables.reshape(-1)
        self.send(turn, end)
        rows, width = step.tables.shape
        self.table[:rows, :width].copy_(self.device[self.tables_at : end].view(rows, width))

    def send(self, turn: int, count: int) -> None:
        """Carry the first `count` numbers of this turn's host buffer to the device."""
        carry(self.hosts[turn % HOST_BUFFERS][:count], self.device[:count])


class Graphs:
    """Captured steps by key. A key's first run is plain, its second is captured, later ones are replayed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[object] = set()
        self._captured: dict[object, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: object, launch: Callable[[], object]) -> None:
        """Launch, or replay what was launched before under this key, on the current stream."""
        graph = self._captured.get(key)
        if graph is None and key in self._seen:
            graph = self.capture(key, launch)
        if graph is not None:
            graph.replay()
            return
        self._seen.add(key)
        launch()

    def capture(self, key: object, launch: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        """Have it captured, not run; None if there are as many as may be. What it launches must be on the device."""
        if len(self._captured) >= self._limit:
            return None
        graph = self._captured[key] = self._capture(launch)
        return graph

    def _capture(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
        return graph
