"""Residents' TPOT while 4k-token prompts arrive: steps sized by time against vLLM's static budget of 2048 rows.

Owns the load: seats that ask one short answer after another, and long prompts at a fixed pace. The real loop, scheduler
and step fit run; the device is an 8B model on an H100 replayed in virtual time, or with --real the embedded one."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from engine.build import build
from engine.config import GPU_BLOCK_TOKENS, GPU_PRIOR, EngineConfig
from engine.core import Attach, Core, Inbox, Order
from engine.fake import features
from engine.outbox import Outbox
from engine.step import ModelFacts, Runner, StepBatch, StepResult
from engine.wire import Sampling, StepFrame, Submit
from policies.costs import StepFeatures, StepFit, StepModel

SAMPLES = Path("bench/results/step_samples-llama-8b-h100.jsonl")
POLICIES = ("headway", "static-2048")
VOCAB = 1000
LONG_TOKENS, LONG_OUTPUT = 4096, 8
CHAT, AGENT = 0, 1


@dataclass(frozen=True, slots=True)
class Load:
    """Seats with answers of so many tokens, and a long prompt every `every_s`."""

    seats: int
    prompt_tokens: int
    answer_tokens: int
    tpot_s: float  # what each answer is to keep
    every_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """What a policy made of a load; TPOT of an answer is (last token - first) / (tokens - 1)."""

    device: str
    policy: str
    long_per_s: float
    target_ms: float
    answers: int
    kept: float  # share of the answers whose TPOT is within the target
    tpot_p50_ms: float
    tpot_worst_ms: float
    gap_p99_ms: float  # between two tokens of one answer
    long_first_s: float | None  # median first token of the long prompts; None: none had one
    long_done: int


@dataclass(slots=True)
class Clock:
    """Time that passes only where somebody sleeps."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Replay:
    """Takes as long as the measured device's fitted model says, times an error drawn from those that the fit made."""

    def __init__(self, blocks_total: int, speed: StepModel, errors: np.ndarray, sleep: Callable[[float], None]) -> None:
        self.blocks_total, self.kv = blocks_total, None
        self._speed, self._errors, self._sleep = speed, errors, sleep
        self._chance = np.random.default_rng(1)

    def run(self, batch: StepBatch) -> StepResult:
        seconds = self._speed.step_s(features(batch)) * float(self._chance.choice(self._errors))
        self._sleep(seconds)
        count = len(batch.sample_rows)
        return StepResult(np.full(count, 7, np.int32), np.zeros(count, bool), seconds)


