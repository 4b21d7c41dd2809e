"""The conformance kit: Headway's own policies keep its laws, and a policy that breaks one is named by it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from policies import conformance
from policies.api import FleetView, Forecast, Job, RouterPolicy
from policies.builtin import BUILTINS, headway


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_built_in_policies_keep_every_law(name: str) -> None:
    conformance.check(lambda: BUILTINS[name]({}), examples=25)


def counting() -> RouterPolicy:
    """Places by how often it was asked."""
    ours, asked = headway({}), itertools.count()

    def place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        best = ours.place(job, fleet, now)
        return [best[0]._replace(cost_s=float(next(asked)))] if best else best

    return replace(ours, place=place)


def meddling() -> RouterPolicy:
    """Changes the fleet that it was shown."""
    ours = headway({})

    def place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        fleet.residual = fleet.residual * 1.01
        return ours.place(job, fleet, now)

    return replace(ours, place=place)


def ghostly() -> RouterPolicy:
    """Places on a worker that was never there."""
    ours = headway({})

    def place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        best = ours.place(job, fleet, now)
        return [best[0]._replace(worker=0)] if best else best  # type: ignore[arg-type]

    return replace(ours, place=place)


def contrary() -> RouterPolicy:
    """Takes its time when there is none left."""
    ours = headway({})

    def place(job: Job, fleet: FleetView, now: float) -> Sequence[Forecast]:
        best = ours.place(job, fleet, now)
        return [best[0]._replace(ttft_s=100.0 - job.first_left_s(now))] if best else best

    return replace(ours, place=place)


@pytest.mark.parametrize(
    ("law", "make", "said"),
    [
        (conformance.purity, counting, "place asked twice"),
        (conformance.purity, meddling, "purity: place"),
        (conformance.conservation, ghostly, "0"),  # a KeyError of the dispatcher: nobody is there
        (conformance.budget, contrary, "budget"),
    ],
)
def test_who_breaks_a_law_is_told_which(law: Any, make: conformance.Make, said: str) -> None:
    with pytest.raises((AssertionError, KeyError), match=said):
        law(make, 100)
