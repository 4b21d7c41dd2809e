"""The layer's second half: one gated projection, or many of them and a router that sends each row to a few.

Owns no weights' loading. A row's result never depends on the step's other rows: experts are added in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.models.linear import Linear


@dataclass(frozen=True, slots=True)
class Mlp:
    """SiLU-gated: down(silu(gate) * up)."""

    gate_up: Linear  # [2 * ffn, hidden]
    down: Linear  # [hidden, ffn]

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate).mul_(up))


@dataclass(frozen=True, slots=True)
class Experts:
    """Qwen3-MoE: each row goes through its `chosen` likeliest experts."""

    router: Tensor  # [experts, hidden]
    experts: tuple[Mlp, ...]
    chosen: int
    is_normed: bool  # the weights of the chosen sum to one

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> the same."""
        shares, names = functional.linear(x, self.router).float().softmax(-1).topk(self.chosen)
        if self.is_normed:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for name in sorted(set(names.flatten().tolist())):
            rows, rank = (names == name).nonzero(as_tuple=True)
            out.index_add_(0, rows, self.experts[name](x[rows]) * shares[rows, rank, None].to(x.dtype))
        return out
