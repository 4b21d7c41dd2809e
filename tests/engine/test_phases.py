"""What a worker does around its start: phases add up, and threads that wait for the interpreter get it soon."""

from __future__ import annotations

import gc
import sys

from engine import build
from engine.phases import Phases


def test_phases_add_up_and_are_told_in_order() -> None:
    times = iter([10.0, 12.5, 13.0, 14.0])
    phases = Phases(lambda: next(times))

    for name in ("imports", "weights", "imports"):
        phases.end(name)

    assert phases.seconds == {"imports": 3.5, "weights": 0.5}
    assert str(phases) == "4.0 s: imports 3.5, weights 0.5"


def test_a_settled_process_switches_threads_sooner_and_collects_nothing_of_its_start() -> None:
    before = sys.getswitchinterval()
    try:
        build.settle()

        assert sys.getswitchinterval() < before
        assert abs(sys.getswitchinterval() - build.SWITCH_S) < 1e-6
        assert gc.get_freeze_count() > 0
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()