def measured(path: Path) -> tuple[StepModel, np.ndarray]:
    """The step model of a device's samples, and measured / predicted of those seen later than half of them."""
    fit, errors = StepFit(GPU_PRIOR), []
    for line in path.read_text().splitlines()[1:]:
        *what, seconds = json.loads(line)
        step = StepFeatures(*what)
        errors.append(seconds / fit.model.step_s(step))
        fit.observe(step, seconds)
    late = np.array(errors[len(errors) // 2 :])
    return fit.model, np.clip(late, *np.quantile(late, (0.05, 0.95)))


@dataclass(slots=True)
class Crowd:
    """Who asks, and when each token came."""

    load: Load
    inbox: Inbox
    clock: Callable[[], float]
    asked: dict[int, float] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)
    long: set[int] = field(default_factory=set)
    handles: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    chance: np.random.Generator = field(default_factory=lambda: np.random.default_rng(2))

    def ask(self, at: float, *, is_long: bool) -> None:
        """One request, as read at `at`."""
        handle, load = next(self.handles), self.load
        count, output = (LONG_TOKENS, LONG_OUTPUT) if is_long else (load.prompt_tokens, load.answer_tokens)
        ids = self.chance.integers(3, VOCAB, count).astype(np.int32).tobytes()
        lines = (AGENT, 15.0, 4 * load.tpot_s) if is_long else (CHAT, 1.0, load.tpot_s)
        sampling = Sampling(temperature=0.0, max_tokens=output)
        self.inbox.put(Order(1, Submit(handle, ids, count, b"", 0, *lines, 1e9, "", sampling), at))
        self.asked[handle], self.times[handle] = at, []
        if is_long:
            self.long.add(handle)

    def hear(self, frame: StepFrame) -> None:
        """Note the tokens; a seat whose answer has ended asks again."""
        now = self.clock()
        for handle, count in zip(frame.handles, frame.counts, strict=True):
            self.times[handle] += [now] * count
        for end in frame.ends:
            if end.reason != "length":
                raise RuntimeError(f"request {end.handle} ended by {end.reason}: {end.message}")
            if end.handle not in self.long:
                self.ask(now, is_long=False)


def drive(core: Core, load: Load, inbox: Inbox, clock: Callable[[], float]) -> Crowd:
    """Seats are taken, long prompts come every `every_s`, until time is up."""
    crowd, outbox = Crowd(load, inbox, clock), Outbox(lambda: None)
    inbox.put(Attach(1, outbox))
    started = due = clock()
    for _ in range(load.seats):
        crowd.ask(started, is_long=False)
    while clock() < started + load.seconds:
        while due <= clock():
            crowd.ask(due, is_long=True)
            due += load.every_s
        core.turn()
        while (message := outbox.take()) is not None:
            if isinstance(message, StepFrame):
                crowd.hear(message)
    return crowd


def summary(crowd: Crowd, device: str, policy: str) -> Row:
    """The figures of a run; answers that had not ended are left out."""
    load = crowd.load
    whole = [times for times in crowd.times.values() if len(times) == load.answer_tokens]
    tpots = np.array([(times[-1] - times[0]) / (len(times) - 1) for times in whole])
    gaps = np.concatenate([np.diff(times) for times in whole])
    firsts = [crowd.times[one][0] - crowd.asked[one] for one in crowd.long if crowd.times[one]]
    return Row(
        device=device,
        policy=policy,
        long_per_s=round(1 / load.every_s, 3),
        target_ms=1e3 * load.tpot_s,
        answers=len(tpots),
        kept=round(float((tpots <= load.tpot_s).mean()), 4),
        tpot_p50_ms=round(1e3 * float(np.median(tpots)), 1),
        tpot_worst_ms=round(1e3 * float(tpots.max()), 1),
        gap_p99_ms=round(1e3 * float(np.quantile(gaps, 0.99)), 1),
        long_first_s=round(statistics.median(firsts), 2) if firsts else None,
        long_done=len(firsts),
    )


def replayed(policy: str, load: Load) -> Row:
    """One policy on the replayed H100."""
    speed, errors = measured(SAMPLES)
    clock, inbox = Clock(), Inbox()
    facts = ModelFacts("replay", "replay", "cuda", "none", VOCAB, 8192, ())
    config = EngineConfig(socket="", device="cuda", block_tokens=GPU_BLOCK_TOKENS, policy=policy)
    core = build(Replay(8192, speed, errors, clock.sleep), facts, config, inbox, clock)
    core.calibrate(1.0)
    return summary(drive(core, load, inbox, clock), "H100, 8B, replayed", policy)


def real(policy: str, load: Load) -> Row:
    """One policy on the embedded model, one thread, wall time."""
    import torch  # the replayed part needs none

    from engine.compute.runner import RunnerConfig, TorchRunner
    from engine.loading import convert

    torch.set_num_threads(1)
    folder = convert.convert(convert.locate(convert.EMBEDDED_NAME), convert.default_cache(), convert.print_progress)
    runner: Runner = TorchRunner.load(folder, RunnerConfig(block_tokens=16, kv_bytes=512 * 2**20))
    facts = ModelFacts("smollm2", "smollm2", "cpu", "float32", 49_152, 8192, ())
    inbox = Inbox()
    core = build(runner, facts, EngineConfig(socket="", policy=policy, has_drafts=False), inbox)
    core.calibrate(1.0)
    return summary(drive(core, load, inbox, time.monotonic), "CPU, 135M, real", policy)


def main() -> int:
    """Print the table; keep it with --out."""
    parser = argparse.ArgumentParser("python -m bench.pacing", description=__doc__)
    parser.add_argument("--real", action="store_true", help="also the embedded model on this CPU: two minutes")
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    rows = []
    for long_per_s in (4.0, 8.0, 10.0):
        load = Load(32, 512, 128, tpot_s=0.04, every_s=1 / long_per_s, seconds=60.0)
        rows += [replayed(policy, load) for policy in POLICIES]
    if arguments.real:
        load = Load(4, 64, 48, tpot_s=0.12, every_s=30.0, seconds=60.0)
        rows += [real(policy, load) for policy in POLICIES]
    print(
        f"{'':20}{'long/s':>7} {'':12}{'kept':>7} {'p50':>7} {'worst':>7} {'gap p99':>8}   ms; long prompts: first, s"
    )
    for row in rows:
        tpots = f"{row.kept:7.1%} {row.tpot_p50_ms:7.1f} {row.tpot_worst_ms:7.1f} {row.gap_p99_ms:8.1f}"
        print(f"{row.device:20}{row.long_per_s:7.2f} {row.policy:12}{tpots} {row.long_first_s} ({row.long_done})")
    if arguments.out:
        arguments.out.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
