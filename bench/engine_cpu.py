"""Engine against transformers on one CPU core: decode tokens/s by batch, prefill tokens/s, and their ratios.

Owns the comparison: same float32 weights, same ids, one thread, steps taken in turn in one process, medians of CPU
time (wall time on an idle core; other jobs still slow memory). The oracle runs a bare forward loop with its own KV
cache and unpadded rows: its best case, without generate()."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.loading import convert
from engine.models import panels
from tests.engine.driver import Blocks, Generation, batch_of

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; medians."""

    what: str
    headway_tokens_per_s: float
    transformers_tokens_per_s: float
    same_ids: bool

    @property
    def ratio(self) -> float:
        return self.headway_tokens_per_s / self.transformers_tokens_per_s


class Oracle:
    """transformers on the same sequences: one tensor of ids, its own cache."""

    def __init__(self, model: transformers.PreTrainedModel, prompts: list[list[int]]):
        self._model, self._cache = model, transformers.DynamicCache(config=model.config)
        self.ids = torch.tensor(prompts)

    def step(self) -> None:
        """Prefill at the first call, one token each afterwards."""
        with torch.inference_mode():
            seen = self._cache.get_seq_length()
            output = self._model(self.ids[:, seen:], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self.ids = torch.cat([self.ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)


class Ours:
    """The runner on the same sequences, over shuffled blocks."""

    def __init__(self, runner: TorchRunner, prompts: list[list[int]], new: int):
        self._runner, blocks = runner, Blocks(runner.blocks_total, BLOCK_TOKENS)
        self.generations: list[Generation] = [blocks.start(prompt, new) for prompt in prompts]

    def step(self) -> None:
        """Prefill at the first call, one token each afterwards."""
        turns = [(one, len(one.ids) - one.computed) for one in self.generations]
        result = self._runner.run(batch_of(turns, BLOCK_TOKENS))
        for one, token in zip(self.generations, result.ids.tolist(), strict=True):
            one.computed = len(one.ids)
            one.ids.append(token)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = convert.locate(convert.EMBEDDED_NAME)
    folder = convert.convert(source, args.cache, convert.print_progress)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    runner = TorchRunner.load(folder, RunnerConfig(block_tokens=BLOCK_TOKENS, kv_bytes=args.kv_mb * 2**20))
    rng = np.random.default_rng(1)

    def prompts(count: int, tokens: int) -> list[list[int]]:
        return [[int(token) for token in rng.integers(100, 49_000, tokens)] for _ in range(count)]

    rows = [_decode(model, runner, prompts(batch, args.context), args.steps) for batch in args.batches]
    rows += [_prefill(model, runner, [prompts(1, tokens) for _ in range(args.prefills)]) for tokens in args.prefill]
    _report(rows, args)


def _decode(model: transformers.PreTrainedModel, runner: TorchRunner, prompts: list[list[int]], steps: int) -> Row:
    oracle, ours = Oracle(model, prompts), Ours(runner, prompts, steps + 4)
    for _ in range(3):  # prefill, then two steps to warm up
        oracle.step()
        ours.step()
    theirs_s, ours_s = _in_turn([(oracle.step, ours.step)] * steps)
    context, batch = len(prompts[0]), len(prompts)
    same = oracle.ids.tolist() == [one.ids for one in ours.generations]
    return Row(f"decode, batch {batch}, context {context}-{context + steps}", batch / ours_s, batch / theirs_s, same)


def _prefill(model: transformers.PreTrainedModel, runner: TorchRunner, prompts: list[list[list[int]]]) -> Row:
    pairs = [(Oracle(model, prompt), Ours(runner, prompt, 1)) for prompt in prompts]
    theirs_s, ours_s = _in_turn([(oracle.step, ours.step) for oracle, ours in pairs])
    same = all(oracle.ids.tolist() == [one.ids for one in ours.generations] for oracle, ours in pairs)
    tokens = len(prompts[0][0])
    return Row(f"prefill {tokens}", tokens / ours_s, tokens / theirs_s, same)


def _in_turn(pairs: list[tuple[Callable[[], None], Callable[[], None]]]) -> tuple[float, float]:
    """Median CPU seconds of the first and of the second of each pair, taken in turn, each first every other time."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number, pair in enumerate(pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            started = time.thread_time()
            pair[which]()
            seconds[which].append(time.thread_time() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _report(rows: list[Row], args: argparse.Namespace) -> None:
    print(f"{'SmolLM2-135M float32, 1 thread':38} {'headway':>9} {'transformers':>13} {'same ids':>9} {'ratio':>6}")
    for row in rows:
        ours, theirs = row.headway_tokens_per_s, row.transformers_tokens_per_s
        print(f"{row.what:38} {ours:7.1f}/s {theirs:11.1f}/s {'yes' if row.same_ids else 'NO':>9} {row.ratio:5.2f}x")
    kernel = {"products": "own" if panels.compiled() else "oneDNN"}
    tunables = {"glibc_tunables": os.environ.get("GLIBC_TUNABLES", "")}
    versions = kernel | tunables | {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"machine": _cpu_name(), "threads": torch.get_num_threads(), **versions}
    result = {**machine, "steps": args.steps, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each row")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--prefills", type=int, default=5)
    parser.add_argument("--kv-mb", type=int, default=512)
    parser.add_argument("--cache", type=Path, default=convert.default_cache())
    parser.add_argument("--out", type=Path, default=Path("bench/results/engine_cpu.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
