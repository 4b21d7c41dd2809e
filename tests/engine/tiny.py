"""Tiny random models of the families the decoder covers, made and saved by transformers; and as fp8 checkpoints.

Owns their shapes: grouped heads, a head size that is not hidden / heads, odd widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

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
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },
    ),
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


def quantise(folder: Path, model: Any, form: str) -> None:
    """The saved model's projections in 8 bits, with scales as `form` has them: block, row or tensor; and the same
    rounding in `model`, which stays the oracle."""
    path = folder / "model.safetensors"
    stored, own = load_file(path), dict(model.named_parameters())
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored[name]
        tiles = {"block": (16, 16), "row": (1, weight.shape[1]), "tensor": tuple(weight.shape)}[form]
        grown = functional.pad(weight, (0, -weight.shape[1] % tiles[1], 0, -weight.shape[0] % tiles[0]))
        blocks = grown.unfold(0, tiles[0], tiles[0]).unfold(1, tiles[1], tiles[1])
        scale = blocks.abs().amax((-1, -2)) / 448.0
        spread = scale.repeat_interleave(tiles[0], 0).repeat_interleave(tiles[1], 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        small = (weight / spread).to(torch.float8_e4m3fn)
        stored[name] = small
        stored[name + ("_scale_inv" if form == "block" else "_scale")] = scale if form != "tensor" else scale.view(1)
        with torch.no_grad():
            own[name].copy_(small.float() * spread)
    save_file(stored, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = (
        {"quant_method": "fp8", "weight_block_size": [16, 16]}
        if form == "block"
        else {"quant_method": "compressed-tensors", "format": "float-quantized"}
    )
    (folder / "config.json").write_text(json.dumps(config))
