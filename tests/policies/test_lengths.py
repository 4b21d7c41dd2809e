"""Output lengths: a prior, then what was seen, forgetting slowly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.lengths import HALF_LIFE_S, Lengths
from policies.request import RequestClass, Tenant
from tests.policies.scenes import request

CHATBOT, BACKGROUND, _ = RequestClass


def learned(tokens: list[int], leaves_max: int = 16) -> Lengths:
    lengths = Lengths(leaves_max)
    for count in tokens:
        lengths.learn(request(), CHATBOT, count, 0.0)
    return lengths


def test_before_any_answer_the_prior_speaks() -> None:
    expected = Lengths(16).expect(request(), CHATBOT)
    assert 250 < expected.q50 < 450
    assert expected.q50 < expected.q80 < 800


def test_a_hundred_answers_outweigh_the_prior() -> None:
    expected = learned([20] * 100).expect(request(), CHATBOT)
    assert 15 < expected.q50 < 27
    assert expected.q80 < 60


def test_a_new_tenant_begins_with_what_its_class_has_shown() -> None:
    expected = learned([20] * 100).expect(request(tenant=Tenant(id="new")), CHATBOT)
    assert expected.q50 < 60
    assert learned([20] * 100).expect(request(), BACKGROUND) == Lengths(16).expect(request(), BACKGROUND)


def test_no_answer_is_longer_than_was_asked_for() -> None:
    expected = Lengths(16).expect(request(max_output=7), CHATBOT)
    assert (expected.mean, expected.q50, expected.q80) == (7.0, 7.0, 7.0)


def test_old_answers_fade() -> None:
    lengths = learned([20] * 100)
    for number in range(60):
        lengths.learn(request(), CHATBOT, 2_000, 6 * HALF_LIFE_S + number)
    assert lengths.expect(request(), CHATBOT).q50 > 1_000


@given(st.lists(st.integers(0, 200_000), max_size=60))
def test_quantiles_are_ordered_and_finite(tokens: list[int]) -> None:
    """Law: whatever was seen, 1 <= q50 <= q80, and the mean is a number."""
    expected = learned(tokens).expect(request(), CHATBOT)
    assert 1.0 <= expected.q50 <= expected.q80 <= 131_072
    assert 1.0 <= expected.mean <= 131_072


def test_leaves_are_bounded() -> None:
    lengths = Lengths(leaves_max=4)
    for number in range(50):
        asked = request(tenant=Tenant(id=f"t{number}"))
        lengths.expect(asked, CHATBOT)
        lengths.learn(asked, CHATBOT, 10, 0.0)
    assert len(lengths._leaves) == 4
    assert len(lengths._cache) <= 4
