"""A GPU's KV blocks as bytes for the tiers below: copied out and in on a stream of their own, beside the steps.

Owns that stream. Never decides which block moves, and never runs on the step's thread."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from engine.step import Bytes


class DeviceMemory:
    """engine.step.KVMemory over [blocks, ...] of device memory."""

    def __init__(self, pool: Tensor, steps: torch.cuda.Stream | None):
        self._bytes = pool.view(torch.uint8).view(len(pool), -1)
        self._steps = steps  # where steps compute; None: not on a GPU, and nothing is in flight
        self._copies = torch.cuda.Stream(pool.device) if steps is not None else None  # type: ignore[no-untyped-call]
        self._turn = threading.Lock()  # one copy at a time: the link is one, and torch's stream is the thread's

    @property
    def block_bytes(self) -> int:
        """KV of one block over all layers."""
        return self._bytes.shape[1]

    def save(self, block: int, into: Bytes) -> None:
        """Copy a block out."""
        self._copy(torch.from_numpy(into), self._bytes[block])

    def load(self, block: int, payload: Bytes) -> None:
        """Copy a block in."""
        self._copy(self._bytes[block], torch.from_numpy(payload))

    def _copy(self, into: Tensor, source: Tensor) -> None:
        if self._copies is None or self._steps is None:
            into.copy_(source)
            return
        with self._turn, torch.inference_mode(), torch.cuda.stream(self._copies):
            # A step in flight may still write where an ended sequence's next token would have been: in this block.
            self._copies.wait_stream(self._steps)
            into.copy_(source)
            self._copies.synchronize()
