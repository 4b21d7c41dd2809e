"""How long a GPU waits for its host between the steps of a workload, by device events: a worker's loop, in process.

    python3 bench/gpu_idle.py MODEL_DIR [--work decode256,f256x512x128] [--minutes M] [--profile] [--out DIR]

Owns the events around each step. A step is idle before it begins for as long as the device had nothing of it: planning,
frames, arranging, launching; the packed copy of inputs counts as idle too. Prints its table last."""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from bench.gpu_work import WORKLOADS, Item, alike
from engine import build
from engine.compute import gpu_build
from engine.compute.arrange import Arranged
from engine.compute.gpu_runner import GpuRunner
from engine.config import GPU_BLOCK_TOKENS, GPU_SEQUENCES_MAX, EngineConfig
from engine.core import Attach, Core, Inbox, Order
from engine.kernels.tuned import slug
from engine.outbox import Outbox
from engine.step import ModelFacts
from engine.wire import Sampling, Submit, encode

WORK: dict[str, Callable[[int], list[Item]]] = {
    "decode1": lambda seed: alike(1, 512, 256, seed),
    "decode64": lambda seed: alike(64, 512, 256, seed),
    "decode256": lambda seed: alike(256, 512, 256, seed),
    **WORKLOADS,
}
LONGEST = 4  # gaps told one by one: a few long ones are another fault than many short ones
LONGEST_GAP_MS = 1e4  # more is a workload's start, not a step's


@dataclass(frozen=True, slots=True)
class Timed:
    """One step on the device."""

    decodes: int
    chunk_rows: int
    begin: torch.cuda.Event
    end: torch.cuda.Event


class Watch:
    """Events around every step that a runner computes, in the order of its stream."""

    def __init__(self, runner: GpuRunner) -> None:
        self.steps: list[Timed] = []
        compute = runner._compute  # noqa: SLF001  what is captured begins here

        def timed(step: Arranged) -> None:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            compute(step)
            end.record()
            self.steps.append(Timed(step.decodes, step.chunk_rows, begin, end))

        setattr(runner, "_compute", timed)  # noqa: B010  mypy: a method

    def summary(self) -> dict[str, dict[str, Any]]:
        """By kind: steps, ms of a step, ms idle before one, share idle."""
        torch.cuda.synchronize()
        found: dict[str, list[tuple[float, float]]] = {}
        for before, step in zip(self.steps, self.steps[1:], strict=False):
            kind = "with prompts" if step.chunk_rows else "decodes alone"
            gap = before.end.elapsed_time(step.begin)
            if gap < LONGEST_GAP_MS:
                found.setdefault(kind, []).append((step.begin.elapsed_time(step.end), max(0.0, gap)))
        rows = {kind: np.array(pairs) for kind, pairs in found.items()}
        return {kind: _row(pairs) for kind, pairs in (*rows.items(), ("all", np.concatenate(list(rows.values()))))}


def _row(pairs: Any) -> dict[str, Any]:
    busy, idle = pairs.sum(0)
    longest = pairs[:, 1].argsort()[-LONGEST:]
    return {
        "steps": len(pairs),
        "step ms": round(busy / len(pairs), 3),
        "idle ms": round(idle / len(pairs), 3),
        "idle ms, median": round(float(np.median(pairs[:, 1])), 3),
        "idle ms, longest": [[int(at), round(float(pairs[at, 1]), 2)] for at in longest[::-1]],  # which step of them
        "idle share": round(idle / (busy + idle), 4),
    }


def run(core: Core, inbox: Inbox, outbox: Outbox, items: list[Item], first: int) -> float:
    """Seconds until all have ended; frames are encoded as a link does, on this thread."""
    started = time.perf_counter()
    for handle, item in enumerate(items, first):
        sampling = Sampling(temperature=item.temperature, seed=handle, max_tokens=item.out, ignore_eos=True)
        ids = np.array(item.prompt, np.int32).tobytes()
        promise = (2, float("inf"), float("inf"), 3600.0, "")  # a data processor: no line, a deadline far off
        inbox.put(Order(1, Submit(handle, ids, len(item.prompt), b"", 0, *promise, sampling), time.monotonic()))
    ended = 0
    while ended < len(items):
        core.turn()
        while (message := outbox.take()) is not None:
            ended += len(getattr(message, "ends", ()))
            encode(message)
    return time.perf_counter() - started


def measure(
    runner: GpuRunner, facts: ModelFacts, names: list[str], until: float, *, is_profiled: bool
) -> dict[str, Any]:
    """Each workload twice: the first warms what it needs, the second counts. None is begun when the time is up."""
    config = EngineConfig(
        socket="", device="cuda:0", block_tokens=GPU_BLOCK_TOKENS, sequences_max=GPU_SEQUENCES_MAX, ahead_tokens=1
    )
    inbox, outbox = Inbox(), Outbox(lambda: None)
    core = build.build(runner, facts, config, inbox)
    core.calibrate(config.calibrate_s)
    build.settle()  # as a worker does; without it a full collection walked all of torch, 50 ms, in some step
    watch = Watch(runner)
    inbox.put(Attach(1, outbox))
    found: dict[str, Any] = {}
    first = 0
    for name in names:
        if time.monotonic() > until:
            print(f"{name} and what follows is not measured: the minutes are up", flush=True)
            break
        for repeat in range(2):
            items = WORK[name](repeat)
            watch.steps.clear()
            profile = cProfile.Profile()
            if repeat and is_profiled:
                profile.enable()
            taken = run(core, inbox, outbox, items, first)
            profile.disable()
            first += len(items)
        found[name] = {"seconds": round(taken, 3), **watch.summary()}
        if is_profiled:
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", default="decode64,decode256,f256x512x128", help=", ".join(WORK))
    parser.add_argument("--profile", action="store_true", help="where the host's time goes, which slows it")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no workload later (5)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    until = time.monotonic() + 60.0 * options.minutes
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")  # where the start's seconds go
    runner = gpu_build.load(
        options.model, torch.device("cuda:0"), block_tokens=GPU_BLOCK_TOKENS, kv_bytes=0, sequences_max=256
    )
    if not isinstance(runner, GpuRunner):
        sys.exit("the kernels failed their self-check on this card; see the log")
    facts = ModelFacts("shape", "shape", "cuda", "bfloat16", runner.model.vocab_size, 32_768, ())
    found = measure(runner, facts, options.work.split(","), until, is_profiled=options.profile)
    options.out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name()
    path = options.out / f"gpu_idle-{options.model.name}-{slug(card)}.json"
    path.write_text(json.dumps({"device": card, **found}, indent=1))
    print(f"{options.model.name} on {card}")
    for name, kinds in found.items():
        print(f"{name}: {kinds.pop('seconds')} s")
        for kind, row in kinds.items():
            print(f"  {kind:14} " + "  ".join(f"{what} {value}" for what, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
