"""Tiny random models of the families the decoder covers, made and saved by transformers.

Owns their shapes: grouped heads, a head size that is not hidden / heads, odd widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "eos_token_id": 5,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, {"use_sliding_window": False}),
    "qwen3": (transformers.Qwen3Config, {"use_sliding_window": False, "head_dim": 16}),
}


def model_of(family: str, **changes: Any) -> Any:
    """A random model. Norms and biases are random too: left at one and zero they would prove nothing."""
    config_type, special = FAMILIES[family]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config_type(**SHAPE | special | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name or "bias" in name else 0.08
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def save(family: str, folder: Path, shard: str = "5GB", **changes: Any) -> Any:
    """The model, saved as a Hugging Face folder too."""
    model = model_of(family, **changes)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, vocab] by transformers."""
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return result
