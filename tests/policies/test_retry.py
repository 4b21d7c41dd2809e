"""The retry budget: one in ten of all placements, and a store for the death of a full worker."""

from __future__ import annotations

from policies.retry import RetryBudget


def test_a_fleet_that_fails_everything_is_asked_a_tenth_more() -> None:
    budget = RetryBudget(ratio=0.1, burst=10)
    retries = 0
    for _ in range(1_000):
        budget.earn()
        retries += budget.spend()
    assert 100 <= retries <= 110


def test_the_store_never_grows_beyond_its_burst() -> None:
    budget = RetryBudget(ratio=0.1, burst=3)
    for _ in range(1_000):
        budget.earn()
    assert [budget.spend() for _ in range(5)] == [True, True, True, False, False]
