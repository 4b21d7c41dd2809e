"""A task's slack: seconds that a background agent's turns did not need of their deadlines, for its next turn.

Owns what each session has saved. Never promises: it loosens a promise by what is left, and takes that out of the purse,
so that two turns at once cannot spend it twice."""

from __future__ import annotations

import math
from dataclasses import replace

from policies.api import Promise
from policies.request import Budget, Request, RequestClass
from policies.sessions import REMEMBERED_S, is_inner

TaskKey = tuple[str, str]  # salt domain, session


class Tasks:
    """Purses of background agents' sessions, least recently filled first out. One that is not there is empty."""

    def __init__(self, tasks_max: int, slack_max_s: float) -> None:
        self._tasks_max, self._slack_max_s = tasks_max, slack_max_s
        self._saved: dict[TaskKey, tuple[float, float]] = {}  # seconds, and when they were saved

    def __len__(self) -> int:
        return len(self._saved)

    def loosen(self, request: Request, request_class: RequestClass, promise: Promise, now: float) -> Promise:
        """The promise with all that the task has saved; the purse is empty until the turn ends."""
        if not self._saved or not _is_turn(request, request_class):
            return promise
        saved_s, saved_at = self._saved.pop((request.tenant.organisation, request.session), (0.0, -math.inf))
        if now - saved_at > REMEMBERED_S:
            return promise
        budget = promise.budget
        loose = Budget(budget.ttft_s + saved_s, budget.tpot_s, budget.deadline_s + saved_s)
        return replace(promise, budget=loose, saved_s=saved_s)

    def ended(self, request: Request, request_class: RequestClass, promise: Promise, now: float) -> None:
        """A turn was answered: what is left of its deadline is the task's, whatever it had been given."""
        if _is_turn(request, request_class) and promise.budget.deadline_s < math.inf:
            self._save(request, request.arrived + promise.budget.deadline_s - now, now)

    def given_up(self, request: Request, promise: Promise, now: float) -> None:
        """A turn had no answer: it saves nothing of its own, and keeps what its wait has not used of the purse."""
        if promise.saved_s:
            self._save(request, request.arrived + promise.saved_s - now, now)

    def _save(self, request: Request, left_s: float, now: float) -> None:
        """Turns at one time do not add up: a task is as far ahead as one of them, not as all of them."""
        key = (request.tenant.organisation, request.session)
        left_s = max(min(left_s, self._slack_max_s), self._saved.pop(key, (0.0, 0.0))[0])
        if left_s <= 0.0:
            return
        self._saved[key] = left_s, now
        while len(self._saved) > self._tasks_max:
            del self._saved[next(iter(self._saved))]


def _is_turn(request: Request, request_class: RequestClass) -> bool:
    """Whether the request is a step of an agent's task. Who names a window of its own is judged by that alone; what a
    subagent saves is nobody's unless its root waits for it alone, which cannot be known."""
    is_agent = request_class is RequestClass.BACKGROUND_AGENT and bool(request.session)
    return is_agent and not request.facts.completion_window and not is_inner(request)
