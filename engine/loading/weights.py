"""Weights from a Hugging Face folder (safetensors, one file or shards), or made up, in a Decoder: merged, cast, packed.

Owns the order of rows in memory. Reads by mmap and never unpickles; makes no file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.models.config import ELSEWHERE, Fp8Config, ModelConfig, ModelError, is_random, read, read_json
from engine.models.decoder import Decoder, Layer, rope_frequencies
from engine.models.linear import Linear, pack
from engine.models.mlp import Experts, Mlp
from engine.models.shard import WHOLE, Shard

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load(folder: Path, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE) -> Decoder:
    """A decoder ready to run, or a rank's part of one, which needs its `summed` still. Raises ModelError when a tensor
    is missing or of another shape than the config says."""
    config = read(folder)
    part = shard.config(config)
    with _opened(folder) as checkpoint:
        source = (_MadeUp if is_random(folder) else _Source)(checkpoint, config, dtype, device, shard)
        embedding = source.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden))
        layers = tuple(_layer(source, number) for number in range(config.layers))
        head = embedding if config.is_head_tied else source.tensor("lm_head.weight", (config.vocab_size, config.hidden))
        norm = source.tensor("model.norm.weight", (config.hidden,))
    return Decoder(part, embedding, layers, norm, pack(head), rope_frequencies(config).to(device))


def shards(folder: Path) -> list[Path]:
    """The weight files of a folder, in name order."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).exists():
        raise ModelError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; {ELSEWHERE}")
    placed = read_json(folder / INDEX_FILE).get("weight_map")
    names = {str(name) for name in placed.values()} if isinstance(placed, dict) else set()
    if not names:
        raise ModelError(f"{folder / INDEX_FILE} names no weight file")
    if any(Path(name).name != name for name in names):
        raise ModelError(f"{folder / INDEX_FILE} names files outside its folder")
    return [folder / name for name in sorted(names)]


