"""Whether a model says the same on the GPU as on the CPU: greedy texts, and the logits where they part.

    python3 bench/gpu_text.py MODEL_DIR [--tokens 64] [--out DIR]

Owns the comparison: bfloat16 kernels against float32 torch, token by token; after a first difference a text is left."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from tokenizers import Tokenizer

from engine.compute import gpu_build
from engine.compute.gpu_runner import GpuRunner
from engine.compute.runner import RunnerConfig, TorchRunner
from engine.kernels.tuned import slug
from engine.step import StepBatch
from engine.wire import Sampling

BLOCK = 64
GREEDY = Sampling(temperature=0.0)
PROMPTS = (
    "What is the capital of France?", "Write a haiku about the sea.", "Explain how a bicycle stays upright.",
    "List three uses of a paper clip.", "Who wrote Hamlet?", "Tell me a short story about a lighthouse.",
    "Why is the sky blue?", "How do I boil an egg?",
)  # fmt: skip


def batch_of(ids: list[int], computed: int, block: int) -> StepBatch:
    """Everything of one sequence behind `computed`, in blocks block, block + 1 .."""
    positions = np.arange(computed, len(ids), dtype=np.int32)
    blocks = np.arange(block, block + 8, dtype=np.int32)
    slots = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
    return StepBatch(
        np.array(ids[computed:], np.int32), positions, slots.astype(np.int64),
        np.array([0, len(positions)], np.int32), np.array([len(ids)], np.int32), blocks[None],
        np.array([len(positions) - 1], np.int32), (GREEDY,), np.array([0], np.int32),
        room=np.array([8 * BLOCK], np.int32),
    )  # fmt: skip


def text(runner: GpuRunner | TorchRunner, prompt: list[int], tokens: int, block: int) -> list[int]:
    """Greedy ids."""
    ids, computed = list(prompt), 0
    for _ in range(tokens):
        result = runner.run(batch_of(ids, computed, block))
        computed = len(ids)
        ids.append(int(result.ids[0]))
    return ids[len(prompt) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    torch.set_num_threads(8)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    device = torch.device("cuda:0")
    ours = gpu_build.load(options.model, device, block_tokens=BLOCK, kv_bytes=2**31, sequences_max=8)
    cpu = TorchRunner.load(options.model, RunnerConfig(block_tokens=BLOCK, kv_bytes=2**30))
    same, gaps = 0, []
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids
        first, again = (text(ours, ids, options.tokens, 8 * number) for _ in range(2))
        assert first == again, "the same prompt gave another text"
        wanted = text(cpu, ids, options.tokens, 8 * number)
        print(repr(tokenizer.decode(first)[:90]))
        parted = next((at for at, pair in enumerate(zip(first, wanted, strict=True)) if pair[0] != pair[1]), None)
        if parted is None:
            same += 1
            continue
        logits = cpu.logits(batch_of([*ids, *wanted[:parted]], 0, 8 * number))[0]
        gaps.append(round(float(logits[wanted[parted]] - logits[first[parted]]), 3))
    found = {"device": torch.cuda.get_device_name(), "texts": len(PROMPTS), "tokens": options.tokens, "same": same}
    print(found := found | {"gaps where they part, logits of the CPU": gaps})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"gpu_text-{slug(torch.cuda.get_device_name())}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
