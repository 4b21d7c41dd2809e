"""Readiness: whether this router can serve, and which budgets are in force if it does.

Owns the answer of /readyz. Asks the policy itself what it would promise, so the printed budget is the real one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from policies.api import Output, Promise, Prompt, RouterPolicy
from policies.chain import NO_CHAIN
from policies.costs import StepModel
from policies.request import Facts, Request, RequestClass, RequestId, Tenant
from router.workers.fleet import ModelView

PROBE_TOKENS = 1024  # a slope is measured over so many: beyond the floor that reading the weights sets

Budgets = dict[str, dict[str, float | None]]


class Serving(Protocol):
    """Those who compute: our own fleet, or upstreams."""

    @property
    def up_count(self) -> int: ...
    def is_ready(self) -> bool: ...
    def models(self) -> Mapping[str, ModelView]: ...


@dataclass(slots=True)
class Readiness:
    """Asked by /readyz; `is_draining` is set once and stays."""

    fleet: Serving
    policy: RouterPolicy
    profile: Callable[[str], StepModel | None]  # the fastest worker's model, by model name
    tenant: Tenant
    is_draining: bool = False

    def is_ready(self) -> bool:
        """A worker has proved a step, and we are not leaving."""
        return not self.is_draining and self.fleet.is_ready()

    def state(self) -> tuple[bool, Mapping[str, object]]:
        """What /readyz says: whether we are ready, and what there is."""
        model = next(iter(self.fleet.models()), "")
        workers = self.fleet.up_count
        return self.is_ready(), {"workers": workers, "model": model, "budgets": self._budgets(model)}

    def _budgets(self, model: str) -> Budgets:
        profile = self.profile(model)
        if profile is None:
            return {}
        return {cls.label: self._budget(model, cls, profile) for cls in RequestClass}

    def _budget(self, model: str, cls: RequestClass, profile: StepModel) -> dict[str, float | None]:
        """The promise as straight lines: what the smallest request gets, and what each further token adds."""
        least = self._promise(model, cls, profile, new_tokens=1, output_tokens=1)
        longer = self._promise(model, cls, profile, new_tokens=1 + PROBE_TOKENS, output_tokens=1)
        wordier = self._promise(model, cls, profile, new_tokens=1, output_tokens=1 + PROBE_TOKENS)
        return {
            "ttft_s": _finite(least.budget.ttft_s),
            "ttft_s_per_new_token": _slope(least.budget.ttft_s, longer.budget.ttft_s),
            "tpot_s": _finite(least.budget.tpot_s),
            "tpot_s_per_prompt_token": _slope(least.budget.tpot_s, longer.budget.tpot_s),
            "deadline_s": _finite(least.budget.deadline_s),
            "deadline_s_per_new_token": _slope(least.budget.deadline_s, longer.budget.deadline_s),
            "deadline_s_per_output_token": _slope(least.budget.deadline_s, wordier.budget.deadline_s),
            "patience_s": _finite(least.patience_s),
        }

    def _promise(
        self, model: str, cls: RequestClass, profile: StepModel, new_tokens: int, output_tokens: int
    ) -> Promise:
        request = Request(RequestId(""), self.tenant, "", model, Facts(), 0.0, 0, new_tokens)
        output = Output(output_tokens, output_tokens, output_tokens)
        return self.policy.promise(request, cls, Prompt(new_tokens, new_tokens, NO_CHAIN), output, profile)


def _finite(seconds: float) -> float | None:
    """JSON has no infinity: a promise that was not made is null."""
    return seconds if math.isfinite(seconds) else None


def _slope(low: float, high: float) -> float | None:
    return (high - low) / PROBE_TOKENS if math.isfinite(low) and math.isfinite(high) else None
