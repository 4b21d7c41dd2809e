"""What a GPU's energy counter says, attributed to the classes of requests that were computed meanwhile.

Owns the counter's readings and the split. Never measures a request: a card has one counter, so shares follow the step
model's own seconds of each row, and every figure made from them is labelled "attributed"."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.kv.copies import Inline
from policies.costs import StepModel
from policies.request import RequestClass

if TYPE_CHECKING:
    from engine.scheduling.launch import Launch

log = logging.getLogger(__name__)

WINDOW_S = 1.0  # NVML's counter moves every 20 to 100 ms: shorter windows would split noise
IDLE = len(RequestClass)  # the place behind the classes: windows in which nothing was computed

Floats = npt.NDArray[np.float64]


class CounterError(Exception):
    """The counter cannot be read."""


class Counter(Protocol):
    """A device's energy."""

    def joules(self) -> float:
        """Drawn since some moment in the past. Raises CounterError."""


class Nvml:
    """NVML's total energy of one card, or of several that compute one model."""

    def __init__(self, nvml: Any, *uuids: str) -> None:
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            names = [uuid if uuid.startswith("GPU-") else f"GPU-{uuid}" for uuid in uuids]
            self._cards = [nvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        except nvml.NVMLError as error:
            raise CounterError(str(error)) from error

    def joules(self) -> float:
        """Drawn since the driver was loaded."""
        try:
            millijoules = [self._nvml.nvmlDeviceGetTotalEnergyConsumption(card) for card in self._cards]
            return float(sum(millijoules)) / 1e3
        except self._nvml.NVMLError as error:
            raise CounterError(str(error)) from error


class Energy:
    """Joules by class, then idle: whole windows of the counter, so that they sum to what it said."""

    def __init__(self, counter: Counter, now: float, reader: Executor | None = None) -> None:
        """`reader` asks the counter, which is a call into the driver, while steps go on. Raises CounterError."""
        self._counter: Counter | None = counter
        self._reader = reader or Inline()
        self._asked: Future[float] | None = None
        self._seen, self._since = counter.joules(), now
        self._own_s = np.zeros(IDLE)
        self._joules = np.zeros(IDLE + 1)

    def computed(self, launch: Launch, model: StepModel) -> None:
        """A step was launched: what each class has in it."""
        self._own_s += class_seconds(launch, model)

    def read(self, now: float) -> list[float]:
        """Joules by class and idle up to the end of the last window that the counter has answered for."""
        if self._asked is None and self._counter is not None and now - self._since >= WINDOW_S:
            self._since, self._asked = now, self._reader.submit(self._counter.joules)
        if self._asked is not None and self._asked.done():
            answer, self._asked = self._asked, None
            try:
                self._split(answer.result())
            except CounterError as error:
                log.warning("energy is not counted any more: %s", error)
                self._counter = None
        return self._joules.tolist()

    def _split(self, seen: float) -> None:
        drawn = max(0.0, seen - self._seen)  # a driver that was loaded anew counts from 0
        self._seen = seen
        whole_s = self._own_s.sum()
        if whole_s > 0.0:
            self._joules[:IDLE] += drawn * self._own_s / whole_s
        else:
            self._joules[IDLE] += drawn
        self._own_s[:] = 0.0


# Hot: once a step where energy is counted, a few numpy calls over its sequences.
def class_seconds(launch: Launch, model: StepModel) -> Floats:
    """Own seconds of each class's rows in a step; reading the weights is nobody's own and follows these shares."""
    context, classes = launch.contexts_and_classes()
    tokens = launch.tokens
    behind = np.where(
        tokens == 1, model.decode_context_s * context, model.chunk_context_s * tokens * (context + tokens / 2)
    )
    own_s = model.row_s * tokens + model.sequence_s + behind
    return np.bincount(classes, weights=own_s, minlength=IDLE).astype(np.float64)


def opened(device: str, clock: Callable[[], float], cards: int = 1) -> Energy | None:
    """The energy of a torch device, or of so many from it on; None on a CPU, and where NVML cannot tell."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
        import torch

        first = torch.device(device).index
        uuids = [str(torch.cuda.get_device_properties(number).uuid) for number in range(first, first + cards)]
        return Energy(Nvml(pynvml, *uuids), clock(), ThreadPoolExecutor(1, "energy"))
    except (ImportError, CounterError) as error:
        log.warning("energy is not counted: %s", error)
        return None
