"""The one decoder on a GPU: five kernels a layer for few rows, cuBLAS and row kernels between them for many.

Owns the order of launches and the buffers of a step. Never sees sequences or sampling, never allocates in a step and
never waits, so that a step can be captured. Norm weights are folded into the products they feed. A layer's projections
may be of 8 bits (engine/kernels/scaled.py); embedding and head never are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engine.kernels import fp8, paged, plan, rows, scaled, tuned
from engine.kernels.linear import Epilogue, Scratch, linear
from engine.kernels.paged import Launch, Shape, Step
from engine.kernels.scaled import Scaled, Weight
from engine.models.config import ELSEWHERE, ModelConfig, ModelError
from engine.models.decoder import rope_frequencies
from engine.models.mlp import Experts, Mlp
from engine.models.shard import WHOLE, Shard

if TYPE_CHECKING:
    from engine.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """One layer's weights. Rows of q and k are in rope order (engine/loading/weights.py)."""

    qkv: Weight  # [q_width + 2 * kv_width, hidden], attention norm folded in
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    out: Weight  # [hidden, q_width]
    gate_up: Weight  # [2 * ffn, hidden], mlp norm folded in
    down: Weight  # [hidden, ffn]


@dataclass(frozen=True, slots=True)
class Weights:
    """A model on the device."""

    config: ModelConfig
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[GpuLayer, ...]
    norm: Tensor  # [hidden]; not folded: a tied head is the embedding
    head: Tensor  # [vocab, hidden]
    frequencies: Tensor  # [head_dim / 2] float32

    @property
    def has_fp8(self) -> bool:
        """Whether any projection is of 8 bits."""
        return any(isinstance(getattr(layer, name), Scaled) for layer in self.layers for name in PROJECTIONS)


PROJECTIONS = ("qkv", "out", "gate_up", "down")


def from_decoder(decoder: Decoder, *, is_fp8: bool = False) -> Weights:
    """The same model with folded norms; the projections must lie unpacked (`Linear.product` None). Of 8 bits, a rank's
    part has its own scales: what is rounded is what it holds."""

    def stored(weight: Tensor, norm: Tensor | None = None) -> Weight:
        wide = weight if norm is None else weight.float() * norm.float()
        return scaled.stored(wide, weight.dtype, is_fp8=is_fp8)

    def dense(mlp: Mlp | Experts) -> Mlp:
        if isinstance(mlp, Experts):
            raise ModelError(f"a mixture of experts runs on the CPU alone; {ELSEWHERE}")
        return mlp

    layers = tuple(
        GpuLayer(
            stored(layer.qkv.weight, layer.attention_norm), layer.qkv.bias, layer.q_norm, layer.k_norm,
            stored(layer.out.weight), stored(dense(layer.mlp).gate_up.weight, layer.mlp_norm),
            stored(dense(layer.mlp).down.weight),
        )
        for layer in decoder.layers
    )  # fmt: skip
    return Weights(decoder.config, decoder.embedding, layers, decoder.norm, decoder.head.weight, decoder.frequencies)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step is told, on the device. Sequences of few rows come first."""

    ids: Tensor  # [rows] int32
    positions: Tensor  # [rows] int32
    sample_rows: Tensor  # [sampled] int32
    step: Step
    sources: Tensor | None = None  # [rows] int32: whose id the step before sampled there; -1: `ids` has it


@dataclass(frozen=True, slots=True)
class Kind:
    """What of a step is fixed when it is captured."""

    first_chunk_row: int  # rows before it belong to sequences of few rows
    chunk_tiles_max: int = 0
    chunk_parts: int = 1  # of each chunk tile's past
    has_shared: bool = False
    has_parts: bool = True  # False: no context exceeds the step's part size


@dataclass(frozen=True, slots=True)
class Buffers:
    """Memory of one step at a time, for up to as many rows."""

    x: Tensor  # [rows, hidden]: the residual stream
    normed: Tensor  # [rows, hidden]
    qkv: Tensor
    attended: Tensor  # [rows, q_width]
    gate_up: Tensor  # [rows, 2 * ffn]
    mid: Tensor  # [rows, ffn]
    logits: Tensor  # [sampled, vocab] float32
    scratch: Scratch
    lists: plan.WorkLists
    rounding: fp8.Rounding | None = None  # of weights of 8 bits alone

    @classmethod
    def make(cls, weights: Weights, shape: Shape, row_count: int, sampled: int, sequences: int, parts: int) -> Buffers:
        """Room for `row_count` rows of `sequences` sequences, `sampled` with logits, and `parts` parts of KV."""
        config, like = weights.config, weights.embedding

        def room(width: int, count: int = row_count) -> Tensor:
            return torch.zeros(count, width, device=like.device, dtype=like.dtype)  # padding rows stay finite

        return cls(
            room(config.hidden), room(config.hidden), room(config.q_width + 2 * config.kv_width), room(config.q_width),
            room(2 * config.ffn), room(config.ffn),
            torch.empty(sampled, config.vocab_size, device=like.device), Scratch.make(like.device),
            paged.work_lists(shape, sequences, row_count, parts, like.device),
            fp8.Rounding.make(row_count, widest(config), like.device) if weights.has_fp8 else None,
        )  # fmt: skip

    def first(self, row_count: int) -> Buffers:
        """The same for a step of fewer rows."""
        names = ("x", "normed", "qkv", "attended", "gate_up", "mid")
        return replace(self, **{name: getattr(self, name)[:row_count] for name in names})

    @property
    def wide(self) -> fp8.Room:
        """What the library's products of 8 bits use: `normed` is free where they have a residual."""
        assert self.rounding is not None
        return fp8.Room(self.rounding, self.normed, self.gate_up)


