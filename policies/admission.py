"""Which request goes to a worker now, which waits, and which is told no.

Owns the rules and the honest estimate of when a request would start. Never places and never keeps a queue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from policies.api import Admit, Flow, Forecast, Hold, Job, Refuse, Verdict
from policies.limits import Limits
from policies.request import RequestClass

if TYPE_CHECKING:
    from policies.ordering import WaitingRoom
    from policies.worker import Fleet


def admit(job: Job, forecasts: Sequence[Forecast], flow: Flow, now: float) -> Verdict:
    """Now if the budget holds and nobody waits who would mind, or the request is next and a worker is about to run dry;
    else wait while the client would; else no."""
    best = forecasts[0] if forecasts else None
    if best is not None:
        if best.is_alone:
            return Admit("alone on an idle worker")
        may_go = flow.is_next or (best.is_feasible and flow.may_pass(job, best, now))
        if may_go and (reason := _why_now(job, best, flow.limits)):
            return Admit(reason)
    start_s = flow.predicted_start_s(job, best)
    if start_s > job.patience_left_s(now):
        return Refuse(503, "patience", "No worker would start this request before its client leaves.", start_s)
    if not flow.has_space(job, best.cost_s if best is not None else 0.0):
        return room_is_full(start_s)
    return Hold("no worker has room for it in time")


def admit_always(job: Job, forecasts: Sequence[Forecast], flow: Flow, now: float) -> Verdict:
    """For baselines that queue in the engine: any worker will do; wait only while there is none."""
    return Admit("placed") if forecasts and forecasts[0].has_room else admit(job, forecasts, flow, now)


def _why_now(job: Job, best: Forecast, limits: Limits) -> str:
    """The reason to go to `best` at once, or nothing."""
    if job.request_class is RequestClass.DATA_PROCESSOR and best.staged >= limits.staged_batch_max:
        return ""
    if best.is_feasible:
        return "within budget"
    # Late or not: a worker that is about to run dry would waste time. Residents keep their pace all the same.
    if best.has_room and best.is_steady and best.ahead_s <= limits.stage_s:
        return "next in line"
    return ""


class QueueFlow(NamedTuple):
    """The waiting room and the fleet, as admission sees them. Implements Flow."""

    limits: Limits
    room: WaitingRoom
    fleet: Fleet
    is_next: bool

    def predicted_start_s(self, job: Job, best: Forecast | None) -> float:
        """Fluid drain: waiting prefill over all workers behind what is queued on the best one; where decode room or
        KV is short, the rate at which residents end."""
        if best is None:
            return 0.0  # no worker at all: the keeper is starting one; hold as long as the client does
        model, cls = job.request.model, job.request_class
        waiting_s = 0.0 if self.is_next else self.drain_s(model, cls)
        start_s = max(0.0, best.ahead_s - self.limits.stage_s) + waiting_s
        if best.is_steady and best.has_room:
            return start_s
        before = self.room.count(model, cls)
        return max(start_s, self._exit_s(job, best) * (1 if self.is_next else before + 1))

    def may_pass(self, job: Job, best: Forecast, now: float) -> bool:
        """A long prompt that fits nowhere yet would else hold short ones back that do. Whose tenant had more than its
        share passes only to a worker that is about to run dry: that time would be lost."""
        model, cls = job.request.model, job.request_class
        if self.room.count(model, cls) > self.room.class_count(model, cls):
            return False
        oldest = self.room.oldest(model, cls)
        runs_dry = best.ahead_s <= self.limits.stage_s
        if not runs_dry and not self.room.accounts.is_fair(job.request.tenant.id, self.limits.fair_quantum_s):
            return False
        return oldest is None or now - oldest.request.arrived < self.limits.pass_share * oldest.wait_max_s

    def drain_s(self, model: str, request_class: RequestClass) -> float:
        """Seconds that all workers together need for what waits of this class and of more urgent ones."""
        return self.room.work_s(model, request_class) / max(1, self.fleet.count(model))

    def _exit_s(self, job: Job, best: Forecast) -> float:
        """Seconds between two residents' ends, over all workers, by Little's law."""
        residents = float(self.fleet.streams.sum())
        life_s = job.output.q80 * best.tpot_s
        return life_s / residents if residents else 0.0

    def has_space(self, job: Job, cost_s: float) -> bool:
        if job.is_reserved:
            return True
        is_known = job.is_continuing or job.attempt > 1
        return self.has_space_for(job.request.model, job.request_class, cost_s, is_known=is_known)

    def has_space_for(self, model: str, request_class: RequestClass, cost_s: float, *, is_known: bool) -> bool:
        """A room is as large as the fleet, less what is kept for those who were told to come back now. New sessions see
        a part of it: a turn in mid-session still finds a place."""
        room_s = self.limits.room_s[request_class] * max(1, self.fleet.count(model))
        share = 1.0 if is_known else self.limits.room_new_share
        kept_s = self.room.reservations.open_s((model, request_class))
        return self.room.class_work_s(model, request_class) + kept_s + cost_s <= room_s * share


def retry_after_s(start_s: float, jitter: float, limits: Limits) -> float:
    """What a refused client is told: whole seconds, at least one, spread so that a burst does not return as one."""
    spread = 1.0 + limits.retry_after_jitter * jitter
    return float(min(limits.retry_after_max_s, max(1, math.ceil(start_s * spread))))


def room_is_full(start_s: float) -> Refuse:
    """Ours to answer for: 503."""
    return Refuse(503, "waiting-room-full", "The waiting room for this class of request is full.", start_s)


def too_long(tokens: int, limit: int) -> Refuse:
    """For ever: the words are those that agents know to answer with compaction."""
    message = (
        f"This model's maximum context length is {limit} tokens. However, your messages resulted in {tokens} tokens."
    )
    return Refuse(400, "context-length", message, None)
