"""A rank's part of a model: whole heads of attention, columns of the MLP; norms, embedding and head are everybody's.

Owns which rows and columns those are. Knows no checkpoint, no device and no way to add the parts' results up again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.models.config import ModelConfig, ModelError


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of how many parts."""

    rank: int = 0
    ranks: int = 1

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The shape of this part. Raises ModelError where the model cannot be divided so."""
        widths = {"query heads": whole.heads, "key heads": whole.kv_heads, "columns of an MLP": whole.ffn}
        if whole.moe:
            widths["columns of an expert"] = whole.moe.ffn
        for name, width in widths.items():
            if width % self.ranks:
                raise ModelError(f"{width} {name} cannot be divided by {self.ranks} for tensor parallel")
        moe = replace(whole.moe, ffn=whole.moe.ffn // self.ranks) if whole.moe else None
        heads, kv_heads = whole.heads // self.ranks, whole.kv_heads // self.ranks
        return replace(whole, heads=heads, kv_heads=kv_heads, ffn=whole.ffn // self.ranks, moe=moe)

    def rows(self, stacked: Tensor, *widths: int) -> Tensor:
        """Of projections of these widths, one below the other, this part of each."""
        if self.ranks == 1:
            return stacked
        return torch.cat([self._part(each, 0) for each in torch.split(stacked, list(widths))])

    def columns(self, weight: Tensor) -> Tensor:
        """What this part's rows of the projection before are multiplied by."""
        return weight if self.ranks == 1 else self._part(weight, 1)

    def _part(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.ranks, dim)[self.rank].contiguous()


WHOLE = Shard()
