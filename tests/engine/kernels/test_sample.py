"""Device sampling chooses the oracle's token under every mix of limits, by gathering or by searching the whole row."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import ref
from engine.kernels.sample import Knobs, Sampler

LIMITS = [  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 20, 1.0, 0.0), (1.0, 0, 0.5, 0.0),
    (0.6, 20, 0.95, 0.0), (1.0, 0, 1.0, 0.05), (1.0, 2000, 0.9, 0.0), (0.8, 1, 1.0, 0.0), (0.3, 30, 0.99, 0.01),
]  # fmt: skip


def knobs(limits: list[tuple[float, int, float, float]], uniforms: torch.Tensor) -> Knobs:
    columns = [torch.tensor(column, device=uniforms.device) for column in zip(*limits, strict=True)]
    return Knobs(columns[0].float(), columns[1].int(), columns[2].float(), columns[3].float(), uniforms.float())


@pytest.mark.parametrize("spread", [3.0, 0.01], ids=["peaked", "flat"])
@pytest.mark.parametrize("vocab", [9001])
def test_each_row_gets_the_token_of_the_oracle(vocab: int, spread: float, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    logits = spread * torch.randn(len(LIMITS), vocab, generator=generator, device=device)
    uniforms = torch.rand(len(LIMITS), generator=generator, device=device)
    sampler = Sampler.make(len(LIMITS), vocab, device)

    ids, is_bad = sampler.choose(logits, knobs(LIMITS, uniforms))

    wanted = [ref.sample(logits[row], *limits, float(uniforms[row])) for row, limits in enumerate(LIMITS)]
    assert ids.tolist() == wanted
    assert not is_bad.any()


def test_the_uniform_ends_are_tokens_that_may_be_drawn(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9, -1.0], [0.0, 5.0, 4.9, -1.0]], device=device)
    limits = [(1.0, 2, 1.0, 0.0)] * 2

    ids, _ = Sampler.make(2, 4, device).choose(logits, knobs(limits, torch.tensor([0.0, 1.0], device=device)))

    assert ids.tolist() == [1, 2]


def test_a_row_that_is_not_finite_is_flagged_alone(device: torch.device) -> None:
    logits = torch.randn(4, 5000, device=device)
    logits[1, 4999] = torch.nan
    logits[2, 7] = torch.inf
    logits[3, 1:] = -torch.inf  # a grammar may allow a single token

    ids, is_bad = Sampler.make(4, 5000, device).choose(
        logits, knobs([(1.0, 5, 0.9, 0.0)] * 4, torch.full((4,), 0.5, device=device))
    )

    assert is_bad.tolist() == [0, 1, 1, 0]
    assert ids.tolist()[1:] == [0, 0, 0]
