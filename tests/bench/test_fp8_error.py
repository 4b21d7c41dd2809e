"""The oracle of fp8: without rounding it is the model, and each rounding is as coarse as its format and no coarser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.fp8_error import VARIANTS, Variant, compared, exact, fp8, fp8_kv, logits, rounded
from engine.loading import weights
from tests.engine import tiny

IDS = list(range(3, 40))


@pytest.fixture
def wanted(tmp_path: Path) -> torch.Tensor:
    return tiny.logits(tiny.save("llama", tmp_path / "model"), IDS)


def test_without_rounding_it_is_the_model(tmp_path: Path, wanted: torch.Tensor) -> None:
    decoder = weights.load(tmp_path / "model", torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        got = logits(rounded(decoder, Variant("none")), Variant("none"), torch.tensor(IDS))

    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_each_variant_errs_and_the_coarser_ones_more(tmp_path: Path, wanted: torch.Tensor) -> None:
    decoder = weights.load(tmp_path / "model", torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        errors = {
            variant.name: compared(
                variant.name, wanted, logits(rounded(decoder, variant), variant, torch.tensor(IDS))
            ).relative_error
            for variant in VARIANTS
        }

    half = errors["bf16 weights, activations, KV"]
    assert 0 < half < min(error for name, error in errors.items() if name.startswith("fp8"))
    assert max(errors.values()) < 0.5


@pytest.mark.parametrize("rounding", [fp8, fp8_kv])
def test_three_bits_of_mantissa_err_by_a_sixteenth_at_most(rounding: object) -> None:
    assert callable(rounding)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 64)[:, None]

    got = rounding(x)

    large = x.abs() > x.abs().amax(-1, keepdim=True) / 2**10  # smaller numbers are subnormal beside their row's largest
    assert ((got - x).abs() / x.abs())[large].max() <= 1 / 16 + 1e-3
    assert ((got - x).abs() / x.abs())[large].max() > 1 / 32
    assert (rounding(torch.zeros(2, 8)) == 0).all()
    assert torch.isfinite(got).all()


def test_a_comparison_says_how_often_and_how_far_the_first_token_differs() -> None:
    wanted = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.5, 0.0]])
    row = compared("x", wanted, torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.5, 0.0]]))

    assert (row.same_first, row.widest_gap) == (0.5, 0.5)
    assert row.divergence > 0
    same = compared("x", wanted, exact(wanted) + 7.0)  # a constant changes no probability
    assert same.relative_error < 1e-6
    assert abs(same.divergence) < 1e-6
