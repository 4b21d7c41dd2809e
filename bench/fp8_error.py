"""What fp8 would cost in logits: weights, activations and KV of the embedded model in e4m3, against float32, on a CPU.

    python3 -m bench.fp8_error [--tokens 256] [--texts 3]

Owns the oracle: numbers are rounded as a kernel would store them and multiplied in float32. Weights have a scale for
each row, activations one for each token, KV one in float16 for each token and head. Says nothing of speed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from engine.loading import convert, weights
from engine.models import panels
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.linear import Linear
from engine.models.mlp import Mlp

E4M3_MAX = 448.0
Rounding = Callable[[Tensor], Tensor]


def exact(x: Tensor) -> Tensor:
    """As it is."""
    return x


def bf16(x: Tensor) -> Tensor:
    """What the GPU serves in today."""
    return x.bfloat16().float()


def fp8(x: Tensor) -> Tensor:
    """e4m3 with a float32 scale for each row of the last axis."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def fp8_kv(x: Tensor) -> Tensor:
    """The same with the scale kept in float16, rounded up so that nothing overflows."""
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX * (1 + 2**-10)).half().float().clamp(min=2**-24)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@dataclass(frozen=True, slots=True)
class Variant:
    """What is rounded, and how."""

    name: str
    weights: Rounding = exact
    activations: Rounding = exact
    kv: Rounding = exact


VARIANTS = (
    Variant("bf16 weights, activations, KV", bf16, bf16, bf16),
    Variant("fp8 weights", fp8, bf16, bf16),
    Variant("fp8 weights and activations", fp8, fp8, bf16),
    Variant("fp8 KV", bf16, bf16, fp8_kv),
    Variant("fp8 weights, activations, KV", fp8, fp8, fp8_kv),
)


@dataclass(frozen=True, slots=True)
class Rounded:
    """engine.models.linear.Linear of rounded operands."""

    weight: Tensor
    bias: Tensor | None
    activations: Rounding

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(self.activations(x), self.weight, self.bias)


class Prompt:
    """engine.models.pages.Pages of one whole prompt."""

    def __init__(self, config: ModelConfig, kv: Rounding) -> None:
        self._kv_heads, self._kv = config.kv_heads, kv
        self._keys_values = torch.empty(0)

    def write(self, _layer: int, keys_values: Tensor) -> None:
        self._keys_values = self._kv(keys_values)

    def attend(self, _layer: int, queries: Tensor) -> Tensor:
        keys, values = self._keys_values.transpose(0, 1).split(self._kv_heads)
        out = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None], keys[None], values[None], is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1)


def rounded(decoder: Decoder, variant: Variant) -> Decoder:
    """The model as the variant stores it; the head stays as it is, as fp8 checkpoints keep it."""

    def product(linear: Linear) -> Rounded:
        return Rounded(variant.weights(plain(linear)), linear.bias, variant.activations)

    layers = tuple(
        replace(
            layer, qkv=product(layer.qkv), out=product(layer.out),
            mlp=Mlp(product(layer.mlp.gate_up), product(layer.mlp.down)),
        )
        for layer in decoder.layers
    )  # fmt: skip
    return replace(decoder, layers=layers)


def plain(linear: Linear) -> Tensor:
    """The weight of a packed product too."""
    if linear.product is panels.product:
        return linear.weight.transpose(1, 2).flatten(0, 1)
    return linear.weight.to_dense() if linear.product is not None else linear.weight


def logits(decoder: Decoder, variant: Variant, ids: Tensor) -> Tensor:
    """[tokens, vocab] of a prompt."""
    hidden = decoder.forward(ids, torch.arange(len(ids)), Prompt(decoder.config, variant.kv))
    return decoder.logits(hidden)


@dataclass(frozen=True, slots=True)
class Row:
    """One variant over all positions of all texts."""

    variant: str
    relative_error: float  # 2-norm of the difference over that of the logits less their mean
    same_first: float  # share of positions whose likeliest token is the same
    widest_gap: float  # between float32's two logits where it is not
    divergence: float  # mean KL(float32 || variant), nats a token


def compared(name: str, wanted: Tensor, got: Tensor) -> Row:
    """`wanted` and `got` [positions, vocab]."""
    centred = wanted - wanted.mean(-1, keepdim=True)
    difference = got - got.mean(-1, keepdim=True) - centred
    first, other = wanted.argmax(-1), got.argmax(-1)
    gap = (wanted.gather(-1, first[:, None]) - wanted.gather(-1, other[:, None])).max()
    sure, guessed = wanted.log_softmax(-1), got.log_softmax(-1)
    divergence = (sure.exp() * (sure - guessed)).sum(-1).mean()
    error = difference.norm() / centred.norm()
    return Row(name, float(error), float((first == other).float().mean()), float(gap), float(divergence))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, default=3, help="so many documents of docs/")
    parser.add_argument("--out", type=Path, default=Path("bench/results/fp8_error.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = convert.convert(convert.locate(convert.EMBEDDED_NAME), convert.default_cache(), convert.print_progress)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [path.read_text(encoding="utf-8") for path in (Path("docs") / f"{name}.md" for name in NAMES)]
    prompts = [torch.tensor(tokenizer.encode(text).ids[: options.tokens]) for text in texts[: options.texts]]
    rows = []
    with torch.inference_mode():
        decoder = weights.load(folder, torch.float32, torch.device("cpu"))
        wanted = torch.cat([logits(decoder, Variant("float32"), ids) for ids in prompts])
        for variant in VARIANTS:
            model = rounded(decoder, variant)
            rows.append(compared(variant.name, wanted, torch.cat([logits(model, variant, ids) for ids in prompts])))
    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    print(f"| {len(wanted)} positions | relative error | same likeliest token | widest gap | KL, nats |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = f"{row.relative_error:.2%} | {row.same_first:.1%} | {row.widest_gap:.2f} | {row.divergence:.4f}"
        print(f"| {row.variant} | {cells} |")


NAMES = ("engine", "policies", "api", "loadgen")

if __name__ == "__main__":
    main()
