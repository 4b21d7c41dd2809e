"""A GGUF file seen as Hugging Face parts: config, generation config, tokenizer, named tensors.

Owns the translation of names, metadata and row order. Never writes a file; refuses what it does not know by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from engine.models.config import ELSEWHERE, ModelError

Array = npt.NDArray[Any]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
QUANTISATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How text is cut before byte-pair merging, by tokenizer.ggml.pre. None: GPT-2's own rule, built into ByteLevel.
# SmolLM's original also cuts before each digit; transformers' GGUF loader does not, and it is the oracle: no merge
# holds a digit, so the ids differ only where several spaces stand before one.
PRE_TOKENIZERS: dict[str, str | None] = {
    "smollm": None,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Llama 3: digits in threes; and a piece that is a token as it stands is not merged from its bytes.
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
WHOLE_PIECES = ("llama-bpe",)  # "ignore_merges" of their tokenizer.json
# Llama 3.1 and later slow some turns of rope down. GGUF says by how much each, Hugging Face by four figures, of which
# these three are the same in all models published so far; a file that they do not explain is refused.
ROPE_FACTORS = "rope_freqs.weight"
ROPE_SHAPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class Named:
    """One tensor under its Hugging Face name, still as stored."""

    name: str
    stored: gguf.ReaderTensor
    unpermute_heads: int  # 0: rows are as they should be


class GgufFile:
    """An open GGUF file of a supported architecture. Every method raises ModelError on what it cannot translate."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in self._reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            # What the reader raises on a file that is cut short or is no GGUF; it has no error of its own.
            raise ModelError(f"{path} is not a readable GGUF file, or it is cut short ({error})") from error
        self.architecture = str(self._fields.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ModelError(f"{path} is of architecture {self.architecture}, supported are {known}; {ELSEWHERE}")

    def config(self) -> dict[str, Any]:
        """config.json"""
        if self._of("rope.scaling.type", "none") != "none":
            raise ModelError(f"{self.path} scales its rope ({self._of('rope.scaling.type')}); {ELSEWHERE}")
        heads, hidden = self._of("attention.head_count"), self._of("embedding_length")
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "hidden_size": hidden,
            "num_hidden_layers": self._of("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._of("attention.head_count_kv", heads),
            "head_dim": self._of("attention.key_length", hidden // heads),
            "intermediate_size": self._of("feed_forward_length"),
            "vocab_size": len(self._field("tokenizer.ggml.tokens")),
            "max_position_embeddings": self._of("context_length"),
            "rms_norm_eps": self._of("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._of("rope.freq_base", 10_000.0),
            "rope_scaling": self._rope_scaling(),
            "hidden_act": "silu",
            "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in self._reader.tensors),
            "torch_dtype": "float32",
            "bos_token_id": self._fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._eos_ids(),
        }

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json: all tokens that end a text."""
        return {"eos_token_id": self._eos_ids()}

    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json: byte-level BPE, control tokens special."""
        kind, cut = self._field("tokenizer.ggml.model"), str(self._fields.get("tokenizer.ggml.pre"))
        if kind != "gpt2" or cut not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise ModelError(f"{self.path} has a {kind} tokenizer of kind {cut}, supported are {known}; {ELSEWHERE}")
        tokens, kinds = self._field("tokenizer.ggml.tokens"), self._field("tokenizer.ggml.token_type")
        added = [number for number, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added_token(number, tokens[number], kinds[number] == CONTROL) for number in added],
            "normalizer": None,
            "pre_tokenizer": _pre_tokenizer(PRE_TOKENIZERS[cut], byte_level),
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": cut in WHOLE_PIECES,
                "vocab": {token: number for number, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in self._field("tokenizer.ggml.merges")],
            },
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json: the chat template and the tokens it names."""
        tokens = self._field("tokenizer.ggml.tokens")
        named = {
            f"{role}_token": tokens[self._fields[f"tokenizer.ggml.{key}_token_id"]]
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
            if f"tokenizer.ggml.{key}_token_id" in self._fields
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._of("context_length"),
            "add_bos_token": bool(self._fields.get("tokenizer.ggml.add_bos_token", False)),
            "chat_template": self._fields.get("tokenizer.chat_template"),
            **named,
        }

    def tensors(self) -> list[Named]:
        """All tensors, by their new names. None is left out: one without a name here would be a wrong answer later."""
        heads = self._of("attention.head_count")
        permuted = {"attn_q": heads, "attn_k": self._of("attention.head_count_kv", heads)}
        return [
            self._named(tensor, permuted if self.architecture == "llama" else {})
            for tensor in self._reader.tensors
            if tensor.name != ROPE_FACTORS  # said in config.json
        ]

    def _rope_scaling(self) -> dict[str, Any] | None:
        """Llama 3's, as config.json says it."""
        stored = [tensor for tensor in self._reader.tensors if tensor.name == ROPE_FACTORS]
        if not stored:
            return None
        factors = np.asarray(stored[0].data, np.float64)
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), **ROPE_SHAPE}
        if not np.allclose(factors, _llama3_factors(len(factors), self._of("rope.freq_base", 10_000.0), scaling), 1e-3):
            raise ModelError(f"{self.path} scales its rope by factors that are not Llama 3's; {ELSEWHERE}")
        return scaling

    def _named(self, tensor: gguf.ReaderTensor, permuted: dict[str, int]) -> Named:
        if tensor.tensor_type.name not in QUANTISATIONS:
            quantisation = f"{tensor.name} is quantised as {tensor.tensor_type.name}"
            raise ModelError(f"{self.path}: {quantisation}, supported are {', '.join(QUANTISATIONS)}; {ELSEWHERE}")
        if tensor.name in TENSORS:
            return Named(TENSORS[tensor.name], tensor, 0)
        parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        if parts is None or parts[2] not in LAYER_TENSORS:
            raise ModelError(f"{self.path} holds a tensor {tensor.name} that is not known here; {ELSEWHERE}")
        number, part, kind = parts.groups()
        return Named(f"model.layers.{number}.{LAYER_TENSORS[part]}.{kind}", tensor, permuted.get(part, 0))

    def _of(self, key: str, default: Any = None) -> Any:
        return self._field(f"{self.architecture}.{key}", default)

    def _field(self, key: str, default: Any = None) -> Any:
        value = self._fields.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} says nothing about {key}; {ELSEWHERE}")
        return value

    def _eos_ids(self) -> list[int]:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
        return sorted({int(self._fields[key]) for key in keys if key in self._fields})


