"""Readiness: when the router says yes, and that the budgets that it prints are those that it keeps."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from policies.costs import StepModel
from policies.request import Tenant
from router.control.reducer import load_policy
from router.listener.readiness import Readiness
from router.settings.config import Classes, Config, Promise
from router.workers.fleet import Fleet
from tests.router.frames import hello
from tests.router.workers.test_fleet import Quiet, linked

# A worker that computes 1,000 prompt tokens a second and takes 10 ms a step.
PROFILE = StepModel(0.010, 0.001, 0.0, 0.0, 0.0, 0.0, version=1)


def readiness(config: Config, *, is_up: bool = True, profile: StepModel = PROFILE) -> Readiness:
    fleet = Fleet([("w0", "/a")], Quiet(), "{}")
    if is_up:
        linked(fleet, 0, hello())
    policy = load_policy(config, deque(), is_timed=False)
    return Readiness(fleet, policy, lambda model: profile if model == "tiny" else None, Tenant())


def test_a_router_with_a_proved_worker_is_ready_until_it_drains() -> None:
    ready = readiness(Config())
    assert ready.is_ready()

    ready.is_draining = True

    assert not ready.is_ready()
    assert ready.state()[0] is False


def test_a_router_without_workers_promises_nothing() -> None:
    assert readiness(Config(), is_up=False).state() == (False, {"workers": 0, "model": "", "budgets": {}})


def test_budgets_are_what_the_policy_promises_on_this_hardware() -> None:
    config = Config(classes=Classes(chatbot=Promise(ttft_s=2.0, ttft_per_prefill=3.0, tpot_s=0.5)))

    is_ready, state = readiness(config).state()

    assert (is_ready, state["workers"], state["model"]) == (True, 1, "tiny")
    budgets = state["budgets"]
    assert isinstance(budgets, dict)
    chat = budgets["chatbot+"]
    assert (chat["tpot_s"], chat["tpot_s_per_prompt_token"]) == (0.5, 0.0)
    assert chat["deadline_s"] is None
    # At 1,025 tokens the line is the promise itself: 2 s and three times 1.025 s.
    assert math.isclose(chat["ttft_s"] + 1024 * chat["ttft_s_per_new_token"], 2.0 + 3 * 1.025)
    assert budgets["data-processor"]["ttft_s"] is None
    assert budgets["data-processor"]["deadline_s"] == 900.0


def test_a_pace_that_the_hardware_sets_grows_with_the_prompt() -> None:
    slow = replace(PROFILE, floor_s=0.040, decode_context_s=10e-6)
    budgets = readiness(Config(), profile=slow).state()[1]["budgets"]
    assert isinstance(budgets, dict)
    assert math.isclose(budgets["chatbot+"]["tpot_s"], 2.5 * (0.040 + 10e-6))
    assert math.isclose(budgets["chatbot+"]["tpot_s_per_prompt_token"], 2.5 * 10e-6)
