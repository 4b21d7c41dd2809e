"""Weights of 8 bits: stored to the nearest, multiplied as their oracle says by few rows and by many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.kernels import fp8, ref, scaled
from engine.kernels.linear import PLAIN, Epilogue, Scratch, linear
from engine.kernels.tuned import Choice
from tests.engine.kernels.attention_case import error

if TYPE_CHECKING:
    from engine.kernels.tuned import Role

GEMV = Choice("gemv", block_n=4, block_k=256, head_k=512, warps=1)
DOT = Choice("dot", block_n=32, block_k=64)
STRAIGHT = Choice("dot", block_n=32, block_k=64, is_swapped=False, splits=3)
SPLIT = Choice("dot", block_n=64, block_k=64, splits=3, rows_max=16)
TMA = Choice("tma", block_n=32, block_k=64, warps=4)
EPILOGUES: dict[Role, Epilogue] = {"residual": PLAIN, "norm": Epilogue(1e-5), "gated": Epilogue(1e-5, is_gated=True)}
HALF_STEP = 2.0**-4  # of e4m3: the most by which a number that is not tiny moves, relative to it


def test_a_row_is_stored_to_the_nearest_and_its_largest_number_exactly() -> None:
    weight = torch.randn(8, 64) * torch.logspace(-6, 6, 8)[:, None]

    found = scaled.widened(scaled.rounded(weight))

    top = weight.abs().amax(-1, keepdim=True)
    assert ((found - weight).abs() <= weight.abs() * HALF_STEP + top * 2.0**-18).all()
    torch.testing.assert_close(found.abs().amax(-1, keepdim=True), top)


def test_a_row_of_zeros_has_scale_one_and_stays_zeros() -> None:
    found = scaled.rounded(torch.cat([torch.zeros(1, 16), torch.full((1, 16), 1e-30)]))

    assert found.scales.tolist() == [1.0, 1.0]
    assert not found.values.float().any()


def test_a_weight_whose_sides_no_8_bit_product_takes_stays_wide() -> None:
    assert isinstance(scaled.stored(torch.randn(32, 24), torch.float16, is_fp8=True), torch.Tensor)
    assert isinstance(scaled.stored(torch.randn(32, 48), torch.float16, is_fp8=True), scaled.Scaled)
    assert isinstance(scaled.stored(torch.randn(32, 48), torch.float16, is_fp8=False), torch.Tensor)


@pytest.mark.parametrize("role", EPILOGUES)
@pytest.mark.parametrize(
    ("choice", "rows"),
    [(GEMV, 1), (GEMV, 2), (DOT, 3), (DOT, 40), (STRAIGHT, 7), (SPLIT, 33), (TMA, 17)],
    ids=["gemv1", "gemv2", "dot3", "dot40", "straight7", "split33", "tma17"],
)
def test_few_rows_multiply_the_rounded_weight_exactly(
    choice: Choice, rows: int, role: Role, dtype: torch.dtype, device: torch.device
) -> None:
    if choice.splits > 1 and role != "residual":
        pytest.skip("a norm needs whole rows of x in one program: choose() never splits it")
    columns, outputs, epilogue = 768, 128, EPILOGUES[role]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, columns, generator=generator, device=device).to(dtype)
    wide = torch.randn(outputs * (1 + epilogue.is_gated), columns, generator=generator, device=device)
    weight = scaled.rounded(wide * torch.logspace(-3, 0, len(wide), device=device)[:, None])
    residual = torch.randn(rows, outputs, generator=generator, device=device).to(dtype) if role == "residual" else None
    bias = torch.randn(outputs, generator=generator, device=device).to(dtype) if role == "norm" else None
    out = torch.full((rows, outputs), torch.nan, device=device, dtype=dtype)
    scratch = Scratch.make(device, floats=1 << 16, tiles=64)

    for _ in range(2):  # twice: the counters of the first launch must be zero again for the second
        linear(x, weight, out.fill_(torch.nan), choice, scratch, epilogue, bias, residual)

    assert error(out, ref.linear(x, weight, epilogue.norm_eps, epilogue.is_gated, bias, residual)) < 4e-3
    assert not scratch.arrivals.any()


@pytest.mark.parametrize("width", [48, 300, 4096])
@pytest.mark.parametrize("what", ["rows", "norm", "gated"])
def test_rows_are_rounded_as_the_oracle_rounds_them(
    what: str, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(5, width * (1 + (what == "gated")), device=device).to(dtype)
    x[3] = 0.0
    rounding = fp8.Rounding.make(7, 4096, device)
    rounding.values.view(torch.uint8).fill_(0x7F)  # NaN
    rounding.scales.fill_(torch.nan)

    found = rounding.gated(x) if what == "gated" else rounding.rows(x, 1e-5 if what == "norm" else None)

    plain = {"rows": x.float(), "norm": ref.rms_norm(x, 1e-5), "gated": ref.gated(x)}[what]
    wanted = scaled.rounded(plain)
    torch.testing.assert_close(found.scales, wanted.scales, rtol=1e-5, atol=0)
    assert float(found.scales[3]) == 1.0
    assert error(scaled.widened(found), scaled.widened(wanted)) < 4e-3
    assert torch.isnan(rounding.scales[5:]).all()


@pytest.mark.parametrize("role", EPILOGUES)
def test_many_rows_are_rounded_and_multiplied_by_the_library(role: Role, device: torch.device) -> None:
    dtype, (columns, outputs), eps = torch.bfloat16, (96, 64), 1e-5
    x = torch.randn(130, columns, device=device).to(dtype)
    weight = scaled.rounded(torch.randn(outputs * (1 + (role == "gated")), columns, device=device))
    residual = torch.randn(130, outputs, device=device).to(dtype) if role == "residual" else None
    bias = torch.randn(outputs, device=device).to(dtype) if role == "norm" else None
    out = torch.full((130, outputs), torch.nan, device=device, dtype=dtype)
    room = fp8.Room(
        fp8.Rounding.make(130, columns, device),
        torch.full_like(out, torch.nan),
        torch.full((130, 2 * outputs), torch.nan, device=device, dtype=dtype),
    )

    fp8.product(role, x, weight, out, room, eps, bias, residual)

    rows = scaled.widened(scaled.rounded(x if role == "residual" else ref.rms_norm(x, eps)))
    assert error(out, ref.linear(rows, weight, None, role == "gated", bias, residual)) < 1e-2


def test_a_row_that_is_not_finite_stays_so(device: torch.device) -> None:
    """What tells a caller that its logits are bad."""
    x = torch.randn(2, 64, device=device).bfloat16()
    x[1, 3] = torch.nan
    out = torch.zeros(2, 32, device=device, dtype=torch.bfloat16)
    room = fp8.Room(fp8.Rounding.make(2, 64, device), torch.empty_like(out), out)

    fp8.product("plain", x, scaled.rounded(torch.randn(32, 64, device=device)), out, room, 1e-5)

    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()
