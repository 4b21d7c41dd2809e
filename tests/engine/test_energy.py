"""Joules by class: they sum to the counter, follow the step model, and stop where the counter does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engine.energy import IDLE, WINDOW_S, Counter, CounterError, Energy, Nvml, class_seconds, opened
from engine.wire import StepFrame, Submit
from policies.costs import StepModel
from policies.request import RequestClass
from tests.engine.later import Later
from tests.engine.rig import BATCH, CHAT, order, prompt
from tests.engine.test_core import Loop

POWER_W = 400.0


class Meter:
    """A counter of a card that draws constant power, told to fail when it is broken."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self.is_broken = loop, False

    def joules(self) -> float:
        if self.is_broken:
            raise CounterError("lost")
        return 5e6 + POWER_W * self._loop.now


def metered(slower: float = 20.0) -> tuple[Loop, Meter]:
    loop = Loop(slower)
    meter = Meter(loop)
    loop.core._energy = Energy(meter, loop.now)
    loop.attach()
    loop.outbox.take()
    return loop, meter


def served(loop: Loop, *orders: Submit) -> list[float]:
    """Joules after all have ended and one more window."""
    loop.send(*orders)
    ended = 0
    while ended < len(orders):
        ended += len(loop.frame().ends)
    loop.now += WINDOW_S
    return loop.frame().load.joules


def test_joules_of_all_classes_and_idle_sum_to_the_counter() -> None:
    loop, meter = metered()
    started = meter.joules()

    joules = served(loop, *(order(n, prompt(n, 40), cls=cls, max_tokens=40) for n, cls in enumerate(RequestClass)))

    assert sum(joules) == pytest.approx(meter.joules() - started, rel=0.02)
    assert min(joules[:IDLE]) > 0


def test_a_window_in_which_nothing_ran_is_idle_and_a_shorter_one_waits() -> None:
    loop, _ = metered()
    loop.now += WINDOW_S / 2
    assert loop.frame().load.joules == [0.0, 0.0, 0.0, 0.0]

    loop.now += WINDOW_S
    assert loop.frame().load.joules == [0.0, 0.0, 0.0, pytest.approx(1.5 * POWER_W * WINDOW_S)]


def test_a_class_has_the_seconds_of_its_own_rows_in_a_step() -> None:
    model = StepModel(
        floor_s=1.0, row_s=0.01, base_s=1.0, decode_context_s=0.001, chunk_context_s=0.0002, sequence_s=0.1
    )
    contexts, classes = np.array([100, 300, 50]), np.array([CHAT, CHAT, BATCH])
    launch = SimpleNamespace(tokens=np.array([1, 1, 20]), contexts_and_classes=lambda: (contexts, classes))

    chat_s = 2 * (0.01 + 0.1) + 0.001 * 400
    batch_s = 20 * 0.01 + 0.1 + 0.0002 * 20 * (50 + 10)
    assert class_seconds(launch, model).tolist() == pytest.approx([chat_s, 0.0, batch_s])


def test_a_counter_that_is_lost_ends_the_counting_and_keeps_what_was_counted(caplog: pytest.LogCaptureFixture) -> None:
    loop, meter = metered()
    loop.now += WINDOW_S
    before = loop.frame().load.joules
    meter.is_broken = True
    for _ in range(3):
        loop.now += WINDOW_S
        frame = loop.frame()
        assert isinstance(frame, StepFrame)
        assert frame.load.joules == before
    assert caplog.text.count("not counted any more") == 1


def test_a_counter_that_starts_anew_takes_nothing_back() -> None:
    readings = iter([100.0, 3.0, 10.0])
    energy = Energy(SimpleNamespace(joules=lambda: next(readings)), 0.0)

    assert energy.read(1.0) == [0.0, 0.0, 0.0, 0.0]
    assert energy.read(2.0) == [0.0, 0.0, 0.0, 7.0]


def test_steps_go_on_while_the_counter_is_asked() -> None:
    reader, readings = Later(), iter([100.0, 130.0, 150.0])
    energy = Energy(SimpleNamespace(joules=lambda: next(readings)), 0.0, reader)

    assert energy.read(1.0) == energy.read(2.5) == [0.0, 0.0, 0.0, 0.0]  # asked once, not answered
    reader.run()
    assert energy.read(2.6) == energy.read(2.7) == [0.0, 0.0, 0.0, 30.0]
    reader.run()
    assert energy.read(2.8) == [0.0, 0.0, 0.0, 50.0]


class NVMLError(Exception):
    """As NVML's Python names it."""


def nvml(millijoules: int | None) -> SimpleNamespace:
    """NVML of one card; None: it has no counter."""

    def handle(uuid: str) -> str:
        if uuid != "GPU-1234":
            raise NVMLError("no such card")
        return "card"

    def total(card: str) -> int:
        if card != "card" or millijoules is None:
            raise NVMLError("not supported")
        return millijoules

    return SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=total,
    )  # fmt: skip


def test_nvml_counts_millijoules_of_the_card_with_that_number() -> None:
    counter: Counter = Nvml(nvml(2500), "1234")

    assert counter.joules() == 2.5
    assert Nvml(nvml(2500), "1234", "1234").joules() == 5.0  # cards of one model
    with pytest.raises(CounterError, match="no such card"):
        Nvml(nvml(2500), "GPU-99")
    with pytest.raises(CounterError, match="not supported"):
        Energy(Nvml(nvml(None), "GPU-1234"), 0.0)


def test_a_cpu_has_no_counter() -> None:
    assert opened("cpu", lambda: 0.0) is None
