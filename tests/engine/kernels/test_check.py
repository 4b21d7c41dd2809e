"""The self-check passes kernels that are right and names one that is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kernels import check
from engine.kernels.paged import Shape

SHAPE = Shape(6, 2, 32, 2, 16, 1e-5, has_qk_norm=True)


def test_kernels_that_agree_with_their_oracles_pass(device: torch.device, dtype: torch.dtype) -> None:
    assert check.failures(device, dtype, SHAPE, has_fp8=True) == {}


def test_kernels_over_fp8_kv_pass_and_one_that_forgets_scales_does_not(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    over_fp8 = replace(SHAPE, is_kv_fp8=True)
    assert check.failures(device, dtype, over_fp8) == {}

    monkeypatch.setattr(check.ref, "halves", lambda words: words.new_ones(*words.shape, 2, dtype=torch.float16))
    assert not check._attention(device, dtype, over_fp8, [20, 7], [1, 1]) < check.ERROR_MAX


def test_a_kernel_that_is_wrong_or_does_not_run_is_named(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(check, "linear", lambda *tensors, **_: tensors[2].zero_())
    monkeypatch.setattr(check.paged, "run_prefill", broken)

    def refused(*_: object) -> None:
        raise RuntimeError("row-wise scaling needs a newer card")

    monkeypatch.setattr(check.fp8, "product", refused)

    found = check.failures(device, dtype, SHAPE, has_fp8=True)

    assert found["products"] == "relative error 1"
    assert "no such instruction" in found["prefill"]
    assert "newer card" in found[check.FP8_LIBRARY]
    assert set(found) == {"products", "prefill", check.FP8_OWN, check.FP8_LIBRARY}
