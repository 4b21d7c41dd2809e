"""What a model's answers lose to 8 bits on a card: logits of this documentation against the same card's bfloat16.

    python3 bench/gpu_fp8.py MODEL_DIR [--tokens 256] [--texts 3] [--out DIR]

Owns the comparison, by rows a step: few are multiplied by our own kernels, many by the library, activations rounded
too. Every position's logits count. Says nothing of speed. Prints its table last."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.fp8_error import NAMES, Row, compared
from engine.compute import gpu_build
from engine.compute.gpu_runner import GpuRunner
from engine.config import GPU_BLOCK_TOKENS
from engine.kernels.tuned import slug
from engine.step import StepBatch
from engine.wire import Sampling

ROWS = (64, 256)
VARIANTS: dict[str, dict[str, bool]] = {
    "bf16": {}, "fp8 weights": {"has_fp8_weights": True}, "fp8 KV": {"is_kv_fp8": True},
    "fp8 weights and KV": {"has_fp8_weights": True, "is_kv_fp8": True},
}  # fmt: skip


def batch_of(ids: list[int], start: int, rows: int) -> StepBatch:
    """The next rows of one sequence in the first blocks, all of them sampled."""
    positions = np.arange(start, min(start + rows, len(ids)), dtype=np.int32)
    blocks = np.arange(-(-len(ids) // GPU_BLOCK_TOKENS), dtype=np.int32)
    count = len(positions)
    return StepBatch(
        np.array(ids[start : start + rows], np.int32), positions, positions.astype(np.int64),
        np.array([0, count], np.int32), np.array([start + count], np.int32), blocks[None],
        np.arange(count, dtype=np.int32), (Sampling(temperature=0.0),) * count, positions,
    )  # fmt: skip


def logits(runner: GpuRunner, texts: list[list[int]], rows: int) -> Tensor:
    """[positions, vocab] of all texts, read `rows` at a time."""
    parts = [runner.logits(batch_of(ids, start, rows)).cpu() for ids in texts for start in range(0, len(ids), rows)]
    return torch.cat(parts)


def loaded(model: Path, options: dict[str, bool]) -> GpuRunner:
    """A runner of one variant."""
    device = torch.device("cuda:0")
    runner = gpu_build.load(
        model, device, block_tokens=GPU_BLOCK_TOKENS, kv_bytes=2**30, sequences_max=max(ROWS), **options
    )
    if not isinstance(runner, GpuRunner):
        sys.exit("the kernels failed their self-check on this card; see the log")
    return runner


def table(found: dict[int, list[Row]]) -> str:
    """One row a variant and rows a step."""
    lines = ["| against bf16 | rows a step | error, 2-norm | same likeliest | widest gap where not | KL, nats |"]
    lines.append("| --- " * 6 + "|")
    for rows, variants in found.items():
        for row in variants:
            cells = f"{row.relative_error:.2%} | {row.same_first:.1%} | {row.widest_gap:.2f} | {row.divergence:.4f}"
            lines.append(f"| {row.variant} | {rows} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, default=3, help="so many documents of docs/")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    paths = [Path(__file__).parents[1] / "docs" / f"{name}.md" for name in NAMES[: options.texts]]
    texts = [tokenizer.encode(path.read_text(encoding="utf-8")).ids[: options.tokens] for path in paths]
    said: dict[str, dict[int, Tensor]] = {}
    for name, chosen in VARIANTS.items():
        runner = loaded(options.model, chosen)
        said[name] = {rows: logits(runner, texts, rows) for rows in ROWS}
        del runner
        torch.cuda.empty_cache()
    others = [name for name in VARIANTS if name != "bf16"]
    found = {rows: [compared(name, said["bf16"][rows], said[name][rows]) for name in others] for rows in ROWS}
    found[ROWS[1]].append(compared(f"bf16, {ROWS[0]} rows", said["bf16"][ROWS[1]], said["bf16"][ROWS[0]]))
    device = torch.cuda.get_device_name()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = {"device": device, "positions": sum(map(len, texts))}
    kept |= {f"{rows} rows a step": [asdict(row) for row in variants] for rows, variants in found.items()}
    (options.out / f"gpu_fp8-{slug(device)}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"{device}, {kept['positions']} positions\n{table(found)}")


if __name__ == "__main__":
    main()
