"""What a model is: the flags that drive the one decoder, read from a Hugging Face style config.json.

Owns ModelConfig and the sentence a user gets when a model cannot be served. Never imports torch, reads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
RANDOM_MARK = "random_weights"  # a key of config.json: weights of this shape are made up, for figures alone
ELSEWHERE = "serve it with another engine and put Headway before it: headway serve --upstream URL"


class ModelError(Exception):
    """A model that cannot be served, as one sentence for a person. A command that catches it prints it, exits 2."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's rule: long wavelengths are stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Layers whose second half is many small ones of which each token takes a few."""

    experts: int
    chosen: int  # for each token
    ffn: int  # of one expert
    is_normed: bool
    layers: frozenset[int]  # those that are so; the others are plain


@dataclass(frozen=True, slots=True)
class Fp8Config:
    """8-bit weights with a scale a block of rows and columns, or one a row, or one in all: the checkpoint tells."""

    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder. Biases are not flags: a projection has one when the checkpoint does."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    context_max: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    has_qk_norm: bool
    is_head_tied: bool
    eos_ids: tuple[int, ...]
    moe: MoeConfig | None = None
    fp8: Fp8Config | None = None

    @property
    def parameters(self) -> int:
        """Weights of all layers and both ends, biases and norms left out."""
        attention = self.hidden * (2 * self.q_width + 2 * self.kv_width)
        sparse = len(self.moe.layers) * self.moe.experts * self.moe.ffn if self.moe else 0
        plain = (self.layers - (len(self.moe.layers) if self.moe else 0)) * self.ffn
        ends = self.vocab_size * self.hidden * (1 if self.is_head_tied else 2)
        return self.layers * attention + 3 * self.hidden * (sparse + plain) + ends

    @property
    def q_width(self) -> int:
        """Columns of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of all key heads together; values have as many."""
        return self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """KV memory of one token over all layers."""
        return 2 * self.layers * self.kv_width * element_bytes


def read(folder: Path) -> ModelConfig:
    """The config of a Hugging Face folder. Raises ModelError on what the decoder does not cover."""
    raw = read_json(folder / "config.json")
    try:
        return _parse(raw, _eos_ids(folder, raw))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:  # others than ours
        raise ModelError(f"{folder / 'config.json'} is not a usable model config ({error!r}); {ELSEWHERE}") from error


def is_random(folder: Path) -> bool:
    """Whether this folder is a shape without weights."""
    return bool(read_json(folder / "config.json").get(RANDOM_MARK))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model. Raises ModelError when it is not there or not one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); {ELSEWHERE}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is not a JSON object; {ELSEWHERE}")
    return raw


def _parse(raw: dict[str, Any], eos_ids: tuple[int, ...]) -> ModelConfig:
    architecture = (raw.get("architectures") or ["none named"])[0]
    if architecture not in ARCHITECTURES:
        raise ModelError(f"the architecture {architecture} is not one of {', '.join(ARCHITECTURES)}; {ELSEWHERE}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"the activation {raw['hidden_act']} is not supported, only silu; {ELSEWHERE}")
    rope = _rope(raw)
    config = ModelConfig(
        hidden=int(raw["hidden_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=int(raw["num_attention_heads"]),
        kv_heads=int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]),
        ffn=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        context_max=_context_max(raw),
        norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(rope),
        has_qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        is_head_tied=bool(raw.get("tie_word_embeddings", False)),
        eos_ids=eos_ids,
        moe=_moe(raw) if architecture == "Qwen3MoeForCausalLM" else None,
        fp8=_fp8(raw.get("quantization_config") or {}),
    )
    sizes = (config.hidden, config.layers, config.heads, config.kv_heads, config.head_dim, config.ffn)
    if min(*sizes, config.vocab_size, config.context_max) < 1 or config.heads % config.kv_heads or config.head_dim % 2:
        raise ValueError("a size is below 1, or heads do not divide")
    return config


def _moe(raw: dict[str, Any]) -> MoeConfig:
    experts, every = int(raw.get("num_local_experts") or raw["num_experts"]), int(raw.get("decoder_sparse_step", 1))
    plain = set(raw.get("mlp_only_layers") or ())
    layers = range(int(raw["num_hidden_layers"]))
    return MoeConfig(
        experts=experts,
        chosen=int(raw["num_experts_per_tok"]),
        ffn=int(raw["moe_intermediate_size"]),
        is_normed=bool(raw.get("norm_topk_prob", False)),
        layers=frozenset(layer for layer in layers if layer not in plain and (layer + 1) % every == 0),
    )


def _fp8(quantisation: dict[str, Any]) -> Fp8Config | None:
    """Weights are widened at load, so how activations would be rounded does not matter here."""
    if not quantisation:
        return None
    method, form = quantisation.get("quant_method", "unknown"), quantisation.get("format", "")
    if method == "fp8" or (method == "compressed-tensors" and form == "float-quantized"):
        rows, columns = quantisation.get("weight_block_size") or (128, 128)
        return Fp8Config((int(rows), int(columns)))
    raise ModelError(f"a checkpoint quantised by {method} is not supported, only fp8; {ELSEWHERE}")


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, earlier ones `rope_scaling` beside `rope_theta`."""
    return dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"rope scaling of type {kind} is not supported, only llama3; {ELSEWHERE}")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )


def _context_max(raw: dict[str, Any]) -> int:
    """Inside one sliding window full attention is exact, so a windowed model serves contexts up to its window."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    context = int(raw["max_position_embeddings"])
    return min(context, int(window)) if window else context


def _eos_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json knows best: chat models list their end-of-turn token only there."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(int(token) for token in (eos if isinstance(eos, list) else [eos]))
