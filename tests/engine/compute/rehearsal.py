"""Run in a process of its own, without Triton's interpreter: what the list of kernels to compile must hold, as JSON.

python -m tests.engine.compute.rehearsal listed | compiled"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from triton import knobs
from triton.runtime import driver

from engine.compute import arrange, precompile
from engine.compute.calibrate import Shape, batch_of
from engine.compute.gpu_runner import GpuRunner
from engine.compute.precompile import DTYPE, NOWHERE, Absent, Special, noted, specials
from engine.compute.warm import mixed
from engine.kernels import rows
from engine.models import config as model_config
from engine.models import gpu
from engine.models.config import ModelConfig
from engine.step import StepBatch

CARD = "NVIDIA H100 80GB HBM3"
SMALL = ModelConfig(128, 2, 6, 2, 32, 192, 256, 512, 1e-5, 1e4, None, True, True, ())
SHAPES = Path(__file__).parents[3] / "bench" / "models"
DRAWN = 150
Found = dict[tuple[str, str, str], Special]


def drawn(random: np.random.Generator, block_tokens: int, context_max: int) -> StepBatch:
    """Any step a scheduler may ask for: decodes that share a beginning or do not, chunks beside them or not."""
    decodes, chunked = int(2 ** random.uniform(0, 8)), int(random.choice([0, 0, 1, 2, 7, 32]))
    context = int(2 ** random.uniform(1, np.log2(context_max - 1)))
    if not chunked:
        return batch_of(Shape(decodes, 0, context), block_tokens, int(random.choice([1, 1 << 16])))[0]
    decodes *= int(random.integers(2))
    rows_each = int(random.integers(2, min(4096 // chunked, context_max) + 1))
    past = int(random.choice([0, min(context, context_max - rows_each)]))
    batch = mixed(decodes, rows_each * chunked, chunked, block_tokens, 256, context=context, past=past)
    apart = np.arange(len(batch.contexts), dtype=np.int32)[:, None] * int(random.integers(2))
    return replace(batch, block_tables=batch.block_tables + apart)


def listed() -> dict[str, object]:
    """Specialisations launched by drawn steps and not in the list, of both benchmarked shapes, a small one, and
    one with weights of 8 bits."""
    missing: dict[str, object] = {}
    llama, qwen = (model_config.read(SHAPES / name) for name in ("llama-8b", "qwen3-0.6b"))
    models = {
        "small": (SMALL, False, False), "small, fp8 KV": (SMALL, False, True), "llama": (llama, False, False),
        "qwen": (qwen, False, False), "llama, fp8 weights": (llama, True, False),
    }  # fmt: skip
    for name, (config, is_fp8, is_kv_fp8) in models.items():
        known = {one.key for one in specials(config, CARD, 64, 256, has_fp8_weights=is_fp8, is_kv_fp8=is_kv_fp8)}
        found: Found = {}
        random = np.random.default_rng(1)
        with noted(found), torch.inference_mode():
            weights = gpu.random_weights(replace(config, layers=2), NOWHERE, DTYPE, is_fp8=is_fp8)
            runner = GpuRunner(replace(weights, config=config), 64, 47, 256, card=CARD, is_kv_fp8=is_kv_fp8)
            for _ in range(DRAWN):
                runner.rehearse(drawn(random, 64, config.context_max))
        missing[name] = {
            "missing": sorted(map(str, found.keys() - known)),
            "launched": len(found),
            "listed": len(known),
        }
    return missing


def served() -> dict[str, object]:
    """The same of runners over real memory that take whole steps, their start and self-check included."""
    missing: list[str] = []
    launched = []
    for is_kv_fp8 in (False, True):
        known = {one.key for one in specials(SMALL, CARD, 16, 8, is_kv_fp8=is_kv_fp8)}
        found: Found = {}
        with noted(found), torch.inference_mode():
            weights = gpu.random_weights(SMALL, torch.device("cpu"), DTYPE)
            GpuRunner(weights, 16, 41, 8, card=CARD, is_kv_fp8=is_kv_fp8).warm(arrange.bucket(8))
        missing += map(str, found.keys() - known)
        launched.append(len(found))
    return {"missing": sorted(missing), "launched": min(launched)}


class StopError(Exception):
    """What a launch raises once its kernel was looked up."""


def compiled() -> dict[str, object]:
    """Whether a launch finds in the cache what other processes compiled from the list."""
    wanted = [one for one in specials(SMALL, CARD, 16, 8) if one.kernel in ("gate_rows", "embed", "norm_rows")]
    precompile.compile_found(lambda tell: [tell(one) for one in wanted], 2)
    hits = []

    def listener(*, cache_hit: bool, **_: object) -> None:
        hits.append(cache_hit)
        raise StopError

    knobs.compilation.listener = listener
    wide = torch.zeros(64, 2 * SMALL.ffn, device=NOWHERE, dtype=DTYPE)
    for launch in (lambda: rows.gated(wide, wide[:, : SMALL.ffn]), lambda: rows.gated(wide.float(), wide)):
        with suppress(StopError):
            launch()
    return {"kernels": len(wanted), "hits": hits}


if __name__ == "__main__":
    driver.set_active(Absent(90))
    logging.disable(logging.WARNING)
    print(json.dumps({"listed": listed, "served": served, "compiled": compiled}[sys.argv[1]]()))
