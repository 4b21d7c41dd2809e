"""What the door holds and adds: memory of idle and streaming connections, a long conversation sent again, first tokens.

Owns these cases; processes, load and twins are those of bench/router.py. Each beside *bare*, the same Python stack
without any duty, turn about in one run, in processes that are fresh each round: freed memory is not given back.
Asserts nothing about time. Run: python -m bench.door [--rounds N] [--no-save]"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench.router import Bench, Case, Target, cpu_name, cpu_s, embedded_model, warm_up

RESULTS = Path(__file__).resolve().parent / "results" / "door.json"
IDLE, STREAMS, POLL_S = 5_000, 500, 0.05
GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
LONG = Case("conversation of 142k tokens sent again", 1, 30, 10.0, False, 1, 753_000, "agent")
FIRST = Case("first token, one request at a time", 1, 400, 10.0, True, 1, 1_000, "chat")
FLOOD = Case(f"{STREAMS} streams", STREAMS, STREAMS, 8.0, True, 100, 1_000, "chat", 50_000, 50_000)

Figures = dict[str, float]


def rss_kib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1])
    raise ValueError(f"process {pid} is gone")


def idle(bench: Bench, target: Target) -> Figures:
    """Connections that have asked once and are kept."""
    del bench
    before = rss_kib(target.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", target.port)))
            connection.sendall(GET)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        after = rss_kib(target.pid)
    return {"MiB in all": after / 1024, "KiB each": (after - before) / IDLE}


def streaming(bench: Bench, target: Target) -> Figures:
    """The most while so many streams run at 20 tokens/s."""
    bench.load(warm_up(FLOOD), target.port)
    bench.pace(FLOOD)
    before, most, is_over = rss_kib(target.pid), 0.0, threading.Event()
    load = threading.Thread(target=lambda: (bench.load(FLOOD, target.port), is_over.set()))
    load.start()
    while not is_over.wait(POLL_S):
        most = max(most, rss_kib(target.pid))
    load.join()
    return {"MiB in all": most / 1024, "KiB each": max(0.0, most - before) / STREAMS}


def resent(bench: Bench, target: Target) -> Figures:
    """A turn of a conversation whose earlier turns were seen; only its last message is new."""
    bench.pace(LONG)
    bench.load(warm_up(LONG), target.port)
    before = cpu_s(target.pid)
    seen = bench.load(LONG, target.port)
    return {"CPU ms": (cpu_s(target.pid) - before) * 1e3 / seen["ok"]}


def first_token(bench: Bench, target: Target) -> Figures:
    """From the request's last byte to the answer's first token."""
    bench.pace(FIRST)
    bench.load(warm_up(FIRST), target.port)
    seen = bench.load(FIRST, target.port)
    return {"p50 ms": seen["ttft_p50_us"] / 1e3, "p99 ms": seen["ttft_p99_us"] / 1e3}


CASES: dict[str, Callable[[Bench, Target], Figures]] = {  # memory first
    f"{IDLE} idle connections": idle,
    FLOOD.name: streaming,
    FIRST.name: first_token,
    LONG.name: resent,
}


def play(model: Path, found: dict[str, dict[str, list[Figures]]]) -> None:
    """One round of all cases."""
    with contextlib.ExitStack() as stack:
        places = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        benches = [stack.enter_context(Bench(place, model)) for place in places]
        pairs = [(benches[0], benches[0].headway()), (benches[1], benches[1].bare())]
        for case, measure in CASES.items():
            for bench, target in pairs:
                found[case].setdefault(target.name, []).append(measure(bench, target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a folder with tokenizer.json; the embedded model if not given")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results alone")
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    model = arguments.model or embedded_model()
    found: dict[str, dict[str, list[Figures]]] = {case: {} for case in CASES}
    for _ in range(arguments.rounds):
        play(model, found)
    load = os.getloadavg()[0]
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {load:.1f}, {arguments.rounds} rounds: median (range)")
    for case, targets in found.items():
        for name, rounds in targets.items():
            print(f"{case:42}{name:14}", ", ".join(_cell(unit, rounds) for unit in rounds[0]))
    if not arguments.no_save:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": load, "at": time.time()}
        RESULTS.write_text(json.dumps({"machine": machine, "cases": found}, indent=1) + "\n")


def _cell(unit: str, rounds: list[Figures]) -> str:
    values = [figures[unit] for figures in rounds]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f}) {unit}"


if __name__ == "__main__":
    main()
