"""A matrix product with a fixed weight, in the form its device likes best.

Owns the packing of weights. Knows no model; a merged projection is just a taller matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# oneDNN's own blocked layout, made once: 1.5-2.2 times faster than MKL behind F.linear at 4 to 32 rows, 1.1-1.3 at 512,
# equal at 1 (SmolLM2 shapes, one Zen 4 core; bench/engine_cpu.py). One layout serves every number of rows.
# Its kernel reads weights at 19-21 GB/s with four to six rows, but at 15 with one and at 12 with two: fewer rows are
# computed as four, in 19 and 37 % less time.
_ROWS_MIN = 4
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Linear:
    """`y = x @ weight.T + bias`. Make it with `pack`."""

    weight: Tensor  # [out, in]; opaque when packed
    bias: Tensor | None  # [out]
    is_packed: bool

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]"""
        if not self.is_packed:
            return functional.linear(x, self.weight, self.bias)
        if len(x) >= _ROWS_MIN:
            return self._product(x)
        return self._product(functional.pad(x, (0, 0, 0, _ROWS_MIN - len(x))))[: len(x)]

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # noqa: SLF001
        return product


def pack(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A Linear in the fastest form for the weight's device. The packed form copies; `weight` may be let go."""
    if _HAS_ONEDNN and weight.device.type == "cpu" and weight.dtype == torch.float32:
        return Linear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias, is_packed=True)  # noqa: SLF001
    return Linear(weight, bias, is_packed=False)