def widest(config: ModelConfig) -> int:
    """Columns of the widest projection's input."""
    return max(config.hidden, config.q_width, config.ffn)


class Ranks(Protocol):
    """How the residual stream becomes the same on all ranks: each adds its part of a product to a term of its own, and
    the sum of these is the stream. Nothing here allocates or waits."""

    def term(self, x: Tensor) -> Tensor:
        """What this rank's part is added to: one has the stream so far, the others have zeros."""

    def part(self, x: Tensor) -> Tensor:
        """Where this rank writes its summand; x itself, or memory that the others read."""

    def sum_into(self, x: Tensor, part: Tensor) -> None:
        """x = the sum of all ranks' parts."""

    def agree(self, answer: Tensor) -> None:
        """Take over what rank 0 chose."""


@dataclass(frozen=True, slots=True)
class GpuDecoder:
    """A model, its KV memory and how its kernels are launched; or a rank's part, and how it is summed."""

    weights: Weights
    shape: Shape
    pool: Tensor  # blocks as the shape's layout has them, finite everywhere
    table: tuned.Table
    launch: Launch
    ranks: Ranks | None = None

    # Hot: captured once per bucket, so Python's share is paid at start. Budget: the floor of gpu floors in bench.
    def forward(self, inputs: Inputs, kind: Kind, room: Buffers, sampled_ids: Tensor | None = None) -> Tensor:
        """Write the rows' KV; [sampled, vocab] float32 logits, the room's. `sampled_ids`: the step before's."""
        room = room.first(len(inputs.ids))
        weights = self.weights
        rows.embed_into(
            inputs.ids, inputs.positions, weights.embedding, weights.frequencies, room.x, inputs.step.turns,
            inputs.sources, sampled_ids,
        )  # fmt: skip
        has_chunks = kind.chunk_tiles_max > 0
        paged.run_plan(self.shape, inputs.step, room.lists, kind.has_shared, has_chunks)
        pool_map = paged.pool_map(self.shape, self.pool) if has_chunks else None
        for number, layer in enumerate(weights.layers):
            self._attention(number, layer, inputs.step, kind, room, pool_map)
            self._add(self._gated(layer, room), layer.down, room)
        sampled = len(inputs.sample_rows)
        normed = rows.rms_norm(room.x, room.normed[:sampled], weights.config.norm_eps, weights.norm, inputs.sample_rows)
        logits = room.logits[:sampled]
        self._product("plain", normed, weights.head, logits, room, is_first=True)
        return logits

    def _attention(self, number: int, layer: GpuLayer, step: Step, kind: Kind, room: Buffers, pool_map: Any) -> None:
        kv, shape = self.shape.layout.layer(self.pool, number), self.shape
        # The first product after the plan waits for all of it: later kernels read the plan before their own wait.
        self._product("norm", room.x, layer.qkv, room.qkv, room, layer.qkv_bias, is_first=number == 0)
        norms = (layer.q_norm, layer.k_norm)
        if kind.chunk_tiles_max:
            paged.run_rope_write(shape, step, kind.first_chunk_row, room.qkv, kv, *norms)
            paged.run_prefill(
                shape, step, room.lists, kind.chunk_tiles_max, room.qkv, pool_map, number, room.attended,
                kind.chunk_parts,
            )  # fmt: skip
        if kind.has_shared:
            paged.run_attend(shape, step, room.lists, self.launch, room.qkv, kv, room.attended, *norms, is_shared=True)
        if kind.first_chunk_row:
            paged.run_attend(shape, step, room.lists, self.launch, room.qkv, kv, room.attended, *norms)
        if kind.has_parts or kind.has_shared:
            paged.run_merge(shape, step, room.lists, self.launch, room.attended)
        self._add(room.attended, layer.out, room)

    def _gated(self, layer: GpuLayer, room: Buffers) -> Tensor | Scaled:
        """silu(gate) * up; rounded at once where the library multiplies both, in 8 bits."""
        x, weight, down = room.x, layer.gate_up, layer.down
        if isinstance(weight, Scaled) and isinstance(down, Scaled):
            before = self._choice("gated", len(x), room.mid.shape[1], x.shape[1], weight)
            behind = self._choice("residual", len(x), x.shape[1], room.mid.shape[1], down)
            if before.kernel == behind.kernel == "cublas":
                return room.wide.rounding.gated(fp8.gate_up(x, weight, room.wide, self.weights.config.norm_eps))
        self._product("gated", x, weight, room.mid, room)
        return room.mid

    def _add(self, x: Tensor | Scaled, weight: Weight, room: Buffers) -> None:
        """room.x += x @ weight.T, over all ranks."""
        if self.ranks is None:
            self._product("residual", x, weight, room.x, room, residual=room.x)
            return
        part = self.ranks.part(room.x)
        self._product("residual", x, weight, part, room, residual=self.ranks.term(room.x))
        self.ranks.sum_into(room.x, part)

    def _product(
        self, role: tuned.Role, x: Tensor | Scaled, weight: Weight, out: Tensor, room: Buffers,
        bias: Tensor | None = None, *, is_first: bool = False, residual: Tensor | None = None,
    ) -> None:  # fmt: skip
        """out = epilogue(x @ weight.T); `residual` is added, and may be what out holds."""
        eps = self.weights.config.norm_eps
        if isinstance(x, Scaled):
            assert isinstance(weight, Scaled)
            fp8.product(role, x, weight, out, room.wide, eps, bias, residual)
            return
        choice = self._choice(role, len(x), out.shape[1], x.shape[1], weight)
        if choice.kernel == "cublas":
            library_product(role, x, weight, out, room, eps, bias, residual)
            return
        if choice.is_norm_apart:
            x, role = rows.rms_norm(x, room.normed, eps), "gated" if role == "gated" else "plain"
        has_norm = role in ("norm", "gated") and not choice.is_norm_apart
        epilogue = Epilogue(eps if has_norm else None, role == "gated")
        choice = replace(choice, pdl=0) if is_first else choice
        linear(x, weight, out, choice, room.scratch, epilogue, bias, residual)

    def _choice(self, role: tuned.Role, row_count: int, outputs: int, columns: int, weight: Weight) -> tuned.Choice:
        return tuned.choose(self.table, role, row_count, outputs, columns, is_fp8=isinstance(weight, Scaled))


