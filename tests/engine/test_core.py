"""The loop in one thread and virtual time: links, heartbeat, drain, and the step model that it learns and tells."""

from __future__ import annotations

import numpy as np
import pytest

from engine.build import build
from engine.config import EngineConfig
from engine.core import Attach, Core, Detach, Inbox, Order
from engine.fake import FAKE_SPEED, FakeRunner, speed
from engine.outbox import Outbox
from engine.wire import Abort, Drain, Hello, StepFrame, Submit
from policies.costs import StepFeatures
from tests.engine.rig import FACTS, SIZE, expected, order, prompt

BLOCKS = 256


class Loop:
    """A core whose clock only its runner moves."""

    def __init__(self, slower: float = 1.0, tokens_max: int = 65_536) -> None:
        self.now = 0.0
        self.inbox = Inbox()
        self.runner = FakeRunner(FACTS, (BLOCKS, SIZE), speed(slower), self._sleep)
        self.core: Core = build(
            self.runner, FACTS, EngineConfig(socket=""), self.inbox, lambda: self.now, is_strict=True
        )
        self.outbox = Outbox(lambda: None, tokens_max)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def attach(self) -> Hello:
        self.inbox.put(Attach(1, self.outbox))
        self.core.turn()
        hello = self.outbox.take()
        assert isinstance(hello, Hello)
        return hello

    def send(self, *messages: Submit | Abort | Drain) -> None:
        for message in messages:
            self.inbox.put(Order(1, message, self.now))

    def frame(self) -> StepFrame:
        self.core.turn()
        frame = self.outbox.take()
        assert isinstance(frame, StepFrame)
        return frame


def test_a_link_hears_hello_first_and_then_the_load_at_once() -> None:
    loop = Loop()
    hello = loop.attach()
    first = loop.outbox.take()

    assert (hello.blocks_total, hello.context_max) == (BLOCKS, FACTS.context_max)
    assert isinstance(first, StepFrame)
    assert first.load.blocks_free == BLOCKS


def test_one_frame_a_step() -> None:
    loop = Loop()
    loop.attach()
    loop.outbox.take()
    loop.send(*(order(handle, prompt(handle, 20), max_tokens=3) for handle in (1, 2)))
    frames = [loop.frame() for _ in range(3)]

    assert [frame.counts for frame in frames] == [[1, 1]] * 3
    assert [frame.load.steps for frame in frames] == [1, 2, 3]
    assert [end.handle for end in frames[2].ends] == [1, 2]
    assert len(frames[0].stored) == 2 * 16  # a key of 16 bytes for the one full block of each


def test_a_link_that_is_full_gets_no_more_tokens_until_it_reads() -> None:
    loop = Loop(tokens_max=2)
    loop.attach()
    loop.outbox.take()
    loop.send(order(1, prompt(1, 20), max_tokens=6))
    for _ in range(5):
        loop.core.turn()
    first = loop.outbox.take()
    for _ in range(5):
        loop.core.turn()
    second = loop.outbox.take()

    assert isinstance(first, StepFrame)
    assert isinstance(second, StepFrame)
    assert np.frombuffer(first.ids + second.ids, "<i4").tolist() == expected(prompt(1, 20), 6)[:4]


def test_orders_of_a_link_that_has_gone_are_dropped_and_its_blocks_freed() -> None:
    loop = Loop()
    loop.attach()
    loop.send(order(1, prompt(1, 20), max_tokens=60))
    loop.core.turn()
    loop.inbox.put(Detach(1))
    loop.core.turn()
    loop.core.turn()  # the idle check looks for leaks
    assert loop.core._scheduler.is_idle
    assert loop.core._scheduler.repairs == 0


def test_a_drain_ends_the_loop_when_the_last_sequence_ends() -> None:
    loop = Loop()
    loop.attach()
    loop.send(order(1, prompt(1, 20), max_tokens=5), Drain(60.0), order(2, prompt(2, 20)))
    loop.core.run()
    last = [loop.outbox.take()]

    assert loop.core.is_done
    assert isinstance(last[0], StepFrame)
    assert {end.handle: end.reason for end in last[0].ends} == {1: "length", 2: "refused"}


@pytest.mark.parametrize("slower", [0.1, 1.0, 30.0])
def test_calibration_learns_the_devices_speed_in_a_second(slower: float) -> None:
    loop = Loop(slower)
    model = loop.core.calibrate(1.0)

    truth = speed(slower)
    assert loop.now <= 1.6
    assert model.version >= 1
    for step in (StepFeatures(1, 100, 0, 1), StepFeatures(8, 4000, 0, 8), StepFeatures(200, 0, 20_000, 1)):
        assert model.step_s(step) == pytest.approx(truth.step_s(step), rel=0.15)


def test_a_model_that_changed_is_told_to_links() -> None:
    loop = Loop(slower=3.0)
    loop.attach()
    loop.send(*(order(handle, prompt(handle, 100), max_tokens=40) for handle in range(1, 5)))
    told = [frame.step_model for frame in (loop.frame() for _ in range(30)) if frame.step_model]

    assert told
    assert told[-1].version == len(told)
    assert told[-1].bias * told[-1].floor_s < 10 * 3 * FAKE_SPEED.floor_s
