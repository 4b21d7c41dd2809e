"""A policy by the hour: batch work whose client can wait for the night waits for it.

Owns one rule of admission and where its clock stands; everything else is Headway's. `now` is monotonic and no time of
day: what the clock said when the router started comes as an event, so the rule replays as it ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from policies.api import Admit, Flow, Forecast, Hold, Job, RouterPolicy, Verdict
from policies.builtin import headway
from policies.events import Event, Reconfigured, Started
from policies.params import number
from policies.request import RequestClass

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
SPARE_S = HOUR_S  # between the opening and the end of a client's patience: the night's queue has to be served, too
HOURS = {"opens_h": 20.0, "closes_h": 6.0, "utc_offset_h": 0.0}


@dataclass(slots=True)
class Clock:
    """The time of day. Until the router has said what it was, time 0 is midnight, as in the simulator."""

    zero_s: float = 0.0

    def learn(self, event: Event) -> None:
        if isinstance(event, Started | Reconfigured):
            self.zero_s = event.clock_zero_s

    def until_s(self, time_of_day_s: float, now: float) -> float:
        """Seconds to the next such time."""
        return (time_of_day_s - self.zero_s - now) % DAY_S


def night_batch(params: Mapping[str, Any]) -> RouterPolicy:
    """Parameters: `opens_h` 20 and `closes_h` 6, hours of the day; `utc_offset_h` 0; all others are Headway's.

    Who says `completion_window: 24h` can wait; a class can be made to by its `patience_s`."""
    opens_h, closes_h, offset_h = (number(params, name, hour) for name, hour in HOURS.items())
    opens_s, closes_s = ((hour - offset_h) * HOUR_S for hour in (opens_h, closes_h))
    ours, clock = headway({name: value for name, value in params.items() if name not in HOURS}), Clock()

    def admit(job: Job, forecasts: Sequence[Forecast], flow: Flow, now: float) -> Verdict:
        verdict = ours.admit(job, forecasts, flow, now)
        wait_s = clock.until_s(opens_s, now)
        is_day = wait_s < clock.until_s(closes_s, now)
        can_wait = job.request_class is RequestClass.DATA_PROCESSOR and job.patience_left_s(now) > wait_s + SPARE_S
        return Hold("runs at night") if isinstance(verdict, Admit) and is_day and can_wait else verdict

    return replace(ours, admit=admit, learn=clock.learn)
