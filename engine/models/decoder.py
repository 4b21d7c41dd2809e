"""One decoder for Llama, SmolLM2, Mistral, Qwen2 and Qwen3: what differs is data (biases, norms, rope, experts).

Owns the arithmetic of a step's rows. Never sees sequences, blocks or sampling; KV lies behind `Pages`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.models.config import ModelConfig, RopeScaling
from engine.models.linear import Linear
from engine.models.mlp import Experts, Mlp
from engine.models.pages import Pages


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. Rows of q and k are in rope order (see weights.py)."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # [q_width + 2 * kv_width, hidden]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    out: Linear  # [hidden, q_width]
    mlp_norm: Tensor  # [hidden]
    mlp: Mlp | Experts


def alone(part: Tensor) -> Tensor:
    """A layer's result where one rank holds all of it."""
    return part


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's weights and what its rope turns by; or a rank's part of them, and how parts of a result are summed."""

    config: ModelConfig
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor  # [hidden]
    head: Linear  # [vocab, hidden]
    frequencies: Tensor  # [head_dim / 2] float32
    summed: Callable[[Tensor], Tensor] = alone  # over all ranks

    def forward(self, ids: Tensor, positions: Tensor, pages: Pages) -> Tensor:
        """[rows] ids and positions, both int64 -> hidden states [rows, hidden]. Writes the rows' KV."""
        eps = self.config.norm_eps
        x = self.embedding[ids]
        turn = rotation(self.frequencies, positions)
        for number, layer in enumerate(self.layers):
            normed = functional.rms_norm(x, x.shape[-1:], layer.attention_norm, eps)
            x += self.summed(self._attention(number, normed, turn, pages))
            normed = functional.rms_norm(x, x.shape[-1:], layer.mlp_norm, eps)
            x += self.summed(layer.mlp(normed))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of the rows to sample -> [sampled, vocab] float32."""
        return self.head(functional.rms_norm(hidden, hidden.shape[-1:], self.norm, self.config.norm_eps)).float()

    def _attention(self, number: int, x: Tensor, turn: Tensor, pages: Pages) -> Tensor:
        config, layer = self.config, self.layers[number]
        heads = layer.qkv(x).view(len(x), -1, config.head_dim)  # [rows, heads + 2 * kv_heads, head_dim]
        queries, keys_values = heads[:, : config.heads], heads[:, config.heads :]
        turned = heads[:, : config.heads + config.kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            for part, weight in ((queries, layer.q_norm), (keys_values[:, : config.kv_heads], layer.k_norm)):
                part.copy_(functional.rms_norm(part, part.shape[-1:], weight, config.norm_eps))
        rotate_(turned, turn)
        pages.write(number, keys_values)
        return layer.out(pages.attend(number, queries).flatten(1))


def rotate(heads: Tensor, turn: Tensor) -> Tensor:
    """[rows, heads, head_dim] turned by [rows, 1, head_dim / 2] complex: neighbours in a head are one number."""
    pairs = torch.view_as_complex(heads.float().view(*heads.shape[:2], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def rotate_(heads: Tensor, turn: Tensor) -> None:
    """The same in place."""
    if heads.dtype is not torch.float32:
        heads.copy_(rotate(heads, turn))
    else:
        torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2)).mul_(turn)


def rotation(frequencies: Tensor, positions: Tensor) -> Tensor:
    """[rows] positions -> [rows, 1, head_dim / 2] complex. In float32 like transformers, so that greedy ids agree."""
    angles = positions.float()[:, None] * frequencies
    return torch.complex(angles.cos(), angles.sin())[:, None]


def rope_frequencies(config: ModelConfig) -> Tensor:
    """[head_dim / 2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    return frequencies if config.rope_scaling is None else _stretched(frequencies, config.rope_scaling)


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3: what turns less than `low_freq_factor` times in the original context is slowed by `factor`."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
