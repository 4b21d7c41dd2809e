"""Engines on one GPU, each in a process of its own, on the same work: pace by batch, first tokens, whole workloads.

    python3 bench/gpu_engine.py MODEL_DIR [--engines headway,vllm] [--batches 1,64] [--ttft 2048] [--work ...]

Owns the adapters and the clock, which stands outside the engine. MODEL_DIR holds a config.json; weights are made up.
Pace is (seconds of 129 tokens - seconds of 1 token) / 128, median of the repeats; no prompt is new twice."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu_work import WORKLOADS, Item, alike

START_S = 400.0
CONTEXT, STEPS = 512, 128


class Engine(Protocol):
    """What is measured."""

    def generate(self, items: list[Item]) -> list[int]:
        """Serve all at once; how many tokens each got."""

    def close(self) -> None:
        """End its processes."""


class Headway:
    """Our worker over its own socket, as the router speaks to it."""

    def __init__(self, model: Path, log: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "w0.sock"
        command = [sys.executable, "-m", "engine", "worker", "--model", str(model), "--device", "cuda",
                   "--socket", str(path), "--sequences-max", "256"]  # fmt: skip
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
        del self._engine


ADAPTERS: dict[str, Callable[[Path, Path], Engine]] = {"headway": Headway, "vllm": Vllm}


def seconds(engine: Engine, items: list[Item]) -> float:
    """How long all of it takes."""
    started = time.perf_counter()
    lengths = engine.generate(items)
    taken = time.perf_counter() - started
    if lengths != [item.out for item in items]:
        raise RuntimeError("an answer is shorter than asked for")
    return taken


class Measured:
    """Figures of one engine, written after each: what a limit cuts off is not lost."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path, self.figures = path, head

    def put(self, name: str, values: list[float], digits: int = 2) -> None:
        """Median and all."""
        self.figures[name] = {
            "median": round(statistics.median(values), digits),
            "all": [round(v, digits) for v in values],
        }
        print(f"{self.figures['engine']:8} {name:28} {self.figures[name]}", flush=True)
        self._path.write_text(json.dumps(self.figures, indent=1))


def measure(name: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """All figures of one engine."""
    model, seed = Path(options.model), 1000
    head = {"engine": name, "model": model.name, "device": device(), "commit": options.commit}
    measured = Measured(out / f"gpu_engine-{model.name}-{name}.json", head)
    started = time.perf_counter()
    engine = ADAPTERS[name](model, out / f"{name}-{model.name}.log")
    engine.generate(alike(1, CONTEXT, 1, 99))
    measured.put("start to first token, s", [time.perf_counter() - started], 1)
    engine.generate(alike(1, CONTEXT, 16, 98))
    for batch in options.batches:
        paces, firsts = [], []
        for _ in range(options.repeats):
            seed += 2
            firsts.append(seconds(engine, alike(batch, CONTEXT, 1, seed)))
            whole = seconds(engine, alike(batch, CONTEXT, STEPS + 1, seed + 1))
            paces.append((whole - firsts[-1]) / STEPS * 1e3)
        measured.put(f"one token, batch {batch}, ms", [first * 1e3 for first in firsts])
        measured.put(f"TPOT batch {batch}, ms", paces, 3)
    for tokens in options.ttft:
        cold, again = [], []
        for _ in range(options.repeats):
            seed += 1
            items = alike(1, tokens, 1, seed)
            cold.append(seconds(engine, items) * 1e3)
            again.append(min(seconds(engine, items) for _ in range(2)) * 1e3)
        measured.put(f"TTFT {tokens} cold, ms", cold, 1)
        measured.put(f"TTFT {tokens} again, ms", again, 1)
    for work in options.work:
        taken, items = [], []
        for _ in range(options.repeats):
            seed += 1
            items = WORKLOADS[work](seed)
            taken.append(seconds(engine, items))
        measured.put(f"{work}, s", taken)
        measured.put(f"{work}, tok/s", [sum(item.out for item in items) / one for one in taken], 0)
    engine.close()
    return measured.figures


def device() -> str:
    """The card's name."""
    import torch

    return torch.cuda.get_device_name()


def table(all_figures: list[dict[str, Any]]) -> str:
    """One row a figure, one column an engine."""
    names = [name for name, value in all_figures[0].items() if isinstance(value, dict)]
    engines = " | ".join(figures["engine"] for figures in all_figures)
    rows = [f"| {all_figures[0]['model']} | {engines} |"]
    for name in names:
        cells = (figures.get(name, {}) for figures in all_figures)
        shown = (f"{c['median']} ({min(c['all'])}-{max(c['all'])})" if c else "-" for c in cells)
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(rows)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engines", default="headway")
    parser.add_argument("--batches", type=numbers, default=[1, 64, 256])
    parser.add_argument("--ttft", type=numbers, default=[2048])
    parser.add_argument("--work", type=lambda text: [part for part in text.split(",") if part], default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", default="unknown", help="the commit measured, where git is not at hand")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(table([measure(name, options, options.out) for name in options.engines.split(",")]))


if __name__ == "__main__":
    main()
