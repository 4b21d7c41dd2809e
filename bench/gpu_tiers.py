"""What a prefix costs to bring up from the host pool and to write there, against computing it; alone, beside decodes.

    python3 bench/gpu_tiers.py MODEL_DIR [--prefix 32768] [--decodes 64] [--kv fp8] [--commit C] [--out DIR]

Owns one prefix that goes down and up through the worker's own trie, tiers and threads, first over ordinary memory, then
over registered memory, in one run. Some blocks are compared bit for bit after every restore. Prints its table last."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from dataclasses import replace as replaced
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from engine.compute import gpu_build
from engine.compute.arrange import CHUNK_BUCKETS
from engine.compute.calibrate import Shape, batch_of
from engine.compute.compilers import compilers
from engine.compute.gpu_runner import GpuRunner
from engine.config import GPU_BLOCK_TOKENS, GPU_SEQUENCES_MAX, KV_DTYPES
from engine.kernels.tuned import slug
from engine.kv import keys
from engine.kv.blocks import BlockTrie
from engine.kv.carrier import Tier
from engine.kv.copies import Hands, Restore
from engine.kv.pinning import Pinning
from engine.kv.pool import EXTENT_SLOTS, PoolShape, PoolWriter, attach
from engine.kv.tiers import Tiers
from engine.step import KVMemory, Pinner
from policies.costs import StepModel
from policies.retention import Band

LINK_GB_S = 54.5  # 1 GiB pieces from registered memory on the same kind of host: 79 ms for 32k tokens of 8B KV
CONTEXTS = (512, 640)  # decodes go round and round within these
ALL_IS_WORTH_IT = StepModel(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # a device so slow that nothing is computed again
COMPARED = 16  # blocks
SMALL_PIECE_BYTES = 2**27  # what steps wait for registering, if they do, is a piece's
PIN_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Row:
    """One figure's median; GB/s of the copies' own time for restores, of the whole for stores."""

    name: str
    ms: float
    gb_s: float = 0.0
    step_ms: float = 0.0  # of the decodes meanwhile
    longest_ms: float = 0.0  # of those


class Decodes:
    """Sequences that decode as a worker has them: one step in flight, ids from the device."""

    def __init__(self, runner: GpuRunner, blocks: list[int], count: int) -> None:
        self._runner, self._at, self._count = runner, CONTEXTS[0], count
        self._tables = np.array(blocks, np.int32).reshape(count, -1)
        self._ids = np.zeros(count, np.int32)
        self._like, _ = batch_of(Shape(count, 0, 1), runner.block_tokens)

    def step(self) -> None:
        """One token each."""
        size, rows = self._runner.block_tokens, np.arange(self._count)
        at = np.full(self._count, self._at, np.int32)
        batch = replaced(
            self._like, ids=self._ids, positions=at, contexts=at + 1, block_tables=self._tables,
            write_slots=self._tables[rows, at // size].astype(np.int64) * size + at % size,
            room=np.full(self._count, self._tables.shape[1] * size, np.int32), sample_positions=at,
        )  # fmt: skip
        self._ids = self._runner.run(batch).ids
        self._at = self._at + 1 if self._at + 1 < CONTEXTS[1] else CONTEXTS[0]


class Bench:
    """A prefix in blocks of its own, a pool with room for two, decodes in other blocks."""

    def __init__(self, runner: GpuRunner, prefix_tokens: int, decodes: int) -> None:
        memory = runner.kv
        assert memory is not None
        assert isinstance(memory, Pinner)
        self.runner, self.memory, self.pinner, self.size = runner, memory, memory, runner.block_tokens
        self.trie = BlockTrie(runner.blocks_total, self.size, keys.root("bench"))
        self.ids = np.random.default_rng(1).integers(0, runner.model.vocab_size, prefix_tokens).astype(np.int32)
        self.prefix = self.trie.take(prefix_tokens // self.size, 0.0) or []
        apart = self.trie.take(decodes * blocks_each(self.size), 0.0) or []
        self.decodes = Decodes(runner, [block.id for block in apart], decodes)
        self.host = _host(self.size, memory, 2 * len(self.prefix))
        self.pinning = Pinning(self.host.memory, self.host.extents, memory)
        self.hands = Hands(ThreadPoolExecutor(1, "store"), ThreadPoolExecutor(1, "restore"))
        self.tiers = Tiers(self.trie, memory, self.host, hands=self.hands, pinning=self.pinning)
        self.wanted: list[bytes] = []
        self.bytes = len(self.prefix) * memory.block_bytes

    def compute(self) -> float:
        """Seconds to compute the prefix, in the largest chunks."""
        started = time.perf_counter()
        numbers = np.array([block.id for block in self.prefix], np.int32)
        for start in range(0, len(self.ids), CHUNK_BUCKETS[-1]):
            rows = min(CHUNK_BUCKETS[-1], len(self.ids) - start)
            batch, _ = batch_of(Shape(0, rows, start), self.size)
            at = np.arange(start, start + rows)
            batch.ids[:] = self.ids[start : start + rows]
            batch.block_tables[0] = numbers[: batch.block_tables.shape[1]]
            batch.write_slots[:] = numbers[at // self.size].astype(np.int64) * self.size + at % self.size
            self.runner.run(batch)
        return time.perf_counter() - started

    def publish(self) -> None:
        """The prefix is in the trie, cached; what some of its blocks hold is kept."""
        parent, data, width = None, self.ids.tobytes(), 4 * self.size
        for number, block in enumerate(self.prefix):
            parent = self.trie.publish(block, parent, data[number * width : (number + 1) * width])
        self.trie.commit()
        self.trie.release(self.prefix, Band.CHATBOT, 0.0, 0.0)
        self.wanted = self._content()

    def _content(self) -> list[bytes]:
        found = self.trie.match(self.ids.tobytes(), b"", 0)
        some = found[:: max(1, len(found) // COMPARED)]
        payloads = [np.empty(self.memory.block_bytes, np.uint8) for _ in some]
        self.memory.save([block.id for block in some], payloads)()
        return [payload.tobytes() for payload in payloads]

    def store(self, name: str, work: Callable[[], None]) -> Row:
        """The prefix to the pool, which does not have it."""
        for key in list(self.host.slot_of):
            self.host.drop(key)
        self.tiers.store(self.trie.match(self.ids.tobytes(), b"", 0))
        row = self.until(name, lambda: not self.tiers.held, work)
        assert len(self.host.slot_of) == len(self.prefix)
        return replaced(row, gb_s=self.bytes / row.ms / 1e6)

    def restore(self, name: str, work: Callable[[], None]) -> Row:
        """The prefix from the pool, where the device has none of it."""
        for block in reversed(self.trie.match(self.ids.tobytes(), b"", 0)):
            assert self.trie.drop(block)
        begun: list[Restore] = []

        def begin_and_work() -> None:
            if not begun:
                below = self.tiers.find([], self.ids.tobytes(), b"", 0)
                now = time.monotonic()
                restore = self.tiers.bring_up(
                    [], below, Band.CHATBOT, make_room=self._has_room, model=ALL_IS_WORTH_IT, now=now
                )
                assert restore is not None
                begun.append(restore)
            work()

        row = self.until(name, lambda: bool(begun) and begun[0].is_done, begin_and_work)
        restore = begun[0]
        assert restore.future is not None
        assert restore.arrived == len(self.prefix)
        assert self._content() == self.wanted, "KV came back changed"
        return replaced(row, gb_s=self.bytes / restore.future.result().seconds[Tier.HOST] / 1e9)

    def _has_room(self, blocks: int) -> bool:
        return blocks <= self.trie.available

    def pin(self, name: str, pinning: Pinning, work: Callable[[], None]) -> Row:
        """The pool registered."""
        pinning.begin()
        deadline = time.monotonic() + PIN_S_MAX
        total = pinning.total_bytes
        row = self.until(name, lambda: pinning.pinned_bytes == total or time.monotonic() > deadline, work)
        assert pinning.pinned_bytes == total, "the pool was not registered: see the log"
        return row

    def pin_small(self, name: str, work: Callable[[], None]) -> Row:
        """The same in small pieces, and undone: half of the pool has never been touched before."""
        small = Pinning(self.host.memory, self.host.extents, self.pinner, piece_bytes=SMALL_PIECE_BYTES)
        row = self.pin(name, small, work)
        small.close()
        return row

    def until(self, name: str, is_done: Callable[[], bool], work: Callable[[], None]) -> Row:
        """Turn as a worker's loop does; how long it took, and how long its turns."""
        started = last = time.perf_counter()
        turns: list[float] = []
        while not turns or not is_done():  # what ended before the first look took a turn all the same
            work()
            self.tiers.poll(time.monotonic())
            now = time.perf_counter()
            turns.append(now - last)
            last = now
        step_s = statistics.fmean(turns) if turns else 0.0
        return Row(name, 1e3 * (last - started), 0.0, 1e3 * step_s, 1e3 * max(turns, default=0.0))

    def steps(self, name: str, count: int) -> Row:
        """Decodes alone."""
        left = [count]

        def step() -> None:
            left[0] -= 1
            self.decodes.step()

        return self.until(name, lambda: not left[0], step)

    def close(self) -> None:
        """End threads, unregister."""
        for hand in (self.hands.stores, self.hands.restores):
            hand.shutdown()
        self.tiers.close()


