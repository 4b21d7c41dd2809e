"""Matrices of 8 bits a number: e4m3 with a float32 scale for each row, and how they are made of wider ones.

Owns the form and its rounding, in plain torch: what weights are stored by, and the oracle of the kernel that rounds
activations (fp8.py). Never imports triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
LEAST = 1e-12  # a row whose largest number is no larger has scale 1 and becomes zeros: its inverse would overflow
STEP = 16  # numbers: what the library's product of 8 bits asks both sides of a weight to be a multiple of


@dataclass(frozen=True, slots=True)
class Scaled:
    """Row r is values[r] * scales[r]."""

    values: Tensor  # [rows, columns] float8_e4m3fn
    scales: Tensor  # [rows] float32

    def __len__(self) -> int:
        return len(self.values)


Weight = Tensor | Scaled  # [outputs, columns]


def rounded(matrix: Tensor) -> Scaled:
    """The nearest; the largest number of a row becomes 448, so that none overflows."""
    wide = matrix.float()
    top = wide.abs().amax(-1)
    scales = torch.where(top > LEAST, top / E4M3_MAX, 1.0)
    return Scaled((wide / scales[:, None]).to(torch.float8_e4m3fn), scales)


def widened(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """As plain numbers again."""
    if isinstance(weight, Scaled):
        return (weight.values.float() * weight.scales[:, None]).to(dtype)
    return weight.to(dtype)


def plain(weight: Weight) -> Tensor:
    """A weight that is not of 8 bits, as what it is."""
    assert isinstance(weight, Tensor)
    return weight


def stored(weight: Tensor, dtype: torch.dtype, *, is_fp8: bool) -> Weight:
    """How a projection lies on the device. One whose sides no 8-bit product takes stays as wide as it was."""
    fits = not (weight.shape[0] % STEP or weight.shape[1] % STEP)
    return rounded(weight) if is_fp8 and fits else weight.to(dtype)
