"""The process that compiles a GPU worker's kernels, seen from the worker: begun before torch is imported, awaited last.

Owns that process and its end. Never imports torch: a worker spends its first seconds on that, and kernels can be
compiled meanwhile."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

WAIT_S = 300.0  # how long a worker waits for the compilers before it compiles by itself


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is compiled for what."""

    folder: Path
    card: str
    capability: int  # 90 is an H100
    block_tokens: int
    sequences_max: int
    ranks: int = 1
    weights: str = "bf16"
    kv_dtype: str = "bf16"

    @property
    def command(self) -> list[str]:
        """Who makes it."""
        return [
            sys.executable, "-m", "engine.compute.precompile", str(self.folder), self.card,
            "--capability", str(self.capability), "--block-tokens", str(self.block_tokens),
            "--sequences-max", str(self.sequences_max), "--ranks", str(self.ranks),
            "--weights", self.weights, "--kv-dtype", self.kv_dtype,
        ]  # fmt: skip


class Compilers:
    """At most one process at a time: what was begun for another card or shape than is wanted now is begun anew."""

    def __init__(self) -> None:
        self._wanted: Wanted | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, wanted: Wanted) -> None:
        """Compile from now on, in processes that see no card."""
        if wanted == self._wanted:
            return
        self.close()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._wanted = wanted
        self._process = subprocess.Popen(wanted.command, env=environment, start_new_session=True)

    def wait(self, wait_s: float = WAIT_S) -> None:
        """Until all is made. Whatever is not is compiled where it is launched: later, and no worse."""
        if self._process is None:
            return
        try:
            if code := self._process.wait(wait_s):
                log.warning("kernels were not compiled ahead (exit %d): the start takes longer", code)
        except subprocess.TimeoutExpired:
            log.warning("kernels were not compiled in %.0f s: the start takes longer", wait_s)
        self.close()

    def close(self) -> None:
        """End the process, with all it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


@contextmanager
def compilers() -> Iterator[Compilers]:
    """Ended when the body is left, however that is."""
    made = Compilers()
    try:
        yield made
    finally:
        made.close()


def seen(device: str, nvml: Any = None) -> tuple[str, int] | None:
    """Name and capability of a torch device by NVML, which takes milliseconds; None where that cannot tell. A guess:
    CUDA may number cards otherwise, so whoever has torch looks again."""
    try:
        if nvml is None:
            nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # border: no driver, or no such package  # noqa: BLE001
        log.debug("no card is seen by NVML: %s", error)
        return None
    try:
        number = int(device.partition(":")[2] or 0)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        name = str(number) if visible is None else visible.split(",")[number].strip()
        if not name:
            return None
        by_uuid, by_index = nvml.nvmlDeviceGetHandleByUUID, nvml.nvmlDeviceGetHandleByIndex
        handle = by_index(int(name)) if name.isdecimal() else by_uuid(name)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        card = nvml.nvmlDeviceGetName(handle)
    except (nvml.NVMLError, IndexError) as error:
        log.debug("the card is not known before torch is: %s", error)
        return None
    return card if isinstance(card, str) else card.decode(), 10 * major + minor
