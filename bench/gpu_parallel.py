"""One rank and several of one model on the cards at hand: the same greedy texts, and the time a token takes.

    python3 bench/gpu_parallel.py MODEL_DIR [--ranks 2] [--seconds 120] [--out DIR]

Owns the comparison. Each part runs in a process of its own with an end, and what there is by then is printed: kernels
compiled for both, sums over ranks by themselves, one rank, several. Decode steps are the runner's own, a step ahead."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from engine.compute import parallel, ranks
from engine.compute.runner import RunnerConfig, TorchRunner
from engine.config import EngineConfig
from engine.kernels.tuned import slug
from engine.models import config as model_config
from engine.models.shard import Shard
from engine.step import StepBatch
from engine.wire import Sampling

BLOCK, SEQUENCES_MAX = 64, 64
KV_BYTES = 16 * 2**30  # of all ranks together
BATCHES, CONTEXT, STEPS, WARM_STEPS = (1, 8, 64), 512, 48, 8
PROMPTS, PROMPT_TOKENS, NEW = 4, 60, 16
SUM_ROWS = (1, 8, 64, 256, 2048)
SUMS = 64  # a step of 32 layers
Runner = Any  # of one rank or several: all have run, blocks_total and model


def batch_of(told: list[list[int]], computed: int, blocks: int, *, is_ahead: bool) -> StepBatch:
    """All behind `computed` of sequences of one length, each in blocks of its own."""
    ends, count = len(told[0]), len(told)
    positions = np.arange(computed, ends, dtype=np.int32)
    tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)
    slots = tables[:, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    starts = np.arange(count + 1, dtype=np.int32) * len(positions)
    nothing = np.zeros(0, np.int32)
    return StepBatch(
        np.array([ids[computed:] for ids in told], np.int32).reshape(-1), np.tile(positions, count), slots.reshape(-1),
        starts, np.full(count, ends, np.int32), tables, starts[1:] - 1, GREEDY[:count], np.full(count, ends, np.int32),
        room=np.full(count, blocks * BLOCK, np.int32) if is_ahead else nothing,
    )  # fmt: skip


GREEDY = tuple(Sampling(temperature=0.0, seed=number) for number in range(SEQUENCES_MAX))


def texts(runner: Runner, *, is_ahead: bool) -> tuple[list[list[int]], list[np.ndarray]]:
    """Greedy ids of some prompts, together; without steps ahead also the logits of each step."""
    vocab, logits = runner.model.vocab_size, []
    random = np.random.default_rng(5)
    told = [random.integers(0, vocab, PROMPT_TOKENS).tolist() for _ in range(PROMPTS)]
    computed = 0
    for _ in range(NEW):
        result = runner.run(batch_of(told, computed, 4, is_ahead=is_ahead))
        computed = len(told[0])
        for ids, token in zip(told, result.ids.tolist(), strict=True):
            ids.append(token)
        room = getattr(getattr(runner, "_runner", runner), "_room", None)
        if not is_ahead and room is not None:
            logits.append(room.logits[:PROMPTS].cpu().numpy())
    return [ids[PROMPT_TOKENS:] for ids in told], logits


def tpot_ms(runner: Runner, batch: int) -> float:
    """Milliseconds a step of decodes, median, by the host's clock."""
    told, blocks, times = [[7] * CONTEXT for _ in range(batch)], CONTEXT // BLOCK + 2, []
    for _ in range(WARM_STEPS + STEPS):
        started = time.perf_counter()
        result = runner.run(batch_of(told, len(told[0]) - 1, blocks, is_ahead=True))
        times.append(time.perf_counter() - started)
        for ids, token in zip(told, result.ids.tolist(), strict=True):
            ids.append(token)
    return 1e3 * statistics.median(times[WARM_STEPS:])


