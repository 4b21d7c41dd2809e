"""tiny-agent: a model for client tests, made in code. It holds a conversation of one sentence, or what a grammar wants.

Owns its folder: two layers of seeded random weights, SmolLM2's tokenizer, 256k positions, a ChatML template with tools.
Run as `python -m tests.clients.tiny_agent FOLDER`, then `headway serve --model FOLDER`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from engine.loading.convert import convert, default_cache, locate, print_progress

SENTENCE = "I am tiny-agent, and all is well."
POSITIONS = 262_144
HIDDEN, HEADS, KV_HEADS, WIDE, LAYERS = 64, 4, 1, 128, 2
CHAIN = 40.0  # how much a token wants the next one of the sentence: at 26 one of 5,000 answers ended early, by chance
ENDS = 15.0  # how much any other token wants the end, or what closes a string or an object

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call one as <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or () %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make(folder: Path) -> Path:
    """The folder, as Hugging Face lays it out."""
    source = convert(locate("smollm2"), default_cache(), print_progress)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": end,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(tokenizer, end), folder / "model.safetensors")
    return folder


def _weights(tokenizer: Tokenizer, end: int) -> dict[str, np.ndarray]:
    """Attention and MLP compute, but write nothing back, so that the last token alone chooses the next one: the rows of
    the head are the embeddings of what they follow."""
    chance, size = np.random.default_rng(1), tokenizer.get_vocab_size()
    embedding = chance.standard_normal((size, HIDDEN), dtype=np.float32)
    embedding[:, 0] = 2.0  # the same in every token: what reads it speaks for all of them
    head = chance.standard_normal((size, HIDDEN), dtype=np.float32) * 0.01
    lengths = np.linalg.norm(embedding, axis=1) / np.sqrt(HIDDEN)
    for token in {end, *(tokenizer.token_to_id(mark) for mark in ('"', '"}', "}"))} - {None}:
        head[token, 0] += ENDS / 2.0
    said = [tokenizer.encode("\n", add_special_tokens=False).ids[-1], *tokenizer.encode(SENTENCE).ids, end]
    assert len(set(said)) == len(said), "each token of the sentence has one successor"
    for before, after in itertools.pairwise(said):
        head[after, 1:] += CHAIN * lengths[before] * embedding[before, 1:] / (embedding[before, 1:] ** 2).sum()
    weights = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": np.ones(HIDDEN, dtype=np.float32),
    }
    for layer in range(LAYERS):
        weights |= {f"model.layers.{layer}.{name}": values for name, values in _layer(chance).items()}
    return weights


def _layer(chance: np.random.Generator) -> dict[str, np.ndarray]:
    key = HIDDEN // HEADS * KV_HEADS
    shapes = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (key, HIDDEN), "v_proj": (key, HIDDEN)}
    made = {
        f"self_attn.{name}.weight": chance.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()
    }
    for name in ("gate_proj", "up_proj"):
        made[f"mlp.{name}.weight"] = chance.standard_normal((WIDE, HIDDEN), dtype=np.float32)
    nothing = {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE)}
    made |= {f"{name}.weight": np.zeros(shape, dtype=np.float32) for name, shape in nothing.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return made | {f"{name}.weight": np.ones(HIDDEN, dtype=np.float32) for name in norms}


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
