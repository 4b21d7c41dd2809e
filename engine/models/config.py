"""What a model is: the flags that drive the one decoder, read from a Hugging Face style config.json.

Owns ModelConfig and the sentence a user gets when a model cannot be served. Never imports torch, reads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
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
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} is not a usable model config ({error!r}); {ELSEWHERE}") from error


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
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"a checkpoint quantised by {method} is not supported; {ELSEWHERE}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"the activation {raw['hidden_act']} is not supported, only silu; {ELSEWHERE}")
    rope = _rope(raw)
    return ModelConfig(
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
        has_qk_norm=architecture == "Qwen3ForCausalLM",
        is_head_tied=bool(raw.get("tie_word_embeddings", False)),
        eos_ids=eos_ids,
    )


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
