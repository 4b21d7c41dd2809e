"""A policy by the clock: data-processor requests are held by day and run at night.

Owns one rule of admission. Everything else is Headway's; `now` is an argument, so the rule replays as it ran. Monotonic
seconds are no time of day: `midnight` says at which of them a day began, as the deployment knows when it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from policies.api import Flow, Forecast, Hold, Job, RouterPolicy, Verdict
from policies.builtin import headway
from policies.request import RequestClass

DAY_S = 86_400.0


def night_batch(params: Mapping[str, Any]) -> RouterPolicy:
    """Parameters: `opens_h` 20 and `closes_h` 6, hours of the day; `midnight` 0; all others are Headway's."""
    opens_s, closes_s = (3600.0 * float(params.get(name, hour)) for name, hour in (("opens_h", 20), ("closes_h", 6)))
    midnight = float(params.get("midnight", 0.0))
    ours = headway({name: params[name] for name in ("promises", "tenants", "weights") if name in params})

    def admit(job: Job, forecasts: Sequence[Forecast], flow: Flow, now: float) -> Verdict:
        hour_s = (now - midnight) % DAY_S
        is_night = hour_s >= opens_s or hour_s < closes_s
        verdict = ours.admit(job, forecasts, flow, now)
        if job.request_class is not RequestClass.DATA_PROCESSOR or is_night or job.patience_left_s(now) < DAY_S / 2:
            return verdict  # who cannot wait for the night is served as ever
        return Hold("data-processor requests run at night")

    return replace(ours, admit=admit)
