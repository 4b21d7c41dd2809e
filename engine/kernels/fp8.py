"""Products of many rows with weights of 8 bits: rows rounded to 8 bits in one pass, multiplied by the library.

Owns the rounding of activations and the order of those launches. Never rounds a weight (scaled.py), never serves few
rows: those are bound by the weight's bytes, and linear.py widens it in registers, so that only weights are rounded.

One program rounds a row: RMS norm or silu * mul before it is free, since the row is in registers for its maximum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import rows
from engine.kernels.linear import silu_mul
from engine.kernels.scaled import E4M3_MAX, LEAST, Scaled
from engine.kernels.tuned import Role

# The tensor cores of an H100 add e4m3 products in about 14 bits unless sums are moved to float32 in between.
IS_ACCUMULATED_FAST = False


@triton.jit
def round_rows(
    x, values, scales, WIDTH, W: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    TOP: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """values[row] * scales[row] = x[row], x[row] / rms or, of [rows, 2 * WIDTH], silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, W)
    inside = column < WIDTH
    if GATED:
        gate = tl.load(x + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + (row * 2 + 1) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        value = silu_mul(gate, up)
    else:
        value = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, 0) / WIDTH + EPS)
    top = tl.max(tl.abs(value), 0)
    scale = tl.where(top > LOW, top / TOP, 1.0)
    tl.store(scales + row, scale)
    tl.store(values + row * WIDTH + column, (value / scale).to(values.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Room for the rounded rows of one product at a time."""

    values: Tensor  # [rows * widest] float8_e4m3fn
    scales: Tensor  # [rows] float32

    @classmethod
    def make(cls, row_count: int, widest: int, device: torch.device) -> Rounding:
        """For so many rows of at most `widest` columns."""
        values = torch.zeros(row_count * widest, device=device, dtype=torch.float8_e4m3fn)
        return cls(values, torch.ones(row_count, device=device))

    def rows(self, x: Tensor, norm_eps: float | None = None) -> Scaled:
        """x, or x / rms, rounded."""
        return self._rounded(x, x.shape[1], norm_eps, is_gated=False)

    def gated(self, gate_up: Tensor) -> Scaled:
        """silu(first half) * second half, rounded."""
        return self._rounded(gate_up, gate_up.shape[1] // 2, None, is_gated=True)

    def _rounded(self, x: Tensor, width: int, eps: float | None, *, is_gated: bool) -> Scaled:
        count, block = len(x), triton.next_power_of_2(width)
        out = Scaled(self.values[: count * width].view(count, width), self.scales[:count])
        round_rows[(count,)](
            x, out.values, out.scales, width, W=block, EPS=eps or 0.0, NORM=eps is not None, GATED=is_gated,
            TOP=E4M3_MAX, LOW=LEAST, num_warps=max(4, min(16, block // 1024)),
        )  # fmt: skip
        return out


@dataclass(frozen=True, slots=True)
class Room:
    """What a product by the library needs beside its output, of as many rows."""

    rounding: Rounding
    summand: Tensor  # [rows, hidden]: a product before the residual is added
    gate_up: Tensor  # [rows, 2 * ffn]


def product(
    role: Role, x: Tensor | Scaled, weight: Scaled, out: Tensor, room: Room, eps: float, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    """out = epilogue(x @ weight.T) as linear.linear has it, x rounded to 8 bits before if it is not yet."""
    if role == "gated":
        rows.gated(gate_up(x, weight, room, eps), out)
    elif residual is None:
        multiplied(_operand(x, room, eps if role == "norm" else None), weight, out)
        if bias is not None:
            out += bias
    else:
        torch.add(residual, multiplied(_operand(x, room, None), weight, room.summand), out=out)


def gate_up(x: Tensor | Scaled, weight: Scaled, room: Room, eps: float) -> Tensor:
    """Both halves of the gated projection before they meet."""
    return multiplied(_operand(x, room, eps), weight, room.gate_up)


def multiplied(x: Scaled, weight: Scaled, out: Tensor) -> Tensor:
    """out = x @ weight.T by the library."""
    if out.is_meta:
        return out  # a rehearsal (engine/compute/precompile.py): torch knows no shape of this product
    return torch._scaled_mm(  # noqa: SLF001  # the public name takes no `out`
        x.values, weight.values.t(), scale_a=x.scales[:, None], scale_b=weight.scales[None], out_dtype=out.dtype,
        use_fast_accum=IS_ACCUMULATED_FAST, out=out,
    )  # fmt: skip


def _operand(x: Tensor | Scaled, room: Room, norm_eps: float | None) -> Scaled:
    return x if isinstance(x, Scaled) else room.rounding.rows(x, norm_eps)
