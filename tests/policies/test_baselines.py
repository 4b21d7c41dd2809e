"""Published rules do what their papers and sources say, on scenes small enough to check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policies import plugins
from policies.baselines.engines import niyama, static
from policies.builtin import BUILTINS
from policies.costs import StepModel
from policies.plugins import PolicyError
from policies.request import RequestClass, WorkerId
from policies.step_plan import BatchView
from policies.worker import Fleet
from tests.policies.scenes import LIMITS, chain, job, load, report, up

MODEL = StepModel(0.0, 1e-4, 0.0, 0.0, 0.0, 0.0, version=1)  # 10 tokens a millisecond
CHAT, AGENT, BATCH = (int(cls) for cls in RequestClass)


def view(*rows: tuple[int, bool, int, float, float]) -> BatchView:
    """Rows as (class, decodes, pending tokens, arrived, due)."""
    classes, decodes, pending, arrived, due = zip(*rows, strict=True)
    count = len(rows)
    return BatchView(
        request_class=np.array(classes),
        due=np.array(due),
        pace_s=np.full(count, 0.04),
        context=np.zeros(count, dtype=np.int64),
        pending=np.array(pending),
        arrived=np.array(arrived),
        deadline=np.full(count, math.inf),
        is_decoding=np.array(decodes),
        is_blocked=np.zeros(count, dtype=bool),
    )


def test_static_chunks_go_in_order_of_arrival_after_all_decodes() -> None:
    batch = view((BATCH, True, 1, 0.0, math.inf), (CHAT, False, 600, 2.0, 9.0), (BATCH, False, 300, 1.0, math.inf))
    chosen = static(512).plan(batch, MODEL, 3.0)
    assert chosen.decodes.tolist() == [0]
    assert [(chunk.row, chunk.tokens) for chunk in chosen.chunks] == [(2, 300), (1, 211)]


def test_priority_puts_the_urgent_class_first() -> None:
    batch = view((CHAT, False, 600, 2.0, 9.0), (BATCH, False, 300, 1.0, math.inf))
    chosen = static(512, is_priority=True).plan(batch, MODEL, 3.0)
    assert [(chunk.row, chunk.tokens) for chunk in chosen.chunks] == [(0, 512)]


def test_niyama_fills_the_slack_of_the_tightest_decode_by_deadline() -> None:
    batch = view((CHAT, True, 1, 0.0, 3.02), (CHAT, False, 150, 2.0, 5.0), (CHAT, False, 500, 1.0, 9.0))
    chosen = niyama().plan(batch, MODEL, 3.0)
    assert [(chunk.row, chunk.tokens) for chunk in chosen.chunks] == [(1, 150), (2, 49)]  # 20 ms are 200 rows


def test_niyama_still_moves_when_every_line_is_lost() -> None:
    batch = view((CHAT, True, 1, 0.0, 2.0), (CHAT, False, 150, 2.0, 2.5))
    assert [chunk.tokens for chunk in niyama().plan(batch, MODEL, 3.0).chunks] == [128]


def test_an_engine_policy_is_found_by_name_or_by_module() -> None:
    assert plugins.load_engine("policies.baselines.engines:niyama") == niyama()
    with pytest.raises(PolicyError, match="static-512"):
        plugins.load_engine("nothing")
    with pytest.raises(PolicyError, match="not an EnginePolicy"):
        plugins.load_engine("builtins:dict")


def chosen(policy: str, fleet: Fleet, keys: bytes, **params: float) -> int:
    forecasts = BUILTINS[policy](params).place(job(keys=keys), fleet, 0.0)
    return int(forecasts[0].worker)


def fleet() -> Fleet:
    """w0 holds 12 of a prompt's 15 blocks and serves two more requests than w1; w2 serves one request."""
    made = Fleet(LIMITS)
    for worker in range(3):
        made.up(up(worker), 0.0)
    made.stored(WorkerId(0), [chain("p", 12)[at : at + 16] for at in range(0, 12 * 16, 16)])
    for worker, (running, context) in enumerate(((2, 400), (0, 0), (1, 900))):
        made.report(WorkerId(worker), load(running=running, decode_context=context), None, 0.0)
        made.publish(0.0)
    return made


def test_rules_by_load_and_rules_by_prefix_disagree() -> None:
    held, cold = chain("p", 15), chain("q", 15)
    assert chosen("least_loaded", fleet(), held) == 1
    assert chosen("prefix", fleet(), held) == 0
    assert chosen("prefix", fleet(), cold) == 1
    assert chosen("lmetric", fleet(), held) == 0  # 232 tokens x 3 against 1,000 x 1


def test_cache_aware_follows_a_long_prefix_unless_the_fleet_is_out_of_balance() -> None:
    held = chain("p", 15)
    assert chosen("cache_aware", fleet(), held) == 0
    assert chosen("cache_aware", fleet(), held, cache_threshold=0.9) == 1  # 77 % is not enough
    assert chosen("cache_aware", fleet(), held, balance_abs=1, balance_rel=1.0) == 1  # two apart is too much


def test_dynamo_adds_prefill_to_do_and_tokens_that_decode() -> None:
    policy = BUILTINS["dynamo"]({})
    for worker, context in enumerate((400, 0, 900)):
        policy.learn(report(worker, load=load(decode_context=context)))
    (best,) = policy.place(job(keys=chain("p", 15)), fleet(), 0.0)
    assert int(best.worker) == 0  # 232 + 400 against 1,000 and 1,900
    policy.learn(report(0, load=load(decode_context=5_000)))
    (best,) = policy.place(job(keys=chain("p", 15)), fleet(), 0.0)
    assert int(best.worker) == 1
