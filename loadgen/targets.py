"""Targets: what each request was promised, from its class and its *new* tokens, the same for every policy.

Owns which budgets are in force and where they came from. Never reads a hit that a server happened to have: a miss
would then loosen its own target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import httpx
import msgspec

from loadgen.records import Record
from loadgen.traces import CLASSES, ClassName

READY_TIMEOUT_S = 5.0


class BudgetLine(msgspec.Struct, frozen=True, omit_defaults=False):
    """A class's promise as straight lines over new, prompt and output tokens; null promises nothing."""

    ttft_s: float | None = None
    ttft_s_per_new_token: float | None = None
    tpot_s: float | None = None
    tpot_s_per_prompt_token: float | None = None
    deadline_s: float | None = None
    deadline_s_per_new_token: float | None = None
    deadline_s_per_output_token: float | None = None


Budgets = Mapping[ClassName, BudgetLine]

# The published promises, for a target that states none: 1 s and 1.5 times an unloaded prefill, taken as 50 us a token
# (an 8B-class model on one 80 GB card); background-agents have 15 s and three times their unloaded turn.
PUBLISHED: Budgets = {
    "chatbot+": BudgetLine(ttft_s=1.0, ttft_s_per_new_token=75e-6, tpot_s=0.040),
    "background-agent": BudgetLine(
        ttft_s=15.0,
        tpot_s=0.150,
        deadline_s=15.0,
        deadline_s_per_new_token=150e-6,
        deadline_s_per_output_token=0.030,
    ),
    "data-processor": BudgetLine(deadline_s=900.0),
}


@dataclass(frozen=True, slots=True)
class Target:
    """One request's promise, in seconds from its intended time; infinity where nothing is promised."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Served:
    """What a target says of itself at /readyz."""

    model: str
    budgets: Budgets | None


def new_tokens(record: Record) -> int:
    """The prompt less what an ideal cache holds; at least the last token is always computed."""
    return max(1, record.input_tokens - record.ideal_cached)


def computed_tokens(record: Record) -> int:
    """The prompt less what the server says that it held of it."""
    return max(1, record.input_tokens - (record.cached_tokens or 0))


def target_of(record: Record, budgets: Budgets) -> Target:
    """The class's line at this request's size, and the row's own target over it.

    Chatbot+ is judged by its first token and its pace, the other two by their end: a background-agent's reader is a
    program that waits for the whole turn."""
    line = budgets.get(record.request_class, BudgetLine())
    new, output = new_tokens(record), record.output_tokens
    is_chat = record.request_class == "chatbot+"
    ttft_s = _at(line.ttft_s, (line.ttft_s_per_new_token, new)) if is_chat else math.inf
    tpot_s = _at(line.tpot_s, (line.tpot_s_per_prompt_token, record.input_tokens)) if is_chat else math.inf
    per_new, per_output = (line.deadline_s_per_new_token, new), (line.deadline_s_per_output_token, output)
    deadline_s = _at(line.deadline_s, per_new, per_output)
    if record.slo is None:
        return Target(ttft_s, tpot_s, deadline_s)
    own = record.slo
    ends = [seconds for seconds in (own.e2e_s, own.deadline_s) if seconds is not None]
    return Target(
        ttft_s if own.ttft_ms is None else own.ttft_ms / 1e3,
        tpot_s if own.tpot_ms is None else own.tpot_ms / 1e3,
        min(ends, default=deadline_s),
    )


def _at(base: float | None, *slopes: tuple[float | None, int]) -> float:
    return math.inf if base is None else base + sum((slope or 0.0) * count for slope, count in slopes)


def parse_budgets(data: object) -> Budgets:
    """Budgets by class name from JSON. Raises ValueError naming what is wrong."""
    parsed = msgspec.convert(data, dict[ClassName, BudgetLine])
    if missing := [name for name in CLASSES if name not in parsed]:
        raise ValueError(f"no budget for {missing[0]}")
    return parsed


def ask(url: str) -> Served:
    """What the target serves and promises. Raises ValueError when it is not ready."""
    try:
        answer = httpx.get(url.rstrip("/") + "/readyz", timeout=READY_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise ValueError(f"{url} does not answer: {error}") from error
    if answer.status_code == 404:
        return Served(_first_model(url), None)  # some other server that speaks OpenAI's API
    if answer.status_code != 200:
        raise ValueError(f"{url} is not ready (status {answer.status_code})")
    try:
        state = answer.json()
    except ValueError:
        state = None
    if not isinstance(state, dict) or not state.get("budgets"):
        return Served(_first_model(url), None)
    return Served(str(state.get("model", "")) or _first_model(url), parse_budgets(state["budgets"]))


def _first_model(url: str) -> str:
    try:
        answer = httpx.get(url.rstrip("/") + "/v1/models", timeout=READY_TIMEOUT_S)
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{url} names no model at /v1/models; pass --model ({error!r})") from error


def to_plain(budgets: Budgets) -> dict[str, dict[str, float | None]]:
    """For the run's line."""
    plain: dict[str, dict[str, float | None]] = msgspec.to_builtins(budgets)
    return plain