@contextmanager
def runner_of(model: Path, count: int, device: str, *, has_one_shot: bool) -> Iterator[Runner]:
    """As a worker has it."""
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            socket=f"{folder}/w.sock", device=device, block_tokens=BLOCK, kv_bytes=KV_BYTES,
            sequences_max=SEQUENCES_MAX, tensor_parallel=count, has_one_shot=has_one_shot,
        )  # fmt: skip
        if device == "cpu":
            config = EngineConfig(socket=f"{folder}/w.sock", block_tokens=BLOCK, tensor_parallel=count)
        if count > 1:
            with parallel.started(model, config) as runner:
                yield runner
        elif device == "cpu":
            yield TorchRunner.load(model, RunnerConfig(BLOCK, config.kv_bytes))
        else:
            from engine.compute import gpu_build

            yield gpu_build.load(
                model, torch.device(device), block_tokens=BLOCK, kv_bytes=KV_BYTES, sequences_max=SEQUENCES_MAX
            )


def measure(options: argparse.Namespace, count: int) -> None:
    """Texts, then times; each is kept as it is known."""
    started = time.perf_counter()
    found: dict[str, Any] = {}

    def keep(**more: Any) -> None:
        found.update(more)
        options.keep.write_text(json.dumps(found))

    with runner_of(options.model, count, options.device, has_one_shot=not options.nccl) as runner:
        keep(start_s=round(time.perf_counter() - started, 1), blocks=runner.blocks_total)
        said, logits = texts(runner, is_ahead=False)
        if logits:
            np.save(options.keep.with_suffix(".npy"), np.stack(logits))
        keep(texts=said, ahead=texts(runner, is_ahead=True)[0], again=texts(runner, is_ahead=True)[0])
        for batch in BATCHES:
            keep(**{f"tpot_ms_{batch}": round(tpot_ms(runner, batch), 3)})
    sys.stderr.flush()
    os._exit(0)  # NCCL waits for captured graphs otherwise


def sums(options: argparse.Namespace) -> None:
    """Microseconds of one sum inside a captured step, by rows: what is chosen for them, and NCCL's."""
    from torch import distributed as dist

    from engine.compute.device_sum import DeviceSum

    shard, device = Shard(options.rank, options.ranks), torch.device(f"cuda:{options.rank}")
    ranks.join(shard, str(options.meeting), device)
    width = model_config.read(options.model).hidden
    found: dict[str, float] = {}
    with torch.inference_mode():
        x = torch.zeros(max(SUM_ROWS), width, dtype=torch.bfloat16, device=device)
        join = DeviceSum(shard, len(x), width, x)
        answer = torch.zeros(2, SEQUENCES_MAX, dtype=torch.int32, device=device)
        for rows in SUM_ROWS:
            few = x[:rows]
            part = join.part(few)  # few itself where it is too many rows for other cards' memory
            found[f"nccl {rows}"] = microseconds(lambda few=few: dist.all_reduce(few))
            if part is not few:
                found[f"one-shot {rows}"] = microseconds(lambda few=few, part=part: join.sum_into(few, part))
        found["agree"] = microseconds(lambda: join.agree(answer))
    if not options.rank:
        options.keep.write_text(json.dumps({name: round(taken, 1) for name, taken in found.items()}))
    ranks.least(0)
    os._exit(0)  # as above


def microseconds(launch: Callable[[], object], replays: int = 20) -> float:
    """Of one of a captured step's sums. As often on every rank: one that replays once more would wait for ever."""
    from bench.gpu_timing import captured

    graph = captured([launch] * SUMS)
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / replays / SUMS)
    return statistics.median(times)


# The parent -----------------------------------------------------------------------------------------------------------


def run_all(commands: list[list[str]], limit_s: float) -> str:
    """At once, each in a session of its own that ends with the limit; what went wrong."""
    until, running = time.monotonic() + limit_s, [subprocess.Popen(one, start_new_session=True) for one in commands]
    said = ""
    for process in running:
        try:
            code = process.wait(max(0.1, until - time.monotonic()))
            said = said or (f"exit code {code}" if code else "")
        except subprocess.TimeoutExpired:
            said = f"not done after {limit_s:.0f} s"
    for process in running:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()
    return said