def array(named: Named) -> Array:
    """The tensor as numbers, exactly: quantised becomes float32, what was 16 or 32 bits stays (bfloat16 as float32)."""
    stored = named.stored
    is_plain = stored.tensor_type.name in ("F32", "F16")
    values: Array = stored.data if is_plain else gguf.dequantize(stored.data, stored.tensor_type)
    return _unpermuted(values, named.unpermute_heads) if named.unpermute_heads else values


def pieces(named: list[Named]) -> Iterator[tuple[str, Array]]:
    """(name, array), one in memory at a time."""
    for one in named:
        yield one.name, array(one)


def _unpermuted(rows: Array, heads: int) -> Array:
    """llama.cpp stores a head's rows as neighbours that turn together; Hugging Face has them half a head apart."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def _llama3_factors(count: int, theta: float, scaling: dict[str, Any]) -> npt.NDArray[np.float64]:
    """By how much each frequency is divided."""
    frequencies = theta ** -(np.arange(count) / count)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - kept) / scaling["factor"] + kept))


def _pre_tokenizer(pattern: str | None, byte_level: dict[str, Any]) -> dict[str, Any]:
    if pattern is None:
        return byte_level
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level | {"use_regex": False}]}


def _added_token(number: int, content: str, is_special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": is_special}


def dumps(part: dict[str, Any]) -> str:
    """A part as the text of its file."""
    return json.dumps(part, ensure_ascii=False, indent=1)
