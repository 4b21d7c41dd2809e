"""A policy by name: built-in, installed or `module:attribute`; a wrong name says what there is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from policies.api import EnginePolicy, PolicySpec, RouterPolicy
from policies.baselines.routers import lmetric
from policies.builtin import BUILTINS, _weights
from policies.formula import Weights
from policies.plugins import ParamsError, PolicyError, load, load_engine


def mine(params: Mapping[str, Any]) -> RouterPolicy:
    """What a stranger's package would offer."""
    return lmetric(params)


def nonsense(params: Mapping[str, Any]) -> str:
    return str(params)


@pytest.mark.parametrize("ref", [*BUILTINS, "tests.policies.test_plugins:mine"])
def test_a_name_becomes_a_policy(ref: str) -> None:
    assert isinstance(load(PolicySpec(ref)), RouterPolicy)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (PolicySpec("headwy"), r"no policy is called 'headwy'; there are cache_aware, dynamo, headway, "),
        (PolicySpec("no.such.module:thing"), "cannot be imported"),
        (PolicySpec("policies.builtin:nothing"), "cannot be imported"),
        (PolicySpec("tests.policies.test_plugins:nonsense"), "made a str, not a RouterPolicy"),
        (PolicySpec("headway", {"promises": {"chatty": {}}}), "does not take these parameters: no class"),
        (PolicySpec("headway", {"weights": {"spred": 1}}), "does not take these parameters"),
        (PolicySpec("headway", {"promisses": {}}), "there is no 'promisses'; there are promises, tenants, weights"),
        (PolicySpec("dynamo", {"overlapp": 2.0}), "there is no 'overlapp'; there are promises, tenants, overlap"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec: PolicySpec, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        load(spec)


def test_an_installed_package_offers_policies_of_both_halves_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = {
        "headway.policies": EntryPoint("theirs", "tests.policies.test_plugins:mine", "headway.policies"),
        "headway.engine_policies": EntryPoint("theirs", "policies.baselines.engines:niyama", "headway.engine_policies"),
    }
    monkeypatch.setattr("policies.plugins.entry_points", lambda group: [offered[group]])
    assert isinstance(load(PolicySpec("theirs")), RouterPolicy)
    assert isinstance(load_engine("theirs"), EnginePolicy)
    with pytest.raises(PolicyError, match=r"no engine policy is called 'other'; there are headway, .*theirs"):
        load_engine("other")


def test_an_installed_policy_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = EntryPoint("theirs", "no.such.module:thing", "headway.policies")
    monkeypatch.setattr("policies.plugins.entry_points", lambda **_: [gone])
    with pytest.raises(PolicyError, match="policy 'theirs' cannot be imported"):
        load(PolicySpec("theirs"))


def test_a_spec_survives_json_and_its_digest_names_it() -> None:
    spec = PolicySpec("headway", {"promises": {"chatbot+": {"tpot_s": 0.05}}})
    assert PolicySpec.from_json(spec.to_json()) == spec
    assert PolicySpec.from_json(spec.to_json()).digest == spec.digest
    assert spec.digest != PolicySpec("headway").digest


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"wieghts": {}}, "there is no 'wieghts'; there are promises, tenants, weights"),
        ({"weights": [1]}, "weights must be a table"),
        ({"weights": {"raise": 1}}, "there is no 'raise'; there are spread,"),
        ({"weights": {"near": "0.1"}}, "near must be a number, got '0.1'"),
        ({"weights": {"spread": [0.1, 0.2]}}, "spread must be 3 numbers, one for each class"),
        ({"promises": ["chat"]}, "promises must be a table"),
        ({"promises": {"chat": 1}}, "chat must be a table"),
        ({"promises": {"chat": {"tpot_s": True}}}, "tpot_s must be a number, got True"),
        ({"tenants": {"acme": 3}}, "acme must be a table"),
    ],
)
def test_parameters_that_cannot_be_used_are_named(params: dict[str, Any], why: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(why)):
        load(PolicySpec("headway", params))


def test_factors_of_placement_are_parameters() -> None:
    given = {"spread": [0.3, 0, 0.0], "near": 0.1}

    assert _weights(given) == Weights(spread=(0.3, 0.0, 0.0), near=0.1)