def blocks_each(block_tokens: int) -> int:
    """Blocks of one decode, with room for the step ahead."""
    return -(-(CONTEXTS[1] + 1) // block_tokens)


def _host(block_tokens: int, memory: KVMemory, slots: int) -> PoolWriter:
    extents = -(-slots // EXTENT_SLOTS)
    descriptor = os.memfd_create("pool")
    os.ftruncate(descriptor, PoolShape(block_tokens, memory.block_bytes, extents * EXTENT_SLOTS).total_bytes)
    return PoolWriter(attach(descriptor, block_tokens, memory.block_bytes), extents)


def alone() -> None:
    """Nothing but to look whether the copies are done."""
    time.sleep(100e-6)


def measure(bench: Bench, repeats: int, warm_steps: int) -> list[Row]:
    """Every row, in order; with and without decodes in turn."""
    computed = [bench.compute() for _ in range(3)][-1]  # launched, captured, replayed
    bench.publish()
    bench.steps("", warm_steps)
    rows = [Row("compute it", 1e3 * computed)]
    rows += [bench.store("store, first touch of the pool", alone)]
    rows += round_of(bench, "pageable", max(1, repeats // 2))
    rows += [bench.pin_small("register, 128 MiB pieces, decodes", bench.decodes.step)]
    rows += [bench.pin("register, 1 GiB pieces, decodes", bench.pinning, bench.decodes.step)]
    return rows + round_of(bench, "pinned", repeats)


def round_of(bench: Bench, memory: str, repeats: int) -> list[Row]:
    """Stores and restores over one kind of memory."""
    beside = bench.decodes.step
    rounds: list[list[Row]] = []
    for _ in range(repeats):
        rounds.append([
            bench.store(f"store, {memory}", alone),
            bench.restore(f"restore, {memory}", alone),
            bench.steps(f"decodes alone, {memory}", 30),
            bench.restore(f"restore, {memory}, decodes", beside),
            bench.steps(f"decodes alone, {memory}", 30),
            bench.store(f"store, {memory}, decodes", beside),
        ])  # fmt: skip
        for row in rounds[-1]:
            print(line(row), flush=True)
    return [_median(column) for column in zip(*rounds, strict=True)]


def _median(rows: tuple[Row, ...]) -> Row:
    def of(name: str) -> float:
        return statistics.median(getattr(row, name) for row in rows)

    return Row(rows[0].name, of("ms"), of("gb_s"), of("step_ms"), max(row.longest_ms for row in rows))


def line(row: Row) -> str:
    """As the table has it."""
    is_copy = row.name.startswith(("store", "restore"))
    copied = f"{row.gb_s:8.1f} {row.gb_s / LINK_GB_S:7.0%}" if is_copy else f"{'-':>8} {'-':>7}"
    paced = f"{row.step_ms:9.2f} {row.longest_ms:10.2f}" if "decodes" in row.name else f"{'-':>9} {'-':>10}"
    return f"{row.name:34} {row.ms:9.1f} {copied} {paced}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prefix", type=int, default=32768, help="tokens of the prefix (32768)")
    parser.add_argument("--decodes", type=int, default=64, help="sequences that decode beside it (64)")
    parser.add_argument("--repeats", type=int, default=4, help="rounds over registered memory; half over ordinary (4)")
    parser.add_argument("--kv", choices=KV_DTYPES, default=KV_DTYPES[0])
    parser.add_argument("--commit", default="unknown", help="the commit measured, where git is not at hand")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    started, device, is_kv_fp8 = time.perf_counter(), torch.device("cuda:0"), options.kv == "fp8"
    torch.cuda.set_device(device)
    blocks = options.prefix // GPU_BLOCK_TOKENS + options.decodes * blocks_each(GPU_BLOCK_TOKENS) + 8
    with torch.inference_mode():
        with compilers() as compiling:
            compiling.begin(
                gpu_build.wanted(
                    options.model, device, GPU_BLOCK_TOKENS, GPU_SEQUENCES_MAX, kv_dtype="fp8" if is_kv_fp8 else "bf16"
                )
            )
            made = gpu_build.on_device(options.model, device)
            compiling.wait()
        runner = GpuRunner(made, GPU_BLOCK_TOKENS, blocks, GPU_SEQUENCES_MAX, is_kv_fp8=is_kv_fp8)
    print(f"weights and kernels after {time.perf_counter() - started:.1f} s", flush=True)
    bench = Bench(runner, options.prefix, options.decodes)
    rows = measure(bench, options.repeats, warm_steps=2 * (CONTEXTS[1] - CONTEXTS[0]))
    bench.close()
    head = {"device": torch.cuda.get_device_name(), "commit": options.commit, "model": options.model.name}
    head |= {"kv": options.kv, "prefix_tokens": options.prefix, "prefix_bytes": bench.bytes, "decodes": options.decodes}
    options.out.mkdir(parents=True, exist_ok=True)
    found = [{key: value if key == "name" else round(value, 3) for key, value in asdict(row).items()} for row in rows]
    card = slug(torch.cuda.get_device_name())
    path = options.out / f"gpu_tiers-{options.model.name}{'-fp8kv' if is_kv_fp8 else ''}-{card}.json"
    path.write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")
    print(f"\n{time.perf_counter() - started:.0f} s in all; {options.prefix} tokens are {bench.bytes / 1e9:.2f} GB")
    print(f"{'':34} {'ms':>9} {'GB/s':>8} {'of link':>7} {'step ms':>9} {'longest ms':>10}")
    print("\n".join(map(line, rows)))


if __name__ == "__main__":
    main()
