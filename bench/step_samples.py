"""Real steps of the GPU engine as (features, seconds): the simulator's clock, and what the step model is judged by.

    python3 bench/step_samples.py MODEL_DIR [--samples 5000] [--out DIR]

Owns the draw of shapes: decodes alone, chunks alone, both; contexts log-uniform. One JSON line a sample; where the
seconds were up the same command goes on, on a card of the same name."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from engine.compute import gpu_build
from engine.compute.arrange import CHUNK_BUCKETS, DECODE_BUCKETS
from engine.compute.calibrate import Shape, batch_of
from engine.config import GPU_BLOCK_TOKENS, GPU_PRIOR, GPU_ROWS_MAX, GPU_SEQUENCES_MAX
from loadgen.sim.hardware import card_of
from policies.costs import StepFit

CONTEXTS = (32, 32_768)
REPEATS = 3  # of each drawn shape: the first may be launched kernel by kernel, and is not kept


def draw(random: np.random.Generator) -> Shape:
    """Half decodes alone, a quarter chunks alone, a quarter both."""
    kind = random.integers(4)
    context = int(np.exp(random.uniform(*np.log(CONTEXTS))))
    decodes = int(random.choice(DECODE_BUCKETS)) if kind < 3 else 0
    chunk = int(random.choice(CHUNK_BUCKETS)) if kind > 1 else 0
    return Shape(decodes, chunk, context if decodes or random.integers(2) else 0)


def begun(path: Path, head: str) -> int:
    """Samples kept from before; a file of another card or model, or none, begins anew."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if lines and _made_by(lines[0]) == _made_by(head) and all(line.endswith("]") for line in lines[1:]):
        return len(lines) - 1
    path.write_text(head + "\n", encoding="utf-8")
    return 0


def _made_by(head: str) -> tuple[str, str]:
    """The card and the model; how much memory was left beside them differs a little from run to run."""
    told = json.loads(head)
    return told["device"], told["model"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after so long")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    device = torch.device("cuda:0")
    runner = gpu_build.load(options.model, device, block_tokens=GPU_BLOCK_TOKENS, kv_bytes=0, sequences_max=256)
    fit = StepFit(GPU_PRIOR)
    until, errors = time.monotonic() + options.seconds, []
    options.out.mkdir(parents=True, exist_ok=True)
    device_name, model_name = torch.cuda.get_device_name(), options.model.name
    path = options.out / f"step_samples-{model_name}-{card_of(device_name)}.jsonl"
    head = json.dumps(
        {
            "device": device_name,
            "model": model_name,
            "block_tokens": GPU_BLOCK_TOKENS,
            "kv_blocks": runner.blocks_total,
            "context_max": runner.model.context_max,
        }
    )
    count = begun(path, head)
    random = np.random.default_rng(count)
    with path.open("a", encoding="utf-8") as file:
        while count < options.samples and time.monotonic() < until:
            shape = draw(random)
            if shape.decodes + bool(shape.chunk) > GPU_SEQUENCES_MAX or shape.chunk > GPU_ROWS_MAX:
                continue
            if shape.context * max(1, shape.decodes) > runner.blocks_total * GPU_BLOCK_TOKENS:
                continue
            batch, features = batch_of(shape, GPU_BLOCK_TOKENS, runner.blocks_total)
            runner.run(batch)
            for _ in range(REPEATS):
                taken = runner.run(batch).seconds
                errors.append(abs(fit.model.step_s(features) / taken - 1))
                fit.observe(features, taken)
                file.write(json.dumps([*features, round(taken, 6)]) + "\n")
                count += 1
    late = errors[len(errors) // 2 :]
    if not late:
        sys.exit(f"{count} samples in {path}: nothing to add")
    print(f"{count} samples in {path}; the learned model errs by {statistics.median(late):.1%} in the median, ")
    print(f"{np.quantile(late, 0.9):.1%} at p90 (second half, each predicted before it was seen)")


if __name__ == "__main__":
    main()
