"""Whole steps of the GPU decoder at random weights: captured, replayed, against the floor of bytes and operations.

    python3 bench/gpu_step.py [--models 8b,0.6b] [--out DIR]

Owns decode steps by batch (graph alone, and with host inputs, sampling and read-back), mixed steps, prefill, and where
the time of a step goes. Writes DIR/gpu_step.json, prints its table last."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from bench.gpu_products import compile_all
from bench.gpu_timing import BF16, CUDA, captured, microseconds, precompile
from engine.graphs import StepInputs
from engine.kernels import plan, tuned
from engine.kernels.paged import CHUNK_ROWS, Launch
from engine.kernels.sample import Knobs, Sampler
from engine.models import gpu
from engine.models.config import ModelConfig

BLOCK = 64
READ_BYTES_S, FLOP_S = 3.18e12, 790e12
MODELS = {
    "8b": ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 131072, 1e-5, 5e5, None, False, False, ()),
    "0.6b": ModelConfig(1024, 28, 16, 8, 128, 3072, 151936, 40960, 1e-6, 1e6, None, True, True, ()),
}


def floor_ms(config: ModelConfig, rows: int, context: float) -> float:
    """Bytes over the read rate or operations over the matrix rate, whichever is more."""
    linear = config.layers * (
        config.hidden * (config.q_width + 2 * config.kv_width)
        + config.q_width * config.hidden
        + 3 * config.hidden * config.ffn
    )
    head = config.hidden * config.vocab_size
    kv = rows * context * config.kv_bytes_per_token(2)
    return max((2 * (linear + head) + kv) / READ_BYTES_S, 2 * rows * (linear + head) / FLOP_S) * 1e3


class Rig:
    """One model with random weights and KV, and steps over it."""

    def __init__(self, name: str, kv_gib: float):
        self.config = MODELS[name]
        self.weights = gpu.random_weights(self.config, CUDA, BF16)
        shape = gpu.shape_of(self.config, BLOCK)
        block = self.config.kv_bytes_per_token(2) * BLOCK
        size = (int(kv_gib * 2**30 / block), shape.layers, 2, shape.kv_heads, BLOCK, shape.head_dim)
        pool = torch.empty(size, device=CUDA, dtype=BF16)
        for first in range(0, size[0], 64):
            pool[first : first + 64].normal_()
        table = tuned.load(torch.cuda.get_device_name())
        self.decoder = gpu.GpuDecoder(self.weights, shape, pool, table, Launch(264, stages=4))

    def with_pdl(self, pdl: int | None, launch: Launch) -> gpu.GpuDecoder:
        """All own products with this programmatic launch; None keeps the table's."""
        table = self.decoder.table
        if pdl is not None:
            linear = {
                key: {rows: replace(choice, pdl=pdl) for rows, choice in by.items()} for key, by in table.linear.items()
            }
            table = replace(table, linear=linear)
        return replace(self.decoder, table=table, launch=launch)

    def inputs(
        self, decodes: int, context: int, chunks: tuple[tuple[int, int], ...] = ()
    ) -> tuple[StepInputs, dict[str, Any]]:
        """`decodes` rows at `context`, then chunks (rows, context after them)."""
        lengths = [(context, 1)] * decodes + [(after, rows) for rows, after in chunks]
        need = [math.ceil(after / BLOCK) for after, _ in lengths]
        order = np.random.default_rng(0).permutation(len(self.decoder.pool)).astype(np.int32)
        table = np.zeros((len(lengths), max(need)), np.int32)
        taken = 0
        for number, count in enumerate(need):
            table[number, :count] = order[taken : taken + count]
            taken += count
        positions = np.concatenate([np.arange(after - rows, after) for after, rows in lengths]).astype(np.int32)
        owner = np.repeat(np.arange(len(lengths)), [rows for _, rows in lengths])
        starts = np.cumsum([0, *(rows for _, rows in lengths)]).astype(np.int32)
        arrays = {
            "ids": np.random.default_rng(1).integers(0, self.config.vocab_size, len(positions)).astype(np.int32),
            "positions": positions,
            "slots": (table[owner, positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32),
            "row_starts": starts, "contexts": np.array([after for after, _ in lengths], np.int32),
            "sample_rows": starts[1:] - 1, "table": table,
            "part_size": np.array([plan.part_tokens(np.full(decodes, context - 1), self.config.kv_heads)], np.int32),
        }  # fmt: skip
        held = StepInputs.make(len(positions), len(lengths), table.shape[1], len(lengths), self.config.head_dim, CUDA)
        held.write(**arrays)
        return held, arrays

    def room(self, held: StepInputs) -> gpu.Buffers:
        rows, sequences = len(held.inputs.ids), len(held.inputs.step.contexts)
        return gpu.Buffers.make(self.weights, self.decoder.shape, rows, sequences, sequences, 4096)


def decode(rig: Rig, batch: int, context: int) -> dict[str, Any]:
    """Milliseconds of one decode step under each way of launching."""
    held, arrays = rig.inputs(batch, context)
    room, found = rig.room(held), {"floor": round(floor_ms(rig.config, batch, context), 3)}
    deep, many = Launch(264, stages=4), Launch(528, stages=2, registers=128)
    ways = {
        f"{label} {name}": (pdl, replace(launch, pdl=attend_pdl))
        for name, launch in (("deep", deep), ("many", many))
        for label, pdl, attend_pdl in (
            ("none", 0, 0),
            ("early", 1, 1),
            ("late", 2, 2),
            ("table", None, 0),
            ("late+early", 2, 1),
        )
    }
    ways["early ahead"] = (1, replace(deep, pdl=1, is_ahead=True))
    has_parts = int(arrays["part_size"][0]) < context
    kind = gpu.Kind(batch, has_parts=has_parts)
    reference = None
    for name, (pdl, launch) in ways.items():
        decoder = rig.with_pdl(pdl, launch)
        run = lambda d=decoder: d.forward(held.inputs, kind, room)  # noqa: E731
        try:
            found[name] = round(microseconds([run], 5) / 1e3, 3)
        except Exception as problem:  # border: a way that does not fit is a result  # noqa: BLE001
            found[name] = repr(problem)[:120]
            continue
        logits = run()
        if reference is None:
            reference = logits.clone()
        wrong = ((logits - reference).norm() / reference.norm()).item()
        if not wrong < 2e-2:
            found[name + " differs"] = wrong
    found["host loop"] = round(loop_ms(rig, held, arrays, room, kind), 3)
    return found


def loop_ms(
    rig: Rig, held: StepInputs, arrays: dict[str, Any], room: gpu.Buffers, kind: gpu.Kind, steps: int = 40
) -> float:
    """Wall time of a step with inputs sent, sampling and ids read back, one step in flight."""
    batch = kind.first_chunk_row
    decoder = rig.with_pdl(2, Launch(264, stages=4, pdl=2))
    sampler = Sampler.make(batch, rig.config.vocab_size, CUDA)
    columns = [torch.full((batch,), value, device=CUDA) for value in (0.6, 1.0, 0.0)]
    knobs = Knobs(
        columns[0],
        torch.zeros(batch, device=CUDA, dtype=torch.int32),
        columns[1],
        columns[2],
        torch.rand(batch, device=CUDA),
    )
    forward = captured([lambda: decoder.forward(held.inputs, kind, room)])
    sample = captured([lambda: sampler.choose(room.logits[:batch], knobs)])
    answers = [torch.zeros(batch, dtype=torch.int32, pin_memory=True) for _ in range(2)]
    done = [torch.cuda.Event() for _ in range(2)]
    started = 0.0
    for number in range(steps + 10):
        if number == 10:
            torch.cuda.synchronize()
            started = time.perf_counter()
        held.write(**arrays)
        forward.replay()
        sample.replay()
        answers[number % 2].copy_(sampler.ids, non_blocking=True)
        done[number % 2].record()
        if number:
            done[(number - 1) % 2].synchronize()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps * 1e3


def chunked(rig: Rig, decodes: int, chunks: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """Milliseconds of a step with prompt chunks, in a graph."""
    held, _ = rig.inputs(decodes, 576, chunks)
    room = rig.room(held)
    per_tile = CHUNK_ROWS // rig.decoder.shape.pack
    kind = gpu.Kind(decodes, sum(math.ceil(rows / per_tile) for rows, _ in chunks))
    return {"ms": round(microseconds([lambda: rig.decoder.forward(held.inputs, kind, room)], 5) / 1e3, 2)}


def breakdown(rig: Rig, batch: int, context: int) -> dict[str, float]:
    """Microseconds by kernel of one replay without programmatic launch, largest first."""
    held, _ = rig.inputs(batch, context)
    room, decoder = rig.room(held), rig.with_pdl(0, Launch(264, stages=4))
    graph = captured([lambda: decoder.forward(held.inputs, gpu.Kind(batch), room)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    times = {event.key[:40]: round(event.self_device_time_total, 1) for event in profile.key_averages()}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:8])


def all_choices() -> list[tuple[str, int, tuned.Choice]]:
    """Every product kernel of the table under every way of launching."""
    table = tuned.load(torch.cuda.get_device_name())
    found = {
        (role, rows, replace(choice, pdl=pdl))
        for (role, _, _), by_rows in table.linear.items()
        for rows, choice in by_rows.items()
        for pdl in (0, 1, 2)
        if choice.kernel != "cublas"
    }  # fmt: skip
    return sorted(found, key=repr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="8b,0.6b")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--compile")
    options = parser.parse_args()
    if options.compile:
        number, of = options.compile.split("/")
        compile_all(all_choices()[int(number) :: int(of)])
        return
    print("compiled in", round(precompile(__file__, max(1, (os.cpu_count() or 2) - 1)), 1), "s", flush=True)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    path = Path(options.out) / "gpu_step.json"
    for name in options.models.split(","):
        rig = Rig(name, 36)
        for batch, context in ((1, 576), (8, 576), (32, 576), (64, 576), (128, 576), (256, 576), (8, 8192), (1, 32768)):
            found[f"{name} decode {batch} x {context}"] = decode(rig, batch, context)
            print(name, batch, context, found[f"{name} decode {batch} x {context}"], flush=True)
            path.write_text(json.dumps(found, indent=1))
        for batch in (1, 64):
            found[f"{name} kernels {batch}"] = breakdown(rig, batch, 576)
            print(name, "kernels", batch, found[f"{name} kernels {batch}"], flush=True)
        cases = {"prefill 2048": (0, ((2048, 2048),)), "prefill 8 x 256": (0, ((256, 256),) * 8),
                 "64 + 512": (64, ((512, 512),)), "64 + 512 at 16k": (64, ((512, 16896),))}  # fmt: skip
        for label, (decodes, chunks) in cases.items():
            found[f"{name} {label}"] = chunked(rig, decodes, chunks)
            print(name, label, found[f"{name} {label}"], flush=True)
        path.write_text(json.dumps(found, indent=1))
        del rig
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
