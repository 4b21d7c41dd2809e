"""Promises: what each class gets, and that no promise asks more of the hardware than it can."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.api import Output, Promise, Prompt
from policies.budget import DEFAULTS, HEADROOM, Promises, from_params
from policies.chain import NO_CHAIN
from policies.costs import StepModel
from policies.request import RequestClass, Tenant
from tests.policies.scenes import STEP_MODEL, request

SLOW = StepModel(10e-3, 1e-3, 3e-3, 1e-6, 2e-7, 2e-4, version=1)  # one CPU thread, a 135M model


def promise(
    cls: RequestClass, new: int = 1_000, tokens: int = 1_000, profile: StepModel = STEP_MODEL, **facts: object
) -> Promise:
    return Promises()(request(**facts), cls, Prompt(tokens, new, NO_CHAIN), Output(200.0, 200.0, 300.0), profile)


def test_chatbot_gets_a_second_and_half_again_its_unloaded_prefill() -> None:
    made = promise(RequestClass.CHATBOT, new=1_000)
    assert made.budget.ttft_s == pytest.approx(1.0 + 1.5 * STEP_MODEL.unloaded_ttft_s(1_000))
    assert made.budget.tpot_s == 0.04
    assert math.isinf(made.budget.deadline_s)
    assert made.patience_s == 30.0


def test_background_agents_are_promised_a_turn_and_batch_work_a_deadline() -> None:
    agent, batch = promise(RequestClass.BACKGROUND_AGENT), promise(RequestClass.DATA_PROCESSOR)
    assert (agent.budget.ttft_s, agent.budget.tpot_s, agent.patience_s) == (15.0, 0.15, 600.0)
    assert 15.0 < agent.budget.deadline_s < 30.0
    assert math.isinf(batch.budget.ttft_s)
    assert (batch.budget.deadline_s, batch.patience_s) == (900.0, 900.0)


def test_only_new_tokens_loosen_the_promise() -> None:
    """A resent history of 100k tokens costs nothing on an ideal cache, so it earns no time."""
    resent, cold = promise(RequestClass.CHATBOT, 500, 100_000), promise(RequestClass.CHATBOT, 100_000, 100_000)
    assert resent.budget.ttft_s < 1.3
    assert cold.budget.ttft_s > 10.0


def test_a_declared_timeout_shortens_patience_and_never_lengthens_it() -> None:
    assert promise(RequestClass.CHATBOT, declared_timeout_s=10.0).patience_s == pytest.approx(9.5)
    assert promise(RequestClass.CHATBOT, declared_timeout_s=600.0).patience_s == 30.0
    assert promise(RequestClass.BACKGROUND_AGENT, declared_timeout_s=600.0).patience_s == pytest.approx(570.0)


def test_a_completion_window_is_deadline_and_patience() -> None:
    made = promise(RequestClass.BACKGROUND_AGENT, completion_window="2h")
    assert (made.budget.deadline_s, made.patience_s) == (7200.0, 7200.0)


@given(
    new=st.integers(1, 200_000),
    cached=st.integers(0, 200_000),
    cls=st.sampled_from(RequestClass),
    profile=st.sampled_from([STEP_MODEL, SLOW]),
)
def test_no_promise_is_tighter_than_an_idle_worker_with_half_again_to_spare(
    new: int, cached: int, cls: RequestClass, profile: StepModel
) -> None:
    """Law: whatever the table says, the budget holds on an idle worker."""
    tight = Promises((replace(DEFAULTS[0], ttft_s=0.0, ttft_per_prefill=0.0, tpot_s=0.0), *DEFAULTS[1:]))
    output = Output(100.0, 100.0, 200.0)
    made = tight(request(), cls, Prompt(new + cached, new, NO_CHAIN), output, profile).budget
    assert made.ttft_s >= HEADROOM * profile.unloaded_ttft_s(new, cached)
    assert made.tpot_s >= HEADROOM * profile.decode_s(1, new + cached)
    assert made.deadline_s >= made.ttft_s or cls is not RequestClass.CHATBOT


@given(less=st.integers(1, 100_000), more=st.integers(1, 100_000))
def test_more_new_tokens_never_get_less_time(less: int, more: int) -> None:
    """Law: the TTFT promise grows with the new tokens."""
    fewer, rather = sorted((less, more))
    assert promise(RequestClass.CHATBOT, fewer, 200_000).budget.ttft_s <= (
        promise(RequestClass.CHATBOT, rather, 200_000).budget.ttft_s
    )


def test_a_tenant_may_have_its_own_row() -> None:
    made = from_params({"promises": {"chat": {"tpot_s": 0.06}}, "tenants": {"vip": {"chatbot+": {"ttft_s": 0.5}}}})
    assert made.rows[0].tpot_s == 0.06
    vip = made(request(tenant=Tenant(id="vip")), RequestClass.CHATBOT, Prompt(1, 1, NO_CHAIN), Output(1, 1, 1), None)
    assert (vip.budget.ttft_s, vip.budget.tpot_s) == (0.5, 0.06)


@pytest.mark.parametrize(
    ("promises", "complaint"),
    [
        ({"chatty": {}}, "no class is called 'chatty'"),
        ({"chat": {"ttft": 1.0}}, "a promise has no 'ttft'"),
        ({"chat": {"ttft_s": -1.0}}, "zero or more"),
        ({"chat": {"ttft_s": math.nan}}, "ttft_s must be a number, got nan"),
    ],
)
def test_a_typo_in_the_promises_is_named(promises: dict[str, dict[str, float]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        from_params({"promises": promises})
