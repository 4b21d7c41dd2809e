"""A matrix product with a fixed weight, in the form its device likes best.

Owns the choice of that form. Knows no model; a merged projection is just a taller matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.models import panels

# oneDNN's own blocked layout, made once: 1.5-2.2 times faster than MKL behind F.linear at 4 to 32 rows, 1.1-1.3 at 512,
# equal at 1 (SmolLM2 shapes, one Zen 4 core; bench/engine_cpu.py). One layout serves every number of rows.
# Its kernel reads weights at 19-21 GB/s with four to six rows, but at 15 with one and at 12 with two: fewer rows are
# computed as four, in 19 and 37 % less time. Our own (panels.py) beats it with any number of rows, where it can be had.
_ROWS_MIN = 4
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Linear:
    """`y = x @ weight.T + bias`. Make it with `pack`."""

    weight: Tensor  # [out, in]; opaque when packed
    bias: Tensor | None  # [out]
    product: Callable[[Tensor, Tensor], Tensor] | None = None  # of rows and a packed weight; None: it is not packed

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]"""
        if self.product is None:
            return functional.linear(x, self.weight, self.bias)
        y = self.product(x, self.weight)
        return y if self.bias is None else y.add_(self.bias)


def pack(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A Linear in the fastest form for the weight's device. The packed form copies; `weight` may be let go."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return Linear(weight, bias)
    if panels.fits(weight):
        return Linear(panels.arrange(weight), bias, panels.product)
    if _HAS_ONEDNN:
        return Linear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias, onednn)  # noqa: SLF001
    return Linear(weight, bias)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, in] -> [rows, out], by a weight in oneDNN's order."""
    count = len(x)
    if count < _ROWS_MIN:
        x = functional.pad(x, (0, 0, 0, _ROWS_MIN - count))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # noqa: SLF001
    return product[:count]
