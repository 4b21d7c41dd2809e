"""Engines on one GPU, each in a process of its own, on the same work: pace by batch, first tokens, whole workloads.

    python3 bench/gpu_engine.py MODEL_DIR [--engines headway,vllm] [--batches 1,64] [--ttft 2048] [--work ...]

Owns the adapters and the clock, which stands outside the engine. MODEL_DIR holds a config.json; weights are made up.
Engines are headway, headway-fp8kv (the same with fp8 KV, a column of its own) and vllm.
Pace is (seconds of 129 tokens - seconds of 1 token) / 128, median of the repeats; no prompt is new twice, and each
engine gets the same. Every repeat is written as it is measured: where the minutes are up it stops with exit code 3, and
the same command goes on. The table of all engines is printed last."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu_work import WORKLOADS, Item, alike
from engine.compute.compilers import seen
from engine.kernels.tuned import slug

START_S = 400.0
CONTEXT, STEPS = 512, 128
START_NEEDED_S = 150.0  # vLLM took 116 s: less time left and no engine is started
GO_ON = 3  # exit code: time was up


class Engine(Protocol):
    """What is measured."""

    def generate(self, items: list[Item]) -> list[int]:
        """Serve all at once; how many tokens each got."""

    def close(self) -> None:
        """End its processes."""


class Headway:
    """Our worker over its own socket, as the router speaks to it."""

    options: tuple[str, ...] = ()

    def __init__(self, model: Path, log: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "w0.sock"
        command = [sys.executable, "-m", "engine", "worker", "--model", str(model), "--device", "cuda",
                   "--socket", str(path), "--sequences-max", "256", *self.options]  # fmt: skip
        root = Path(__file__).resolve().parents[1]
        env = {**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
        self._process = subprocess.Popen(command, cwd=root, env=env, stderr=log.open("w"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        until = time.monotonic() + START_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the worker did not start: {log.read_text()[-2000:]}") from None
                time.sleep(0.05)
        from engine import wire

        self._wire, self._frames, self._handle = wire, wire.FrameReader(), 0
        self._socket.sendall(wire.encode(wire.Welcome(wire.PROTOCOL_VERSION, "bench", "", b"")))

    def generate(self, items: list[Item]) -> list[int]:
        import numpy as np

        first, wire = self._handle, self._wire
        self._handle += len(items)
        for number, item in enumerate(items):
            sampling = wire.Sampling(temperature=item.temperature, seed=number, max_tokens=item.out, ignore_eos=True)
            ids = np.array(item.prompt, np.int32).tobytes()
            promise = (2, math.inf, math.inf, 3600.0, "")  # a data processor: no line, a deadline far off
            order = wire.Submit(first + number, ids, len(item.prompt), b"", 0, *promise, sampling)
            self._socket.sendall(wire.encode(order))
        lengths: dict[int, int] = {}
        while len(lengths) < len(items):
            data = self._socket.recv(1 << 20)
            if not data:
                raise RuntimeError("the worker is gone")
            for frame in self._frames.feed(data):
                message = wire.decode_from_worker(frame)
                for end in getattr(message, "ends", ()):
                    if end.reason != "length":
                        raise RuntimeError(f"a request ended by {end.reason}: {end.message}")
                    lengths[end.handle] = end.output_tokens
        return [lengths[first + number] for number in range(len(items))]

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(60)
        self._folder.cleanup()


class Vllm:
    """vLLM's offline interface; its engine core is a process of its own."""

    def __init__(self, model: Path, _log: Path) -> None:
        if importlib.util.find_spec("flashinfer") is None:
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        from vllm import LLM, SamplingParams, TokensPrompt

        self._sampling, self._prompt = SamplingParams, TokensPrompt
        self._engine = LLM(
            str(model), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=33024,
            gpu_memory_utilization=0.88, seed=0, disable_log_stats=True,
        )  # fmt: skip

    def generate(self, items: list[Item]) -> list[int]:
        wanted = [
            self._sampling(temperature=item.temperature, max_tokens=item.out, ignore_eos=True, detokenize=False)
            for item in items
        ]
        prompts = [self._prompt(prompt_token_ids=item.prompt) for item in items]
        return [len(done.outputs[0].token_ids) for done in self._engine.generate(prompts, wanted, use_tqdm=False)]

    def close(self) -> None:
        core = getattr(self._engine.llm_engine, "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()  # its process holds the card's memory until then
        del self._engine


class HeadwayFp8Weights(Headway):
    """The same with weights of 8 bits."""

    options = ("--weights", "fp8")


class HeadwayFp8Kv(Headway):
    """The same with fp8 KV."""

    options = ("--kv-dtype", "fp8")


ADAPTERS: dict[str, Callable[[Path, Path], Engine]] = {
    "headway": Headway, "headway-fp8w": HeadwayFp8Weights, "headway-fp8kv": HeadwayFp8Kv, "vllm": Vllm,
}  # fmt: skip


def seconds(engine: Engine, items: list[Item]) -> float:
    """How long all of it takes."""
    started = time.perf_counter()
    lengths = engine.generate(items)
    taken = time.perf_counter() - started
    if lengths != [item.out for item in items]:
        raise RuntimeError("an answer is shorter than asked for")
    return taken


@dataclass(frozen=True, slots=True)
class Case:
    """What one repeat measures: its name, what it does with a seed, and the figures that come of it."""

    name: str
    measure: Callable[[Engine, int], dict[str, float]]


def pace(batch: int) -> Case:
    """Time of one token and time of each further."""

    def measure(engine: Engine, seed: int) -> dict[str, float]:
        first = seconds(engine, alike(batch, CONTEXT, 1, seed))
        whole = seconds(engine, alike(batch, CONTEXT, STEPS + 1, seed + 1))
        return {
            f"one token, batch {batch}, ms": round(first * 1e3, 2),
            f"TPOT batch {batch}, ms": round((whole - first) / STEPS * 1e3, 3),
        }

    return Case(f"batch {batch}", measure)


def first_token(tokens: int) -> Case:
    """A prompt nobody has seen, and the same once more."""

    def measure(engine: Engine, seed: int) -> dict[str, float]:
        items = alike(1, tokens, 1, seed)
        cold = seconds(engine, items)
        again = min(seconds(engine, items) for _ in range(2))
        return {f"TTFT {tokens} cold, ms": round(cold * 1e3, 1), f"TTFT {tokens} again, ms": round(again * 1e3, 1)}

    return Case(f"ttft {tokens}", measure)


def whole(work: str) -> Case:
    """A workload from the first request to the last token."""

    def measure(engine: Engine, seed: int) -> dict[str, float]:
        items = WORKLOADS[work](seed)
        taken = seconds(engine, items)
        return {f"{work}, s": round(taken, 2), f"{work}, tok/s": round(sum(item.out for item in items) / taken)}

    return Case(work, measure)


class Record:
    """Figures of one engine on one card at one commit, written after each repeat; another card or commit is anew."""

    def __init__(self, path: Path, head: dict[str, str]) -> None:
        self._path, self.engine = path, head["engine"]
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._content = kept if all(kept.get(name) == value for name, value in head.items()) else dict(head)
        self._content.setdefault("done", {})

    def repeats(self, case: str) -> int:
        """How often that was measured."""
        return int(self._content["done"].get(case, 0))

    def add(self, case: str, found: dict[str, float]) -> None:
        """One repeat's figures."""
        for name, value in found.items():
            values = [*self._content.get(name, {"all": []})["all"], value]
            self._content[name] = {"median": statistics.median(values), "all": values}
            print(f"{self.engine:8} {name:28} {value}", flush=True)
        self._content["done"][case] = self.repeats(case) + 1
        self._path.write_text(json.dumps(self._content, indent=1), encoding="utf-8")

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """By name: the median and all repeats."""
        return {name: value for name, value in self._content.items() if isinstance(value, dict) and "all" in value}


def go_on(record: Record, cases: list[Case], repeats: int, make: Callable[[], Engine], until: float) -> bool:
    """Measure what is missing until the time is up; whether all is there. The engine runs only while it is measured."""
    missing = [(case, number) for number in range(repeats) for case in cases if record.repeats(case.name) <= number]
    if not missing:
        return True
    if until - time.monotonic() < START_NEEDED_S:
        return False
    started = time.perf_counter()
    engine = make()
    try:
        engine.generate(alike(1, CONTEXT, 1, 99))
        again = "start again" if record.repeats("start to first token") else "start to first token"
        record.add(again, {f"{again}, s": round(time.perf_counter() - started, 1)})
        engine.generate(alike(1, CONTEXT, 16, 98))
        longest: dict[str, float] = {}
        for case, number in missing:
            begun = time.monotonic()
            if begun + longest.get(case.name, 0.0) > until:
                return False
            record.add(case.name, case.measure(engine, zlib.crc32(f"{case.name} {number}".encode())))
            longest[case.name] = time.monotonic() - begun
    finally:
        engine.close()
    return True


def card() -> str:
    """The card's name, by NVML where it is there: this process must hold no context of its own on the card."""
    if (known := seen("cuda:0")) is not None:
        return known[0]
    import torch

    return torch.cuda.get_device_name()


def table(title: str, records: list[Record]) -> str:
    """One row a figure, one column an engine: median (range); behind them how many times faster the first engine is
    than each other one, by the medians."""
    names = list(dict.fromkeys(name for record in records for name in record.figures))
    first, others = records[0], records[1:]
    columns = [record.engine for record in records]
    columns += [f"{first.engine} is faster than {other.engine}" for other in others]
    rows = [f"| {title} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name in names:
        cells = [record.figures.get(name) for record in records]
        shown = [f"{c['median']} ({min(c['all'])}-{max(c['all'])}, {len(c['all'])}x)" if c else "-" for c in cells]
        shown += [faster(name, cells[0], cell) for cell in cells[1:]]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(rows)


def faster(name: str, ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    """How many times; below 1 it is slower. Rates count up, times down."""
    if not (ours and theirs and ours["median"] and theirs["median"]):
        return "-"
    ratio = theirs["median"] / ours["median"]
    return f"{1.0 / ratio if name.endswith('/s') else ratio:.2f}x"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main(
    arguments: list[str] | None = None,
    adapters: Mapping[str, Callable[[Path, Path], Engine]] = ADAPTERS,
    device: Callable[[], str] = card,
) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engines", type=names, default=["headway"])
    parser.add_argument("--batches", type=numbers, default=[1, 64, 256])
    parser.add_argument("--ttft", type=numbers, default=[2048])
    parser.add_argument("--work", type=names, default=[], help=", ".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop before a repeat that would end later")
    parser.add_argument("--commit", default="unknown", help="the commit measured, where git is not at hand")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    until, name = time.monotonic() + 60.0 * options.minutes, options.model.name
    cases = [*map(pace, options.batches), *map(first_token, options.ttft), *map(whole, options.work)]
    records, is_done, where = [], True, device()
    for engine in options.engines:
        head = {"engine": engine, "model": name, "device": where, "commit": options.commit}
        record = Record(options.out / f"gpu_engine-{name}-{engine}-{slug(where)}.json", head)
        make = partial(adapters[engine], options.model, options.out / f"{engine}-{name}.log")
        is_done &= go_on(record, cases, options.repeats, make, until)
        records.append(record)
    print(table(f"{name} on {where}", records))
    print("complete" if is_done else "not complete: the same command goes on")
    return 0 if is_done else GO_ON


if __name__ == "__main__":
    sys.exit(main())
