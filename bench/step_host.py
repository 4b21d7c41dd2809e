"""Host cost of an engine step: everything the loop does around the device, at 1 to 256 sequences, and the trie's walk.

Owns its workload: decoding sequences on a runner that computes nothing. Budgets are the scheduler's. CPU time, so that
a busy machine does not count. Run: python -m bench.step_host"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.build import build
from engine.config import EngineConfig
from engine.core import Attach, Core, Inbox, Order
from engine.kv import keys
from engine.kv.blocks import BlockTrie
from engine.outbox import Outbox
from engine.step import ModelFacts, StepBatch, StepResult
from engine.wire import Sampling, Submit, encode

STEPS = 400
ROUNDS = 10  # each 40 steps: the best is the code's, the median the machine's
BUDGETS_MS = {1: 0.3, 32: 0.4, 256: 0.5}
PROMPT_TOKENS = 512
OUTPUT_TOKENS = 4000  # more than are made: nothing ends while it is timed
FACTS = ModelFacts("none", "none", "none", "none", 1000, 8192, ())


class NoDevice:
    """Answers at once; `cpu_s` is what making the answer took, to be left out."""

    def __init__(self, blocks_total: int) -> None:
        self.blocks_total = blocks_total
        self.kv = None  # nothing lies below
        self.cpu_s = 0.0

    def run(self, batch: StepBatch) -> StepResult:
        started = time.process_time()
        count = len(batch.sample_rows)
        result = StepResult(np.full(count, 7, dtype=np.int32), np.zeros(count, dtype=bool), 1e-3)
        self.cpu_s += time.process_time() - started
        return result


@dataclass(frozen=True, slots=True)
class Row:
    sequences: int
    best_ms: float
    median_ms: float
    budget_ms: float


def turns(sequences: int) -> Row:
    """CPU time of a turn: inbox, plan, launch, collect, fit, frame and its encoding."""
    blocks = sequences * ((PROMPT_TOKENS + OUTPUT_TOKENS) // 16 + 2)
    runner, inbox = NoDevice(blocks), Inbox()
    core = build(runner, FACTS, EngineConfig(socket=""), inbox)
    outbox = Outbox(lambda: None)
    inbox.put(Attach(1, outbox))
    chance = np.random.default_rng(0)
    for handle in range(sequences):
        ids = chance.integers(0, 1000, PROMPT_TOKENS).astype(np.int32)
        sampling = Sampling(temperature=0.0, max_tokens=OUTPUT_TOKENS)
        submit = Submit(handle, ids.tobytes(), PROMPT_TOKENS, b"", 0, handle % 3, 9.0, 1.0, 99.0, "", sampling)
        inbox.put(Order(1, submit, time.monotonic()))
    _until_decoding(core, outbox, sequences)
    gc.freeze()  # as a worker does after start
    turn_s = []
    for _ in range(ROUNDS):
        runner.cpu_s, started = 0.0, time.process_time()
        for _ in range(STEPS // ROUNDS):
            core.turn()
            frame = outbox.take()
            assert frame is not None
            encode(frame)
        turn_s.append((time.process_time() - started - runner.cpu_s) / (STEPS // ROUNDS))
    return Row(sequences, 1e3 * min(turn_s), 1e3 * float(np.median(turn_s)), BUDGETS_MS[sequences])


def _until_decoding(core: Core, outbox: Outbox, sequences: int) -> None:
    started = 0
    for _ in range(20 * sequences + 20):
        core.turn()
        while (message := outbox.take()) is not None:
            started += len(getattr(message, "starts", ()))
        if started == sequences:
            return
    raise RuntimeError(f"only {started} of {sequences} prompts were computed: the plan starves them")


def walk(tokens: int = 142_000, block_tokens: int = 64) -> tuple[float, float]:
    """(ms to find a prompt in the trie, ms to make its chain of keys)."""
    ids = np.random.default_rng(0).integers(0, 100_000, tokens).astype(np.int32)
    count = tokens // block_tokens
    trie = BlockTrie(count, block_tokens, keys.root("x"))
    parent, step, data = None, block_tokens * 4, ids.tobytes()
    for number, block in enumerate(trie.take(count, 0.0) or []):
        parent = trie.publish(block, parent, data[number * step : (number + 1) * step])
    trie.commit()
    found_s, chained_s = [], []
    for _ in range(20):
        started = time.process_time()
        assert len(trie.match(data, b"", 0)) == count
        middle = time.process_time()
        keys.chain(keys.root("x"), ids, block_tokens)
        found_s.append(middle - started)
        chained_s.append(time.process_time() - middle)
    return 1e3 * float(np.median(found_s)), 1e3 * float(np.median(chained_s))


def main() -> int:
    """Print the table; write it to the file named, if any."""
    parser = argparse.ArgumentParser("python -m bench.step_host", description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    out = parser.parse_args().out
    rows = [turns(sequences) for sequences in BUDGETS_MS]
    walk_ms, chain_ms = walk()
    print(f"host cost of a step, CPU ms (Python {platform.python_version()} on {platform.machine()})")
    print("sequences   best  median  budget   best/budget")
    for row in rows:
        share = row.best_ms / row.budget_ms
        print(f"{row.sequences:9d} {row.best_ms:6.3f} {row.median_ms:7.3f} {row.budget_ms:7.1f} {share:13.2f}")
    print(f"142k-token prompt: trie walk {walk_ms:.2f} ms, chain keys {chain_ms:.2f} ms: {walk_ms / chain_ms:.1f} x")
    if out is not None:
        result = {
            "best_ms": {str(row.sequences): round(row.best_ms, 4) for row in rows},
            "median_ms": {str(row.sequences): round(row.median_ms, 4) for row in rows},
            "walk_142k_ms": round(walk_ms, 3),
            "chain_142k_ms": round(chain_ms, 3),
            "machine": platform.platform(),
        }
        out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