def library_product(
    role: tuned.Role, x: Tensor, weight: Weight, out: Tensor, room: Buffers, eps: float, bias: Tensor | None,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    """The same by cuBLAS, with the row kernels that an epilogue of ours replaces."""
    if isinstance(weight, Scaled):
        fp8.product(role, x, weight, out, room.wide, eps, bias, residual)
    elif residual is not None:
        torch.addmm(residual, x, weight.t(), out=out)
    elif role == "plain":
        if x.is_cuda:
            torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
        else:
            out.copy_(torch.mm(x, weight.t()))
    elif role == "gated":
        torch.mm(rows.rms_norm(x, room.normed, eps), weight.t(), out=room.gate_up)
        rows.gated(room.gate_up, out)
    else:
        torch.mm(rows.rms_norm(x, room.normed, eps), weight.t(), out=out)
        if bias is not None:
            out += bias


def shape_of(config: ModelConfig, block_tokens: int, few_rows: int = 1, *, is_kv_fp8: bool = False) -> Shape:
    """What the attention kernels are compiled for."""
    return Shape(
        config.heads, config.kv_heads, config.head_dim, config.layers, block_tokens, config.norm_eps,
        config.has_qk_norm, few_rows, is_kv_fp8=is_kv_fp8,
    )  # fmt: skip


def widened(weights: Weights) -> Weights:
    """The same numbers in the embedding's dtype: twice the memory, and products that every card has."""

    def layer(one: GpuLayer) -> GpuLayer:
        wide = {name: scaled.widened(getattr(one, name), weights.embedding.dtype) for name in PROJECTIONS}
        return replace(one, **wide)

    return replace(weights, layers=tuple(layer(one) for one in weights.layers))


def part_of(layer: GpuLayer, config: ModelConfig, shard: Shard) -> GpuLayer:
    """A rank's part of a layer of this model, whose projections are plain numbers."""
    heads, bias = (config.q_width, config.kv_width, config.kv_width), layer.qkv_bias
    return replace(
        layer, qkv=shard.rows(scaled.plain(layer.qkv), *heads),
        qkv_bias=None if bias is None else shard.rows(bias, *heads), out=shard.columns(scaled.plain(layer.out)),
        gate_up=shard.rows(scaled.plain(layer.gate_up), config.ffn, config.ffn),
        down=shard.columns(scaled.plain(layer.down)),
    )  # fmt: skip


def rounded(layer: GpuLayer) -> GpuLayer:
    """The same with projections of 8 bits."""

    def stored(weight: Weight) -> Weight:
        return scaled.stored(scaled.plain(weight), scaled.plain(weight).dtype, is_fp8=True)

    return replace(
        layer, qkv=stored(layer.qkv), out=stored(layer.out), gate_up=stored(layer.gate_up), down=stored(layer.down)
    )


def random_weights(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0, shard: Shard = WHOLE,
    *, is_fp8: bool = False,
) -> Weights:  # fmt: skip
    """Normal weights of transformers' own initial scale, made on the device: for figures where no text is read. Parts
    are those of one model: each rank makes all numbers and keeps its own."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)  # meta: shapes alone

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, 0.02, generator=generator)

    ones = torch.ones(config.head_dim, device=device, dtype=dtype) if config.has_qk_norm else None

    def layer() -> GpuLayer:
        whole = GpuLayer(
            normal(config.q_width + 2 * config.kv_width, config.hidden), None, ones, ones,
            normal(config.hidden, config.q_width), normal(2 * config.ffn, config.hidden),
            normal(config.hidden, config.ffn),
        )  # fmt: skip
        part = part_of(whole, config, shard)
        return rounded(part) if is_fp8 else part

    layers = tuple(layer() for _ in range(config.layers))
    embedding = normal(config.vocab_size, config.hidden)
    head = embedding if config.is_head_tied else normal(config.vocab_size, config.hidden)
    norm = torch.ones(config.hidden, device=device, dtype=dtype)
    return Weights(shard.config(config), embedding, layers, norm, head, rope_frequencies(config).to(device))
