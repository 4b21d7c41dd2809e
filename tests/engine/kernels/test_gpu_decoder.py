"""The GPU decoder computes what the CPU decoder computes, for decode rows and for prompt chunks in one step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.compute.arrange import Arranged, Size, bucket
from engine.compute.graphs import StepInputs
from engine.kernels import tuned
from engine.kernels.paged import Launch
from engine.models import gpu
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, Layer, rope_frequencies
from engine.models.linear import Linear
from engine.models.mlp import Mlp
from engine.models.pages import KVPool
from tests.engine.kernels.attention_case import error

BLOCK = 16


def config(*, has_qk_norm: bool) -> ModelConfig:
    return ModelConfig(128, 2, 6, 2, 32, 192, 256, 512, 1e-5, 1e4, None, has_qk_norm, True, ())


def weights(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> gpu.Weights:
    """Random, with norms and biases that matter."""
    made = gpu.random_weights(model, device, dtype)
    layers = tuple(
        gpu.replace(
            layer,
            qkv=layer.qkv * 4,
            gate_up=layer.gate_up * 4,
            qkv_bias=torch.randn(len(layer.qkv), device=device).to(dtype) / 4,
        )
        for layer in made.layers
    )
    return gpu.replace(made, layers=layers)


def on_cpu(made: gpu.Weights) -> Decoder:
    """The CPU's decoder with the same numbers in float32."""

    def plain(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        return Linear(weight.float().cpu(), None if bias is None else bias.float().cpu())

    def norm(weight: torch.Tensor | None) -> torch.Tensor | None:
        return None if weight is None else weight.float().cpu()

    ones = torch.ones(made.config.hidden)
    layers = tuple(
        Layer(
            ones,
            plain(x.qkv, x.qkv_bias),
            norm(x.q_norm),
            norm(x.k_norm),
            plain(x.out),
            ones,
            Mlp(plain(x.gate_up), plain(x.down)),
        )
        for x in made.layers
    )
    return Decoder(
        made.config,
        made.embedding.float().cpu(),
        layers,
        made.norm.float().cpu(),
        plain(made.head),
        rope_frequencies(made.config),
    )


EMPTY, LIBRARY = tuned.Table.empty("none"), tuned.library("none")


@pytest.mark.parametrize(
    ("has_qk_norm", "is_fp8", "kernels", "error_max"),
    [
        (False, False, EMPTY, 1e-2),
        (True, False, EMPTY, 1e-2),
        (False, True, EMPTY, 1e-2),  # few rows: the same products of wider numbers
        (False, True, LIBRARY, 8e-2),  # activations are of 8 bits too, which the CPU's are not
    ],
    ids=["plain", "qk norm", "fp8 weights", "fp8 products"],
)
def test_a_chunk_then_a_mixed_step_give_the_logits_of_the_cpu(
    has_qk_norm: bool, is_fp8: bool, kernels: tuned.Table, error_max: float, dtype: torch.dtype, device: torch.device
) -> None:
    from engine.step import StepBatch
    from engine.wire import Sampling

    model = config(has_qk_norm=has_qk_norm)
    made = weights(model, dtype, device)
    made = gpu.replace(made, layers=tuple(map(gpu.rounded, made.layers))) if is_fp8 else made
    decoder, pool = on_cpu(gpu.widened(made)), KVPool(model, 12, BLOCK, torch.float32, torch.device("cpu"))
    shape = gpu.shape_of(model, BLOCK)
    memory = torch.zeros(12, model.layers, 2, model.kv_heads, BLOCK, model.head_dim, device=device, dtype=dtype)
    ours = gpu.GpuDecoder(made, shape, memory, kernels, Launch(4))
    prompts = [np.arange(3, 43), np.arange(100, 120)]
    table = np.array([[5, 2, 9, 0], [7, 1, 0, 0]], np.int32)

    def batch(parts: list[tuple[int, int, int]]) -> StepBatch:
        """(sequence, first position, rows), decodes first."""
        positions = np.concatenate([np.arange(first, first + count) for _, first, count in parts]).astype(np.int32)
        owner = np.repeat([sequence for sequence, _, _ in parts], [count for _, _, count in parts])
        ids = np.array([prompts[s][p % len(prompts[s])] for s, p in zip(owner, positions, strict=True)], np.int32)
        starts = np.cumsum([0, *(count for _, _, count in parts)]).astype(np.int32)
        return StepBatch(
            ids, positions, (table[owner, positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int64), starts,
            np.array([first + count for _, first, count in parts], np.int32), table[[s for s, _, _ in parts]],
            starts[1:] - 1, tuple(Sampling() for _ in parts), np.zeros(len(parts), np.int32),
        )  # fmt: skip

    def compare(step: StepBatch, few: int) -> float:
        pages = pool.plan(step)
        hidden = decoder.forward(
            torch.from_numpy(step.ids[pages.order]).long(), torch.from_numpy(step.positions[pages.order]).long(), pages
        )
        back = np.argsort(pages.order)
        wanted = decoder.logits(hidden[torch.from_numpy(back[step.sample_rows])])
        rows, sequences = len(step.ids), len(step.contexts)
        size = Size(rows, sequences, len(step.sample_rows))
        held = StepInputs.make(size, 4, model.head_dim, device)
        arrays = {
            "ids": step.ids, "positions": step.positions, "slots": step.write_slots.astype(np.int32),
            "row_starts": step.row_starts, "contexts": step.contexts, "sample_rows": step.sample_rows,
            "part_size": np.array([BLOCK], np.int32),
        }  # fmt: skip
        held.write(0, Arranged(size, few, rows - few, 0, 0, True, False, step.block_tables, arrays))
        inputs, _ = held.view(size)
        room = gpu.Buffers.make(made, shape, rows, sequences, sequences, 32)
        return error(ours.forward(inputs, gpu.Kind(few, 8 if rows > few else 0), room).cpu(), wanted)

    assert made.has_fp8 == is_fp8
    assert compare(batch([(0, 0, 40)]), 0) < error_max
    assert compare(batch([(0, 40, 1), (1, 0, 20)]), 1) < error_max
    assert compare(batch([(0, 41, 1), (1, 20, 1)]), 2) < error_max


def test_a_bucket_holds_its_rows_and_wastes_little() -> None:
    assert [bucket(rows) for rows in (1, 3, 9, 65, 256)] == [1, 4, 12, 80, 256]
