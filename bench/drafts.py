"""Prompt lookup against plain decoding on one CPU core: tokens/s of the embedded model where there is something to look
up and where there is not.

Owns the comparison: the same engine with and without drafts, one after the other, twice; the text must be the same."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.loading import convert
from engine.step import ModelFacts
from engine.wire import Sampling
from tests.engine.loop import Loop

CODE = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return area(width, height) * depth
"""
TASKS = {
    "edit code": f"Repeat this code and rename area to surface:\n```\n{CODE}{CODE}```",
    "write anew": "Write a story about a lighthouse keeper who finds a letter.",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    task: str
    batch: int
    plain_tokens_per_s: float
    drafted_tokens_per_s: float
    right_share: float  # of the tokens that were drafted
    same_ids: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, default=Path("bench/results/drafts.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = convert.convert(convert.locate(convert.EMBEDDED_NAME), convert.default_cache(), convert.print_progress)
    runner = TorchRunner.load(folder, RunnerConfig(kv_bytes=256 * 2**20))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    facts = ModelFacts("smollm2", "d", "cpu", "float32", runner.model.vocab_size, 8192, runner.model.eos_ids)
    rows = []
    for task, text in TASKS.items():
        ids = tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n").ids
        for batch in args.batches:
            rows.append(_row(runner, facts, ids, task=task, batch=batch, tokens=args.tokens))
            print(rows[-1])
    args.out.write_text(json.dumps({"threads": 1, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _row(runner: TorchRunner, facts: ModelFacts, ids: list[int], *, task: str, batch: int, tokens: int) -> Row:
    best, texts, right_share = {False: 0.0, True: 0.0}, [], 0.0
    for has_drafts in (False, True) * 2:
        loop = Loop(runner, facts, runner.block_tokens, has_drafts=has_drafts, clock=time.monotonic)
        loop.ask(ids, Sampling(temperature=0.0, max_tokens=1))  # the prompt is cached from here on
        started = time.thread_time()
        wanted = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        heard = [loop.submit(ids, wanted) for _ in range(batch)]
        loop.run()
        best[has_drafts] = max(best[has_drafts], batch * tokens / (time.thread_time() - started))
        texts.append([one.ids for one in heard])
        speculator = loop.core._speculator  # noqa: SLF001
        if speculator is not None:
            right_share = speculator.right / max(speculator.drafted, 1)
    return Row(task, batch, best[False], best[True], right_share, all(text == texts[0] for text in texts))


if __name__ == "__main__":
    main()
