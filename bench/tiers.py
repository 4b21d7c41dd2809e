"""What the tiers are worth: first token from device, host pool and disk against computing it again; the walks that find
a long prompt; and the garbage collector's pauses over a large trie.

Owns its workload: one prompt at a time on the embedded model, one thread. Ways take turns within a round: wall time,
median of rounds. Run: python -m bench.tiers"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.fake import FakeKV
from engine.kv import keys
from engine.kv.blocks import BlockTrie
from engine.kv.copies import Inline
from engine.kv.disk import Disk
from engine.kv.pool import EXTENT_SLOTS, PoolShape, PoolWriter, attach
from engine.kv.tiers import Tiers
from engine.loading import convert
from engine.scheduling.scheduler import Scheduler
from engine.step import ModelFacts
from engine.wire import Sampling, Submit
from policies.costs import StepModel
from policies.retention import Band

SIZE = 16
PREFIXES = (256, 1024)
ROUNDS = 3
WALK_TOKENS, WALK_BLOCK = 142_000, 64  # an agent's prompt (RFC vllm#57103) in a GPU's blocks
GC_BLOCKS = 500_000
CPU_SPEED = StepModel(10e-3, 1.5e-3, 3e-3, 1e-6, 2e-7, 2e-4)  # so that restoring is judged worth it, as it is here


@dataclass(frozen=True, slots=True)
class First:
    """Milliseconds to the first token behind a prefix of so many tokens."""

    prefix: int
    computed_ms: float
    device_ms: float
    host_ms: float
    disk_ms: float


class Bench:
    """One scheduler on the real model with pool and files below it. Copies run inline: their time is in the figure."""

    def __init__(self, runner: TorchRunner, folder: Path) -> None:
        kv = runner.kv
        assert kv is not None
        self.runner = runner
        self.trie = BlockTrie(runner.blocks_total, SIZE, keys.root("bench"))
        pool = os.memfd_create("pool")
        os.ftruncate(pool, PoolShape(SIZE, kv.block_bytes, 2 * EXTENT_SLOTS).total_bytes)
        self.host = PoolWriter(attach(pool, SIZE, kv.block_bytes), 2)
        self.disk = Disk(folder, 2**32, kv.block_bytes, Inline())
        self.tiers = Tiers(self.trie, kv, self.host, self.disk)
        model = runner.model
        facts = ModelFacts("m", "m", "cpu", "float32", model.vocab_size, model.context_max, tuple(model.eos_ids))
        self.scheduler = Scheduler(self.trie, facts, tiers=self.tiers)
        self.handle = 0

    def first_ms(self, ids: np.ndarray, salt: bytes) -> float:
        """Submit, step until the first token, as the loop does; the sequence then ends."""
        self.handle += 1
        sampling = Sampling(temperature=0.0, max_tokens=1)
        started = time.perf_counter()
        self.scheduler.submit(
            1, Submit(self.handle, ids.tobytes(), len(ids), salt, 0, 0, 1.0, 1.0, 1e9, "", sampling), time.monotonic()
        )
        while not self.scheduler.is_idle:
            step = self.scheduler.launch(CPU_SPEED, time.monotonic())
            if step is not None:
                self.scheduler.collect(step, self.runner.run(step.batch), CPU_SPEED, time.monotonic())
        return 1e3 * (time.perf_counter() - started)

    def forget_device(self) -> None:
        """Nothing is cached on the device any more; the tiers below keep what they have."""
        self.trie.release(self.trie.take(self.trie.available, 1e9) or [], Band.EXPIRED, 0.0, 1e9)

    def forget_host(self) -> None:
        """What lies in the pool goes to disk, as its eviction does it."""
        for key, slot in list(self.host.slot_of.items()):
            self.disk.write(self.host.memory.content(slot), self.host.memory.payloads[slot])
            self.host.drop(key)


def first_tokens(prefix: int) -> First:
    """All four ways in turn."""
    folder = convert.convert(convert.locate("smollm2"), convert.default_cache(), lambda *_: None)
    runner = TorchRunner.load(folder, RunnerConfig(block_tokens=SIZE, kv_bytes=128 * 2**20))
    rows = []
    with tempfile.TemporaryDirectory() as disk:
        bench = Bench(runner, Path(disk))
        for number in range(ROUNDS):
            ids = np.random.default_rng(number).integers(10, 40_000, prefix + 1).astype(np.int32)
            computed = bench.first_ms(ids, b"")
            device = bench.first_ms(ids, b"")
            bench.forget_device()
            host = bench.first_ms(ids, b"")
            bench.forget_host()
            bench.forget_device()
            rows.append((computed, device, host, bench.first_ms(ids, b"")))
            assert bench.tiers.load().restored_host == bench.tiers.load().restored_disk == (number + 1) * prefix // SIZE
        bench.disk.close()
    return First(prefix, *(statistics.median(column) for column in zip(*rows, strict=True)))


def walks() -> dict[str, float]:
    """Milliseconds to find 142k tokens: on the device, in the pool alone, and to name them (a router's share)."""
    blocks = WALK_TOKENS // WALK_BLOCK
    ids = np.random.default_rng(1).integers(0, 40_000, blocks * WALK_BLOCK).astype(np.int32)
    trie = BlockTrie(blocks + 8, WALK_BLOCK, keys.root("walk"))
    slots = -(-blocks // EXTENT_SLOTS) * EXTENT_SLOTS
    pool = os.memfd_create("pool")
    os.ftruncate(pool, PoolShape(WALK_BLOCK, WALK_BLOCK * 4, slots).total_bytes)
    host = PoolWriter(attach(pool, WALK_BLOCK, WALK_BLOCK * 4), slots // EXTENT_SLOTS)
    tiers = Tiers(trie, FakeKV(np.zeros((blocks + 8, WALK_BLOCK), np.int32)), host)
    taken, parent = trie.take(blocks, 0.0) or [], None
    for number, block in enumerate(taken):
        parent = trie.publish(block, parent, ids[number * WALK_BLOCK : (number + 1) * WALK_BLOCK].tobytes())
    for start in range(0, blocks, 512):
        tiers.store(trie.commit() if not start else [])
        tiers.store(taken[start : start + 512])
        tiers.wait(0.0)
    data = ids.tobytes()
    found = {
        "match on the device": _best_ms(lambda: trie.match(data, b"", 0)),
        "find in the pool": _best_ms(lambda: tiers.find([], data, b"", 0)),
        "chain keys": _best_ms(lambda: keys.chain(keys.root("walk"), ids, WALK_BLOCK)),
    }
    assert len(trie.match(data, b"", 0)) == len(tiers.find([], data, b"", 0).keys) == blocks
    return found


def _best_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(20):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def pauses() -> dict[str, float]:
    """Milliseconds of a full collection with a trie of 500k blocks, all cached: as it is, and after `gc.freeze`."""
    gc.collect()
    empty = _pause_ms()
    trie, parent, size = BlockTrie(GC_BLOCKS, SIZE, keys.root("gc")), None, 0
    for number, block in enumerate(trie.take(GC_BLOCKS, 0.0) or []):
        parent = None if number % 2000 == 0 else parent  # 250 chains of 32k tokens
        parent = trie.publish(block, parent, number.to_bytes(64, "little"))
        size += 1
    trie.commit()
    full = _pause_ms()
    gc.freeze()
    frozen = _pause_ms()
    gc.unfreeze()
    assert size == GC_BLOCKS
    return {"without a trie": empty, "500k blocks": full, "500k blocks, frozen": frozen}


def _pause_ms() -> float:
    started = time.perf_counter()
    gc.collect()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Print the tables; keep them with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    firsts = [first_tokens(prefix) for prefix in PREFIXES]
    print("first token behind a prefix, ms    computed   device     host     disk   computed / host   / disk")
    for row in firsts:
        times = f"{row.computed_ms:13.0f} {row.device_ms:8.1f} {row.host_ms:8.1f} {row.disk_ms:8.1f}"
        print(f"{row.prefix:>29} {times} {row.computed_ms / row.host_ms:17.1f} {row.computed_ms / row.disk_ms:8.1f}")
    found, paused = walks(), pauses()
    walked = ", ".join(f"{name} {value:.2f} ms" for name, value in found.items())
    print(f"\n{WALK_TOKENS} tokens in blocks of {WALK_BLOCK}: {walked}")
    print("full garbage collection: " + ", ".join(f"{name} {value:.0f} ms" for name, value in paused.items()))
    if arguments.out:
        rows = [{name: round(getattr(row, name), 2) for name in First.__slots__} for row in firsts]
        result = {"machine": platform.platform(), "first_token": rows, "walk_ms": found, "gc_ms": paused}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