def compared(one: dict[str, Any], several: dict[str, Any], folder: Path, names: tuple[str, str]) -> dict[str, Any]:
    """Where greedy texts part, and by how many logits of one rank the two tokens were apart."""
    found: dict[str, Any] = {"texts": PROMPTS, "tokens": NEW, "same": 0, "gaps where they part": []}
    paths = [folder / f"{name}.npy" for name in names]
    logits = [np.load(path) for path in paths] if all(path.exists() for path in paths) else None
    for number, (own, other) in enumerate(zip(one["texts"], several["texts"], strict=True)):
        at = next((at for at, pair in enumerate(zip(own, other, strict=True)) if pair[0] != pair[1]), None)
        found["same"] += at is None
        if at is not None and logits:
            row = logits[0][at, number]
            found["gaps where they part"].append(round(float(row[own[at]] - row[other[at]]), 4))
    if logits:
        first, second = logits[0][0], logits[1][0]
        found["logits' error, 2-norm"] = round(float(np.linalg.norm(first - second) / np.linalg.norm(first)), 5)
        found["logits' spread"] = round(float(first.std()), 3)
    found["a step ahead says the same"] = several["texts"] == several["ahead"] == several["again"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--phase", default="", help=argparse.SUPPRESS)
    parser.add_argument("--nccl", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format=f"  {options.phase} %(name)s: %(message)s")
    if options.phase == "sums":
        sums(options)
    elif options.phase:
        measure(options, int(options.phase))
    else:
        with tempfile.TemporaryDirectory() as folder:
            whole(options, Path(folder))


def whole(options: argparse.Namespace, folder: Path) -> None:
    """All phases within the time, then the table."""
    until, is_cuda = time.monotonic() + options.seconds, options.device != "cpu"
    found: dict[str, Any] = {"ranks": options.ranks, "device": "cpu"}

    def phase(name: str, limit_s: float, *calls: list[str]) -> None:
        started, left = time.monotonic(), until - time.monotonic()
        why = run_all(list(calls), min(limit_s, left)) if left > 5.0 else "no time was left"
        kept = folder / f"{name}.json"
        found[name] = json.loads(kept.read_text()) if kept.exists() else {}
        found[name] |= {"took_s": round(time.monotonic() - started, 1)} | ({"wrong": why} if why else {})
        print(name, {key: value for key, value in found[name].items() if key not in TOLD_LATER}, flush=True)

    own = [sys.executable, __file__, str(options.model), "--ranks", str(options.ranks), "--device", options.device]

    def call(name: str, *more: str) -> list[str]:
        return [*own, "--phase", name, "--keep", str(folder / f"{name}.json"), *more]

    if is_cuda:
        found["device"] = torch.cuda.get_device_name(0)
        compiling = [sys.executable, "-m", "engine.compute.precompile", str(options.model), found["device"]]
        compiling += ["--sequences-max", str(SEQUENCES_MAX)]
        both = [[*compiling, "--ranks", str(count)] for count in (1, options.ranks)]
        phase("compiling", 50.0, *both)
        meeting = str(folder / "sums.meeting")
        calls = [call("sums", "--rank", str(rank), "--meeting", meeting) for rank in range(options.ranks)]
        phase("sums", 30.0, *calls)
    several = str(options.ranks)
    phase("1", 45.0, call("1"))
    phase(several, 45.0, call(several))
    if is_cuda:
        phase(f"{several} nccl", 40.0, call(several, "--nccl", "--keep", str(folder / f"{several} nccl.json")))
    columns = [name for name in found if name[0].isdigit()]
    for name in columns[1:]:
        if "again" in found[name] and "texts" in found["1"]:
            found[name]["compared"] = compared(found["1"], found[name], folder, ("1", name))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu_parallel-{options.model.name}-{slug(found['device'])}.json"
    path.write_text(json.dumps(found, indent=1))
    print("\nsums over ranks, us:", found.get("sums", "not done"))
    for name in columns[1:]:
        print(f"{name} ranks against 1:", found[name].get("compared", "not done"))
    print(f"{'TPOT, ms':>12}" + "".join(f"{name + ' ranks':>14}" for name in columns))
    for batch in BATCHES:
        times = [found[name].get(f"tpot_ms_{batch}", math.nan) for name in columns]
        print(f"{f'batch {batch}':>12}" + "".join(f"{time:8.3f} {times[0] / time:4.2f}x" for time in times))


TOLD_LATER = ("texts", "ahead", "again")

if __name__ == "__main__":
    main()
