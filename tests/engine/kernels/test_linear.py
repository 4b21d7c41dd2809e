"""Products of few rows agree with the oracle under every epilogue, tile and split."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import ref
from engine.kernels.linear import PLAIN, Epilogue, Scratch, linear
from engine.kernels.tuned import Choice
from tests.engine.kernels.attention_case import error

GEMV = Choice("gemv", block_n=4, block_k=256, head_k=512, warps=1)
DOT = Choice("dot", block_n=32, block_k=64)
PLAIN_DOT = Choice("dot", block_n=32, block_k=64, is_swapped=False, splits=3)
SPLIT_DOT = Choice("dot", block_n=64, block_k=64, splits=3, rows_max=16)
TMA = Choice("tma", block_n=32, block_k=64, warps=4)
EPILOGUES = {"plain": PLAIN, "residual": PLAIN, "norm": Epilogue(1e-5), "gated": Epilogue(1e-5, is_gated=True)}


@pytest.mark.parametrize("role", EPILOGUES)
@pytest.mark.parametrize(
    ("choice", "rows"),
    [(GEMV, 1), (GEMV, 2), (DOT, 3), (DOT, 40), (PLAIN_DOT, 7), (SPLIT_DOT, 33), (TMA, 17)],
    ids=["gemv1", "gemv2", "dot3", "dot40", "plain7", "split33", "tma17"],
)
def test_a_product_agrees_with_the_oracle(
    choice: Choice, rows: int, role: str, dtype: torch.dtype, device: torch.device
) -> None:
    if choice.splits > 1 and role in ("norm", "gated"):
        pytest.skip("a norm needs whole rows of x in one program: choose() never splits it")
    columns, outputs, epilogue = 768, 128, EPILOGUES[role]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, columns, generator=generator, device=device).to(dtype)
    weight = (torch.randn(outputs * (1 + epilogue.is_gated), columns, generator=generator, device=device) / 30).to(
        dtype
    )
    residual = torch.randn(rows, outputs, generator=generator, device=device).to(dtype) if role == "residual" else None
    bias = torch.randn(outputs, generator=generator, device=device).to(dtype) if role == "norm" else None
    out = torch.full((rows, outputs), torch.nan, device=device, dtype=dtype)
    scratch = Scratch.make(device, floats=1 << 16, tiles=64)

    for _ in range(2):  # twice: the counters of the first launch must be zero again for the second
        linear(x, weight, out.fill_(torch.nan), choice, scratch, epilogue, bias, residual)

    wanted = ref.linear(x, weight, epilogue.norm_eps, epilogue.is_gated, bias, residual)
    assert error(out, wanted) < 4e-3
    assert not scratch.arrivals.any()


def test_the_residual_may_be_the_output_itself(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(5, 256, device=device).to(dtype)
    weight = (torch.randn(64, 256, device=device) / 16).to(dtype)
    stream = torch.randn(5, 64, device=device).to(dtype)
    wanted = ref.linear(x, weight, residual=stream)

    linear(x, weight, stream, PLAIN_DOT_256, Scratch.make(device, 1 << 14, 16), residual=stream)

    assert error(stream, wanted) < 4e-3


PLAIN_DOT_256 = Choice("dot", block_n=32, block_k=64, is_swapped=False, splits=2)


def test_float32_logits_come_out_as_float32(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(3, 256, device=device).to(dtype)
    weight = torch.randn(64, 256, device=device).to(dtype)
    out = torch.full((3, 64), torch.nan, device=device)

    linear(x, weight, out, DOT, Scratch.make(device, 1 << 14, 16))

    assert error(out, ref.linear(x, weight)) < 1e-5
