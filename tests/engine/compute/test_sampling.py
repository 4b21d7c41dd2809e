"""Sampling: the asked distribution, exactly the asked candidates, and randomness keyed by seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.compute.sampling import CANDIDATES, choose, uniforms
from engine.wire import Sampling


def draw(logits: Tensor, sampling: list[Sampling], positions: list[int] | None = None) -> list[int]:
    places = np.array(positions or [0] * len(sampling), np.int32)
    ids, is_bad, *_ = choose(logits.clone(), sampling, places, eos_ids=[0])
    assert not is_bad.any()
    return [int(token) for token in ids]


def shares(logits: list[float], draws: int = 20_000, **knobs: float) -> list[float]:
    """How often each token comes, over as many seeds."""
    sampling = [Sampling(seed=seed, **knobs) for seed in range(draws)]  # type: ignore[arg-type]
    ids = draw(torch.tensor([logits]).expand(draws, -1), sampling)
    return (np.bincount(ids, minlength=len(logits)) / draws).tolist()


LOGITS = np.log([0.5, 0.25, 0.15, 0.07, 0.03]).tolist()


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"temperature": 0.5}, (np.array([0.5, 0.25, 0.15, 0.07, 0.03]) ** 2 / 0.3433).tolist()),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.0}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.29}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0, 0]),  # 0.75 / 0.9 is over 0.8 of what top-k leaves
        ({"top_p": 0.9, "min_p": 0.29}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_asked(knobs: dict[str, float], expected: list[float]) -> None:
    got = shares(LOGITS, **knobs)

    assert got == pytest.approx(expected, abs=0.015)  # 4 standard deviations at 20,000 draws
    assert [share > 0 for share in got] == [share > 0 for share in expected]


@given(
    width=st.sampled_from([10, CANDIDATES[0] + 1, CANDIDATES[1] + 900]),
    top_p=st.floats(0.01, 0.999),
    seed=st.integers(),
)
@settings(max_examples=60, deadline=None)
def test_a_nucleus_wider_than_the_first_candidates_is_still_exact(width: int, top_p: float, seed: int) -> None:
    """A flat distribution has its nucleus far beyond the candidates; the draw equals one over the whole sorted row."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    logits = torch.randn(1, width, generator=generator) * 0.1
    weights, names = logits[0].double().sub(logits.max()).float().double().exp().sort(descending=True)
    before = weights.cumsum(0) - weights
    kept = weights.where(before < top_p * weights.sum(), 0.0)
    point = uniforms([(seed, 3)])[0] * kept.sum()
    expected = int(names[int((kept.cumsum(0) <= point).sum())])

    assert draw(logits, [Sampling(top_p=top_p, seed=seed)], [3]) == [expected]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1), position=st.integers(0, 2**31 - 1), others=st.integers(0, 6))
def test_seed_and_position_fix_the_choice_whatever_the_batch(seed: int, position: int, others: int) -> None:
    rows = torch.randn(others + 1, 97, generator=torch.Generator().manual_seed(others))
    mine = Sampling(seed=seed, top_p=0.9)
    neighbours = [Sampling(seed=9, temperature=number % 3 / 2, top_k=number) for number in range(others)]

    together = draw(rows, [*neighbours, mine], [*range(others), position])

    assert together[-1:] == draw(rows[-1:], [mine], [position])


def test_positions_and_seeds_give_different_numbers() -> None:
    points = uniforms([(seed, position) for seed in range(100) for position in range(100)])

    assert len(set(points.tolist())) == 10_000
    assert points.mean() == pytest.approx(0.5, abs=0.012)
    assert 0 <= points.min() < points.max() < 1


def test_greedy_takes_the_best_and_needs_no_number() -> None:
    assert draw(torch.tensor([[0.0, 3.0, 1.0]] * 2), [Sampling(temperature=0.0), Sampling(temperature=1e-9)]) == [1, 1]


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0, 1e6),
    top_p=st.floats(-1, 2),
    min_p=st.floats(-1, 5),
    top_k=st.integers(-5, 500),
    seed=st.integers(),
)
def test_no_setting_gives_an_id_outside_the_vocabulary(
    temperature: float, top_p: float, min_p: float, top_k: int, seed: int
) -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)) * 30
    sampling = Sampling(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k, seed=seed)

    assert all(0 <= token < 300 for token in draw(logits, [sampling] * 3, [0, 1, 2]))


def test_a_row_that_is_not_finite_is_marked_and_the_others_are_not() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, torch.nan, 0.0], [torch.inf, 0.0, 0.0], [0.0, 0.0, 9.0]])

    ids, is_bad, *_ = choose(logits, [Sampling(seed=1, temperature=0.01)] * 4, np.zeros(4, np.int32), eos_ids=[])

    assert is_bad.tolist() == [False, True, True, False]
    assert (ids[0], ids[3]) == (1, 2)


def test_an_end_is_out_of_reach_before_min_tokens() -> None:
    wanted = Sampling(temperature=0.0, min_tokens=2, stop_ids=(2,))
    logits = torch.tensor([[9.0, 1.0, 8.0]] * 2)  # 0 ends the text, 2 was asked to stop it

    assert draw(logits, [wanted, wanted], [1, 2]) == [1, 0]