@dataclass(frozen=True, slots=True)
class _Source:
    """Named tensors of a checkpoint, as the decoder wants them."""

    checkpoint: dict[str, safe_open]  # tensor name -> the open file that holds it
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    shard: Shard = WHOLE

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.checkpoint:
            raise ModelError(f"the checkpoint has no tensor {name}; {ELSEWHERE}")
        tensor: Tensor = self.checkpoint[name].get_tensor(name)  # type: ignore[no-untyped-call]
        if tuple(tensor.shape) != shape:
            raise ModelError(f"the tensor {name} has shape {tuple(tensor.shape)}, the config says {shape}")
        if tensor.dtype == torch.float8_e4m3fn and self.config.fp8 is not None:
            tensor = self._widened(name, tensor, self.config.fp8)
        elif not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ModelError(f"the tensor {name} is {tensor.dtype}: of quantised ones only fp8 is read; {ELSEWHERE}")
        return tensor.to(self.device, self.dtype)

    def _widened(self, name: str, tensor: Tensor, fp8: Fp8Config) -> Tensor:
        """float32 from 8 bits and a scale: one a block (`_scale_inv`, as DeepSeek and Qwen write them), row, or all."""
        suffix = next((suffix for suffix in ("_scale_inv", "_scale") if name + suffix in self.checkpoint), None)
        if suffix is None:
            raise ModelError(f"the tensor {name} is 8 bits wide and has no scale; {ELSEWHERE}")
        scale: Tensor = self.checkpoint[name + suffix].get_tensor(name + suffix).float()  # type: ignore[no-untyped-call]
        rows, columns = tensor.shape
        per_row, per_column = fp8.block
        if scale.shape == (-(-rows // per_row), -(-columns // per_column)) and suffix == "_scale_inv":
            scale = scale.repeat_interleave(per_row, 0)[:rows].repeat_interleave(per_column, 1)[:, :columns]
        elif scale.numel() == rows:
            scale = scale.view(rows, 1)
        elif scale.numel() != 1:
            raise ModelError(f"the scales of {name} have shape {tuple(scale.shape)}, which fits no form; {ELSEWHERE}")
        return tensor.float() * scale

    def linear(self, prefix: str, parts: dict[str, int], columns: int) -> Linear:
        """Projections of the same input as one matrix, their rows one below the other, with biases if any has one."""
        shapes = {part: (rows, columns) for part, rows in parts.items()}
        weight = torch.cat([self._own(part, f"{prefix}{part}.weight", shape) for part, shape in shapes.items()])
        if not any(f"{prefix}{part}.bias" in self.checkpoint for part in parts):
            return pack(weight)
        return pack(weight, torch.cat([self._bias(prefix, part, rows) for part, rows in parts.items()]))

    def joined(self, prefix: str, part: str, rows: int, columns: int) -> Linear:
        """A projection whose results are summed over all ranks: one of them alone adds its bias."""
        weight = self.shard.columns(self.tensor(f"{prefix}{part}.weight", (rows, columns)))
        has_bias = f"{prefix}{part}.bias" in self.checkpoint and not self.shard.rank
        return pack(weight, self.tensor(f"{prefix}{part}.bias", (rows,)) if has_bias else None)

    def norm(self, prefix: str, part: str) -> Tensor | None:
        if not self.config.has_qk_norm:
            return None
        return rope_order(self.tensor(f"{prefix}{part}.weight", (self.config.head_dim,)), self.config.head_dim)

    def _bias(self, prefix: str, part: str, rows: int) -> Tensor:
        name = f"{prefix}{part}.bias"
        if name not in self.checkpoint:
            return torch.zeros(rows // self.shard.ranks, dtype=self.dtype, device=self.device)
        return self._own(part, name, (rows,))

    def _own(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.shard.rows(self.tensor(name, shape), shape[0])
        return rope_order(tensor, self.config.head_dim) if part in ("q_proj", "k_proj") else tensor


class _MadeUp(_Source):
    """Of a shape without weights: normal ones of transformers' own initial scale, by name, so that ranks have parts of
    one model."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:  # a norm's
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode()) >> 1)
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator).to(self.device, self.dtype)


def rope_order(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of each head reordered so that the two numbers that turn together are neighbours: rope is then one
    complex product. Queries and keys move alike, so their dot products stay what they were."""
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _layer(source: _Source, number: int) -> Layer:
    config, prefix = source.config, f"model.layers.{number}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    qkv = {"q_proj": config.q_width, "k_proj": config.kv_width, "v_proj": config.kv_width}
    return Layer(
        attention_norm=source.tensor(prefix + "input_layernorm.weight", (config.hidden,)),
        qkv=source.linear(attention, qkv, config.hidden),
        q_norm=source.norm(attention, "q_norm"),
        k_norm=source.norm(attention, "k_norm"),
        out=source.joined(attention, "o_proj", config.hidden, config.q_width),
        mlp_norm=source.tensor(prefix + "post_attention_layernorm.weight", (config.hidden,)),
        mlp=_experts(source, mlp) if config.moe and number in config.moe.layers else _mlp(source, mlp, config.ffn),
    )


def _mlp(source: _Source, prefix: str, ffn: int) -> Mlp:
    hidden = source.config.hidden
    return Mlp(
        gate_up=source.linear(prefix, {"gate_proj": ffn, "up_proj": ffn}, hidden),
        down=source.joined(prefix, "down_proj", hidden, ffn),
    )


def _experts(source: _Source, prefix: str) -> Experts:
    moe = source.config.moe
    assert moe is not None
    router = source.tensor(f"{prefix}gate.weight", (moe.experts, source.config.hidden))
    experts = tuple(_mlp(source, f"{prefix}experts.{number}.", moe.ffn) for number in range(moe.experts))
    return Experts(router, experts, moe.chosen, moe.is_normed)


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, safe_open]]:
    with ExitStack() as stack:
        checkpoint: dict[str, safe_open] = {}
        for path in () if is_random(folder) else shards(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} is not a readable safetensors file ({error})") from error
            checkpoint |= dict.fromkeys(file.keys(), file)
        yield checkpoint
