"""What a class is promised: class, tenant and new tokens become a budget; beside it, how long the client will wait.

Owns the table of promises. Never orders or refuses; numbers here are what the report later judges by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from policies.api import Output, Promise, Prompt
from policies.costs import StepModel
from policies.params import number, table
from policies.request import CLASS_NAMES, Budget, Request, RequestClass

HEADROOM = 1.5  # never tighter than this multiple of what an idle worker needs
# Of an idle worker's own step, for the pace: a step that serves others too is longer. On CPU eight streams take 1.5
# times one, a chunk of somebody's prompt adds 0.4, a busy neighbour on the same memory 0.3 and more.
PACE_HEADROOM = 2.5
TIMEOUT_MARGIN = 0.05  # of a declared timeout: the answer must still travel
FLEX_S = 900.0
WINDOW_UNIT_S = {"m": 60.0, "h": 3600.0}
WINDOW_CHARS_MAX = 6  # 99999h


@dataclass(frozen=True, slots=True)
class ClassPromise:
    """One row of the table. Seconds; infinity promises nothing."""

    ttft_s: float
    ttft_per_prefill: float  # beside it: this multiple of the unloaded prefill of the new tokens
    tpot_s: float
    deadline_s: float
    deadline_per_turn: float  # beside it: this multiple of the unloaded turn
    patience_s: float


DEFAULTS = (
    ClassPromise(1.0, 1.5, 0.040, math.inf, 0.0, 30.0),
    ClassPromise(15.0, 0.0, 0.150, 15.0, 3.0, 600.0),
    ClassPromise(math.inf, 0.0, math.inf, FLEX_S, 0.0, FLEX_S),
)

Rows = tuple[ClassPromise, ClassPromise, ClassPromise]


@dataclass(frozen=True, slots=True)
class Promises:
    """The table in force. Calling it makes a promise; tenants may have rows of their own."""

    rows: Rows = DEFAULTS
    tenants: Mapping[str, Rows] = field(default_factory=dict)

    def __call__(
        self, request: Request, request_class: RequestClass, prompt: Prompt, output: Output, profile: StepModel | None
    ) -> Promise:
        row = self.tenants.get(request.tenant.id, self.rows)[request_class]
        window_s = _window_s(request)
        patience_s = patience(request, row.patience_s if window_s is None else window_s)
        if profile is None:
            return Promise(Budget(row.ttft_s, row.tpot_s, row.deadline_s), patience_s)
        budget = make_budget(row, prompt, output, profile)
        if window_s is not None:
            budget = replace(budget, deadline_s=window_s)
        return Promise(budget, patience_s)


def make_budget(row: ClassPromise, prompt: Prompt, output: Output, profile: StepModel) -> Budget:
    """A row applied to one prompt on one kind of hardware."""
    unloaded_s = profile.unloaded_ttft_s(prompt.new_tokens, prompt.tokens - prompt.new_tokens)
    step_s = profile.decode_s(1, prompt.tokens)  # a judge who cannot know our guess of the output makes the same line
    turn_s = unloaded_s + output.q80 * step_s
    return Budget(
        ttft_s=max(row.ttft_s + row.ttft_per_prefill * unloaded_s, HEADROOM * unloaded_s),
        tpot_s=max(row.tpot_s, PACE_HEADROOM * step_s),
        deadline_s=max(row.deadline_s + row.deadline_per_turn * turn_s, HEADROOM * turn_s),
    )


def patience(request: Request, cap_s: float) -> float:
    """When the client leaves: its declared timeout less a margin, or the class's cap if that is shorter."""
    declared_s = request.declared_timeout_s
    return cap_s if declared_s is None else min(cap_s, declared_s * (1 - TIMEOUT_MARGIN))


def _window_s(request: Request) -> float | None:
    """A declared completion window, such as `24h`, in seconds."""
    window = request.facts.completion_window
    if 1 < len(window) <= WINDOW_CHARS_MAX and window[:-1].isdecimal() and window[-1] in WINDOW_UNIT_S:
        return int(window[:-1]) * WINDOW_UNIT_S[window[-1]]
    return None


def from_params(params: Mapping[str, Any]) -> Promises:
    """Promises from a PolicySpec: `{"promises": {"chatbot+": {"tpot_s": 0.06}}, "tenants": {"id": {...}}}`.

    Raises ValueError on a name that does not exist, so that a typo in a config never passes."""
    rows = _rows(DEFAULTS, table(params, "promises"))
    tenants = table(params, "tenants")
    return Promises(rows, {tenant: _rows(rows, table(tenants, tenant)) for tenant in tenants})


def _rows(base: Rows, changes: Mapping[str, Any]) -> Rows:
    rows = list(base)
    for name in changes:
        if name not in CLASS_NAMES:
            raise ValueError(f"no class is called {name!r}")
        fields = table(changes, name)
        if unknown := sorted(set(fields) - set(ClassPromise.__dataclass_fields__)):
            raise ValueError(f"a promise has no {unknown[0]!r}")
        seconds = {field_name: number(fields, field_name, 0.0) for field_name in fields}
        if any(value < 0 for value in seconds.values()):
            raise ValueError(f"promises to {name!r} must be seconds, zero or more")
        rows[CLASS_NAMES[name]] = replace(rows[CLASS_NAMES[name]], **seconds)
    return rows[0], rows[1], rows[2]
