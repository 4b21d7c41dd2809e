"""The link between host and device memory: copies by address, in each direction on a stream of its own.

Owns those streams and the driver's calls. Knows bytes alone: no block, no slot. A test's link pretends the same."""

from __future__ import annotations

import ctypes
import enum
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from engine.step import HOST_BYTES_PER_S, Copied, Fence

# An H100's host, 8 MiB pieces: 7.4 GB/s in and 10.8 out from ordinary memory, 49.5 and 54.7 from registered. A call for
# each piece costs 6 us; torch's copy_ from registered memory 150 to 260 us.
PAGEABLE_BYTES_PER_S, PINNED_BYTES_PER_S = 7.4e9, 49.5e9


class Way(enum.IntEnum):
    """A copy's direction; the values are the runtime's (cudaMemcpyKind)."""

    UP = 1  # host to device
    DOWN = 2


class Piece(NamedTuple):
    """Addresses of one contiguous copy."""

    into: int
    source: int


class Link(Protocol):
    """Copies beside the steps. One thread a direction; the fence by the step's thread."""

    @property
    def pageable_bytes_per_s(self) -> float:
        """Up, from ordinary memory: a guess."""

    @property
    def pinned_bytes_per_s(self) -> float:
        """Up, from pinned memory: a guess."""

    def fence(self) -> Fence:
        """Behind all steps launched so far."""

    def copy(self, way: Way, pieces: Sequence[Piece], size: int, after: Fence | None, /) -> Copied:
        """Begin to copy pieces of `size` bytes, in order. When it raises, none is under way."""

    def pin(self, address: int, count: int) -> None:
        """Lock host memory. Raises OSError."""

    def unpin(self, address: int) -> None:
        """Undo it."""


class HostLink:
    """Where the device's memory is the host's own (Triton's interpreter)."""

    pageable_bytes_per_s = pinned_bytes_per_s = HOST_BYTES_PER_S

    def fence(self) -> Fence:
        """A step has ended when its call returns."""
        return None

    def copy(self, _way: Way, pieces: Sequence[Piece], size: int, _after: Fence | None) -> Copied:
        """Copy them now."""
        started = time.perf_counter()
        for piece in pieces:
            ctypes.memmove(piece.into, piece.source, size)
        seconds = time.perf_counter() - started
        return lambda: seconds

    def pin(self, address: int, count: int) -> None:
        """Nothing to lock it for."""

    def unpin(self, address: int) -> None:
        """As `pin`."""


class CudaLink:
    """One CUDA device, by the runtime that torch has loaded."""

    pageable_bytes_per_s = PAGEABLE_BYTES_PER_S
    pinned_bytes_per_s = PINNED_BYTES_PER_S

    def __init__(self, device: torch.device, steps: torch.cuda.Stream):
        self._device, self._steps = device, steps
        self._runtime = _runtime()
        self._streams = {way: torch.cuda.Stream(device) for way in Way}  # type: ignore[no-untyped-call]

    def fence(self) -> Fence:
        """An event behind what was launched."""
        return self._steps.record_event()

    def copy(self, way: Way, pieces: Sequence[Piece], size: int, after: Fence | None) -> Copied:
        """One call a piece; the copying thread alone waits, and sleeps meanwhile."""
        stream, copy = self._streams[way], self._runtime.cudaMemcpyAsync
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            if isinstance(after, torch.cuda.Event):
                stream.wait_event(after)
            begin.record(stream)
            try:
                for into, source in pieces:
                    self._check("cudaMemcpyAsync", copy(into, source, size, way, stream.cuda_stream))
            except OSError:
                stream.synchronize()
                raise
            end.record(stream)

        def copied() -> float:
            end.synchronize()
            seconds: float = begin.elapsed_time(end) / 1e3
            return seconds

        return copied

    def pin(self, address: int, count: int) -> None:
        """Register host memory with the driver."""
        with torch.cuda.device(self._device):
            self._check("cudaHostRegister", self._runtime.cudaHostRegister(address, count, 0))

    def unpin(self, address: int) -> None:
        """Before it is unmapped: what is mapped there later could not be registered."""
        with torch.cuda.device(self._device):
            self._check("cudaHostUnregister", self._runtime.cudaHostUnregister(address))

    def _check(self, call: str, code: int) -> None:
        if code:
            self._runtime.cudaGetLastError()  # else torch's next launch in this thread finds it
            raise OSError(f"{call}: {self._runtime.cudaGetErrorString(code).decode()}")


def _runtime() -> ctypes.CDLL:
    """The CUDA runtime, by the name under which torch has loaded it. Calls let other threads run."""
    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
    address, size = ctypes.c_void_p, ctypes.c_size_t
    _declare(runtime.cudaMemcpyAsync, address, address, size, ctypes.c_int, address)
    _declare(runtime.cudaHostRegister, address, size, ctypes.c_uint)
    _declare(runtime.cudaHostUnregister, address)
    _declare(runtime.cudaGetErrorString, ctypes.c_int)
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime


def _declare(call: Callable[..., int], *arguments: type) -> None:
    call.argtypes, call.restype = arguments, ctypes.c_int  # type: ignore[attr-defined]
