"""Paged attention: decode by batch, context, part size and launch; verify, shared prefixes and chunks; beside cuDNN.

Owns the pools and steps that are timed. Every timing is of a kernel that agreed with its oracle in this run."""

from __future__ import annotations

import itertools
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.nn import functional

from bench.gpu_timing import BF16, CUDA, ceilings, error, microseconds
from engine.kernels import paged, plan, ref
from engine.kernels.layout import LayerKv
from engine.kernels.paged import Launch, Shape, Step

SHAPES = {
    "8b": Shape(32, 8, 128, 32, 64, 1e-5, has_qk_norm=False),
    "0.6b": Shape(16, 8, 128, 28, 64, 1e-6, has_qk_norm=True),
}
SHAPES |= {f"{name}-fp8kv": replace(shape, is_kv_fp8=True) for name, shape in SHAPES.items()}


class Pool:
    """KV memory of one model with random contents, and steps over it."""

    def __init__(self, shape: Shape, gib: float):
        self.shape = shape
        self.blocks = int(gib * 2**30 / shape.layout.block_bytes(BF16))
        self.memory = shape.layout.pool(self.blocks, BF16, CUDA)
        for first in range(0, self.blocks, 64):
            for number in range(shape.layers):
                layer = shape.layout.layer(self.memory[first : first + 64], number)
                layer.numbers.copy_(torch.randn(layer.numbers.shape, device=CUDA))
                if layer.scales is not None:
                    ref.halves(layer.scales).fill_(1.0)
        self.norm = torch.ones(shape.head_dim, device=CUDA)

    @property
    def token_bytes(self) -> float:
        """Of one token in one layer."""
        return self.shape.layout.block_bytes(BF16) / self.shape.block_tokens / self.shape.layers

    def layer(self, number: int) -> LayerKv:
        """One layer's memory."""
        return self.shape.layout.layer(self.memory, number)

    def step(self, contexts: list[int], row_counts: list[int], shared: int = 0, group: int = 1) -> Step:
        """Random block tables (blocks repeat when the pool is short); groups of `group` share their first tokens."""
        tokens = self.shape.block_tokens
        widest = math.ceil(max(contexts) / tokens) + 1
        need = len(contexts) * widest
        ids = torch.cat([torch.randperm(self.blocks, device=CUDA) for _ in range(math.ceil(need / self.blocks))])[:need]
        table = ids.int().view(len(contexts), widest) % (self.blocks - len(contexts))
        for number, context in enumerate(contexts):  # the block written to is nobody else's, also in a pool too short
            table[number, (context - 1) // tokens] = self.blocks - 1 - number
        for first in range(0, len(contexts), group if shared else len(contexts)):
            table[first : first + group, : shared // tokens] = table[first, : shared // tokens].clone()
        counts = torch.tensor(row_counts)
        positions = torch.cat([torch.arange(c - r, c) for c, r in zip(contexts, row_counts, strict=True)])
        owner = torch.repeat_interleave(torch.arange(len(contexts)), counts)
        slots = table.cpu()[owner, positions // tokens].long() * tokens + positions % tokens
        frequencies = 1e6 ** (-torch.arange(0, self.shape.head_dim, 2) / self.shape.head_dim)
        leads = torch.arange(len(contexts)) // group * group
        return Step(
            torch.cat([torch.zeros(1), counts.cumsum(0)]).int().to(CUDA), torch.tensor(contexts).int().to(CUDA), table,
            slots.int().to(CUDA), ref.turn(positions, frequencies).to(CUDA),
            torch.full((len(contexts),), shared).int().to(CUDA), leads.int().to(CUDA),
            torch.full((1,), plan.WHOLE).int().to(CUDA),
        )  # fmt: skip


def attend_time(
    pool: Pool, step: Step, launch: Launch, size: int, few_rows: int = 1, only: str = "", checked: bool = False
) -> tuple[float, float]:
    """Microseconds a layer with KV in parts of `size`, and the error of one layer (0 when not checked). `only` times
    one of "shared" and "private"; a step with a shared prefix runs both."""
    shape = replace(pool.shape, few_rows=few_rows)
    row_count = int(step.row_starts[-1])
    lists = paged.work_lists(shape, len(step.contexts), row_count, 1 << 13, CUDA)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = torch.randn(row_count, width, device=CUDA, dtype=BF16)
    out = torch.full((row_count, shape.heads, shape.head_dim), math.nan, device=CUDA, dtype=BF16)
    norms = (pool.norm, pool.norm) if shape.has_qk_norm else (None, None)
    has_shared = bool(step.shared.any()) and only != "alone"
    has_parts = has_shared or size < int(step.contexts.max())
    step.part_size.fill_(size)
    paged.run_plan(shape, step, lists, has_shared)

    def run(layer: int) -> None:
        if has_shared and only != "private":
            paged.run_attend(shape, step, lists, launch, qkv, pool.layer(layer), out, *norms, is_shared=True)
        if only != "shared":
            paged.run_attend(shape, step, lists, launch, qkv, pool.layer(layer), out, *norms)
        if (has_parts and not has_shared) or (has_shared and not only):
            paged.run_merge(shape, step, lists, launch, out)

    wrong = 0.0
    if checked:
        run(3)
        queries, _, _ = ref.split_heads(qkv, step.turns, shape.heads, shape.kv_heads, shape.norm_eps, *norms)
        some = sorted({0, len(step.contexts) // 2, len(step.contexts) - 1})
        for number in some:
            start, end = int(step.row_starts[number]), int(step.row_starts[number + 1])
            wanted, _ = ref.attend(
                queries[start:end], ref.read(pool.layer(3)), step.table[number : number + 1],
                torch.tensor([0, end - start]), step.contexts[number : number + 1], shape.head_dim**-0.5,
            )  # fmt: skip
            wrong = max(wrong, error(out[start:end], wanted))
    stride = max(1, shape.layers // 8) if len(step.contexts) * int(step.contexts[0]) > 200_000 else 1
    return microseconds([lambda n=n: run(n) for n in range(0, shape.layers, stride)]), wrong


DEEP = Launch(264, stages=4)
LAUNCHES = [
    DEEP, Launch(264, stages=3), Launch(264, stages=4, is_ahead=True), Launch(396, stages=3, registers=168),
    Launch(528, stages=2, registers=128), Launch(528, warps=2, stages=2), Launch(396, warps=2, stages=3),
    Launch(264, stages=6), Launch(528, stages=3, registers=128),
]  # fmt: skip
DECODES = [(1, 576), (8, 576), (16, 576), (32, 576), (64, 576), (128, 576), (256, 576), (1, 2048), (8, 2048),
           (64, 2048), (256, 2048), (1, 32768), (8, 32768)]  # fmt: skip


def attend_section(models: list[str], deadline_s: float) -> dict[str, Any]:
    """Decode by batch, context, part size and launch; verify rows; shared prefixes."""
    table: list[list[Any]] = []
    for model in (name for name in models if name in SHAPES):
        pool = Pool(SHAPES[model], 30)
        token_bytes = pool.token_bytes
        for batch, context in DECODES if model.startswith("8b") else DECODES[:6]:
            if time.time() > deadline_s:
                print("attend: out of time at", model, batch, context)
                return {"attend": table}
            step = pool.step([context] * batch, [1] * batch)
            auto = plan.part_tokens(np.full(batch, context - 1), pool.shape.kv_heads)
            tries = [(launch, auto) for launch in LAUNCHES]
            tries += [(DEEP, size) for size in plan.SIZES if size != auto and batch * context // size <= 4096]
            cell: dict[str, float] = {}
            for launch, size in tries:
                ahead = "a" if launch.is_ahead else ""
                name = f"{launch.programs}/w{launch.warps}/s{launch.stages}{ahead}/p{min(size, 9999)}"
                try:
                    time_us, wrong = attend_time(pool, step, launch, size, checked=True)
                except Exception as problem:  # border: a launch that does not fit is a result  # noqa: BLE001
                    print("attend", name, repr(problem)[:200], flush=True)
                    continue
                cell[name] = round(time_us, 2)
                if not wrong < 1e-2:
                    print("WRONG", model, batch, context, name, wrong, flush=True)
            floor = batch * context * token_bytes / ceilings().read_bytes_s * 1e6
            best = min(cell, key=lambda k: cell[k])
            table.append([model, "decode", batch, context, round(floor, 1), cell])
            rate = batch * context * token_bytes / cell[best] / 1e3
            print(
                f"{model} decode {batch} x {context}: floor {floor:.1f}, best {cell[best]} {best} "
                f"({rate:.0f} GB/s) {cell}",
                flush=True,
            )
        if model.startswith("8b"):
            table += special_attends(pool)
        del pool
        torch.cuda.empty_cache()
    return {"attend": table}


def special_attends(pool: Pool) -> list[list[Any]]:
    """Verify rows, ragged lengths, shared prefixes, the plan kernel itself."""
    found: list[list[Any]] = []
    whole = plan.WHOLE

    def note(name: str, value: tuple[float, float]) -> None:
        found.append(["8b", name, round(value[0], 2), value[1]])
        print("8b", name, f"{value[0]:.1f} us error {value[1]:.1e}", flush=True)

    note("verify 64 x 576, 4 rows", attend_time(pool, pool.step([576] * 64, [4] * 64), DEEP, whole, 4, checked=True))
    note("verify 1 x 576, 4 rows", attend_time(pool, pool.step([576], [4]), DEEP, 64, 4, checked=True))
    ragged = [64 * (1 + 7 * number % 40) for number in range(64)]
    for size in (256, 1024, whole):
        note(f"ragged 64 x 64..2560 p{size}", attend_time(pool, pool.step(ragged, [1] * 64), DEEP, size, checked=True))
    for groups, members in ((8, 32), (4, 4), (1, 16)):
        contexts = [2048 + 128 + number % 64 for number in range(groups * members)]
        shared = pool.step(contexts, [1] * len(contexts), shared=2048, group=members)
        for only in ("alone", "", "shared", "private"):
            checked = only in ("", "alone")
            time_us = attend_time(pool, shared, DEEP, whole, only=only, checked=checked)
            note(f"share {groups} x {members}, {only or 'grouped'}", time_us)
    for batch, context in ((1, 576), (256, 576), (256, 2048)):
        step = pool.step([context] * batch, [1] * batch)
        lists = paged.work_lists(pool.shape, batch, batch, 1 << 13, CUDA)
        note(f"plan {batch} x {context}", (microseconds([lambda: paged.run_plan(pool.shape, step, lists)] * 20), 0.0))
    return found


def prefill_section(models: list[str], deadline_s: float) -> dict[str, Any]:
    """Chunks at offsets against cuDNN's causal attention over contiguous keys, TFLOP/s."""
    table: list[list[Any]] = []
    cases = [([2048], [2048]), ([8192], [8192]), ([32768], [32768]), ([32768], [2048]), ([512] * 4, [512] * 4)]
    pools = [(name, Pool(SHAPES[name], 12)) for name in models if name in SHAPES and name.startswith("8b")]
    for (model, pool), (contexts, row_counts) in itertools.product(pools, cases):
        if time.time() > deadline_s:
            print("prefill: out of time")
            break
        row: dict[str, Any] = {"model": model}
        flop = sum(4 * 32 * 128 * r * (c - (r - 1) / 2) for c, r in zip(contexts, row_counts, strict=True))
        for pack in (1, 4):
            time_us, wrong = prefill_time(replace(pool.shape, pack_max=pack), pool, contexts, row_counts)
            row[f"pack {pack}"] = [round(time_us, 1), round(flop / time_us / 1e6), wrong]
            if not wrong < 1e-2:
                print("WRONG prefill", contexts, row_counts, pack, wrong, flush=True)
        if contexts == row_counts:
            row["cudnn"] = cudnn_time(contexts, flop)
        table.append([contexts[0], row_counts[0], len(contexts), row])
        print("prefill", len(contexts), "x", row_counts[0], "rows at context", contexts[0], row, flush=True)
    return {"prefill": table}


def prefill_time(shape: Shape, pool: Pool, contexts: list[int], row_counts: list[int]) -> tuple[float, float]:
    """Microseconds a layer without the writing kernel, and the error of the last 64 rows."""
    step = pool.step(contexts, row_counts)
    count = sum(row_counts)
    lists = paged.work_lists(shape, len(contexts), count, 1024, CUDA)
    qkv = torch.randn(count, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, device=CUDA, dtype=BF16)
    out = torch.full((count, shape.heads, shape.head_dim), math.nan, device=CUDA, dtype=BF16)
    pool_map = paged.pool_map(shape, pool.memory)
    paged.run_plan(shape, step, lists, has_chunks=True)
    paged.run_rope_write(shape, step, 0, qkv, pool.layer(3), None, None)
    tiles = len(lists.chunk_items)

    def run(layer: int) -> None:
        paged.run_prefill(shape, step, lists, tiles, qkv, pool_map, layer, out)

    run(3)
    queries = qkv.view(count, -1, shape.head_dim)[-64:, : shape.heads]
    wanted, _ = ref.attend(
        queries, ref.read(pool.layer(3)), step.table[-1:], torch.tensor([0, 64]), step.contexts[-1:],
        shape.head_dim**-0.5,
    )  # fmt: skip
    wrong = error(out[-64:], wanted)
    return microseconds([lambda n=n: run(n) for n in range(8)]), max(wrong, 0.0 if bool(out.isfinite().all()) else 9.0)


def cudnn_time(contexts: list[int], flop: float) -> list[float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(len(contexts), 32, contexts[0], 128, device=CUDA, dtype=BF16)
    k = torch.randn(len(contexts), 8, contexts[0], 128, device=CUDA, dtype=BF16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        time_us = microseconds(
            [lambda: functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)]
        )
    return [round(time_us, 1), round(flop / time_us / 1e6)]
