"""What the router costs: CPU microseconds a request and a streamed token, with all its duties on.

Owns the cases, the processes of a run and the table. Real processes on 127.0.0.1: load.c asks, wire_twin.py answers in
place of engines, `python -m router` stands between; its CPU is what the kernel counted for its threads. Asserts
nothing about time. Run: python -m bench.router [--rounds N] [--model DIRECTORY]"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from router.settings.config import Config, Limits, Upstream, Workers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "router.json"
READY_S = 60.0
VOCABULARY = 49_152


@dataclass(frozen=True, slots=True)
class Case:
    """One load: what clients ask for, how the twins pace, and what is counted."""

    name: str
    connections: int
    requests_max: int
    seconds: float
    is_stream: bool
    tokens: int
    prompt_bytes: int
    request_class: str
    ttft_us: int = 0
    itl_us: int = 0
    goal_us: float | None = None


REQUESTS = [
    Case("request, 1 kB", 32, 100_000, 2.0, False, 1, 1_000, "chat", goal_us=82),
    Case("request, 16 kB", 32, 100_000, 2.0, False, 1, 16_000, "chat", goal_us=101),
    Case("request, 256 kB", 32, 20_000, 3.0, False, 1, 256_000, "chat", goal_us=414),
]
TOKENS = [
    Case("token, chatbot+, 256 streams at 40/s", 256, 256, 6.0, True, 60, 1_000, "chat", 50_000, 25_000, 12),
    Case("token, background-agent, 256 streams at 40/s", 256, 256, 6.0, True, 60, 1_000, "agent", 50_000, 25_000, 6),
    Case("token, chatbot+, 32 streams at 100/s", 32, 64, 6.0, True, 100, 1_000, "chat", 20_000, 10_000, 12),
    Case("token, background-agent, 32 streams at 100/s", 32, 64, 6.0, True, 100, 1_000, "agent", 20_000, 10_000, 6),
    Case("token, chatbot+, 32 streams flat out", 32, 100_000, 2.0, True, 200, 1_000, "chat"),
]


FLAT_OUT = REQUESTS[0]


def warm_up(case: Case) -> Case:
    """One request of each session: what is measured is a turn of a conversation that was seen before."""
    return replace(case, requests_max=case.connections, is_stream=False, tokens=1)


@dataclass(slots=True)
class Target:
    """Something between load and twins that can be measured."""

    name: str
    port: int
    pid: int


@dataclass(slots=True)
class Measured:
    """One case against one target over all rounds."""

    target: str
    case: str
    goal_us: float | None
    us: list[float] = field(default_factory=list)  # CPU a request, or a token beyond its request
    per_s: list[float] = field(default_factory=list)
    ttft_p50_us: list[float] = field(default_factory=list)
    total_p50_us: list[float] = field(default_factory=list)


class Bench:
    """A directory with the load client, two twins and whatever stands between."""

    def __init__(self, directory: Path, model: Path) -> None:
        self._directory = directory
        self._model = model
        self._load = directory / "load"
        self._stack = contextlib.ExitStack()
        self._twins: list[subprocess.Popen[bytes]] = []
        self.sockets = [str(directory / f"w{number}.sock") for number in range(2)]

    def __enter__(self) -> Bench:
        subprocess.run(["cc", "-O2", "-o", self._load, HERE / "load.c"], check=True)
        for number, path in enumerate(self.sockets):
            command = [sys.executable, "-m", "bench.wire_twin", path, f"w{number}", str(VOCABULARY)]
            self._twins.append(self._start(command, stdin=subprocess.PIPE))
        until(lambda: all(Path(path).exists() for path in self.sockets))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def pace(self, case: Case) -> None:
        """Tell the twins how fast to answer."""
        for twin in self._twins:
            assert twin.stdin is not None
            twin.stdin.write(f"{case.ttft_us} {case.itl_us}\n".encode())
            twin.stdin.flush()

    def load(self, case: Case, port: int) -> dict[str, Any]:
        """Run the load client; what it saw."""
        shape = [case.connections, case.requests_max, case.seconds, int(case.is_stream), case.tokens, case.prompt_bytes]
        command = [str(self._load), str(port), *map(str, shape), case.request_class]
        seen = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
        if seen["failed"] or not seen["ok"]:
            raise SystemExit(f"{case.name}: {seen}")
        return dict(seen)

    def bare(self) -> Target:
        """The baseline: bench/bare_router.py."""
        port = free_port()
        command = [sys.executable, "-m", "bench.bare_router", str(port), ",".join(self.sockets)]
        return self._ready(Target("bare Python", port, self._start(command).pid), "/")

    def headway(self) -> Target:
        """The router process as the keeper starts it."""
        config = Config(workers=Workers(device="fake"), limits=Limits(index_every_block=4))
        workers = [part for n, path in enumerate(self.sockets) for part in ("--worker", f"w{n}={path}")]
        return self._router("headway", config, ["--model", str(self._model), *workers])

    def headway_upstreams(self) -> Target:
        """The same process in front of HTTP engines, as nginx and vllm-router are here."""
        urls = [f"http://127.0.0.1:{twin}" for twin in self._http_twins()]
        upstreams = tuple(Upstream(url=url, models={"mock": "mock"}, concurrency=1024) for url in urls)
        return self._router("headway, upstreams", Config(upstreams=upstreams), [])

    def _router(self, name: str, config: Config, flags: Sequence[str]) -> Target:
        listen, admin = (socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(2))
        read, write = os.pipe()
        path = self._directory / "config.json"
        path.write_bytes(config.to_json())
        fds = (listen.fileno(), admin.fileno(), write)
        command = [sys.executable, "-m", "router", "--config", str(path), *flags]
        command += ["--listen-fd", str(fds[0]), "--admin-fd", str(fds[1]), "--keeper-fd", str(fds[2])]
        process = self._start(command, pass_fds=fds, stderr=subprocess.DEVNULL)
        target = Target(name, listen.getsockname()[1], process.pid)
        self._stack.callback(os.close, read)
        os.close(write)
        listen.close()
        admin.close()
        return self._ready(target, "/readyz")

    def nginx(self) -> Target | None:
        """A plain relay of bytes, or None with the reason printed."""
        binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if binary is None:
            print("no nginx row: it is not installed")
            return None
        port, config = free_port(), self._directory / "nginx.conf"
        config.write_text(nginx_config(self._directory, port, self._http_twins()))
        return self._ready(Target("nginx", port, self._start([binary, "-c", str(config)]).pid), "/health")

    def vllm_router(self) -> Target | None:
        """The Rust peer with its own cache-aware policy, or None with the reason printed."""
        binary = os.environ.get("VLLM_ROUTER") or shutil.which("vllm-router")
        if binary is None:
            print("no vllm-router row: it is not installed (pip install vllm-router; VLLM_ROUTER= names the command)")
            return None
        port, workers = free_port(), [f"http://127.0.0.1:{twin}" for twin in self._http_twins()]
        command = [binary, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *workers]
        command += ["--policy", "cache_aware", "--log-level", "error", "--prometheus-port", str(free_port())]
        process = self._start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self._ready(Target("vllm-router", port, process.pid), "/health")

    def _http_twins(self) -> list[int]:
        """Ports of two twins that speak HTTP: the baseline in front of a wire twin each."""
        ports = [free_port() for _ in self.sockets]
        for port, path in zip(ports, self.sockets, strict=True):
            command = [sys.executable, "-m", "bench.bare_router", str(port), path]
            self._ready(Target("twin", port, self._start(command).pid), "/")
        return ports

    def _start(self, command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        env = {**os.environ, "HOME": str(self._directory), "PYTHONPATH": str(HERE.parent)}
        process = subprocess.Popen(command, env=env, **how)
        self._stack.callback(stop, process)
        return process

    def _ready(self, target: Target, path: str) -> Target:
        def answers() -> bool:
            with contextlib.suppress(OSError):
                return get(target.port, path) == 200
            return False

        until(answers)
        return target


def nginx_config(directory: Path, port: int, workers: Sequence[int]) -> str:
    """One process, keep-alive on both sides, nothing buffered."""
    servers = " ".join(f"server 127.0.0.1:{worker};" for worker in workers)
    temporary = " ".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
master_process off; daemon off; pid {directory}/nginx.pid; error_log stderr error;
events {{ worker_connections 2048; }}
http {{
    access_log off; client_max_body_size 8m; client_body_buffer_size 1m; keepalive_requests 1000000; {temporary}
    upstream workers {{ {servers} keepalive 512; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location / {{
            proxy_pass http://workers; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""


def until(is_so: Any) -> None:
    """Wait for another process."""
    deadline = time.monotonic() + READY_S
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit("a process of the benchmark did not start")
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def get(port: int, path: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
        return int(answer.status)


def cpu_s(pid: int) -> float:
    """Seconds that all threads of a process and of its children were on a CPU, by the scheduler's own count."""
    seconds = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
        seconds += sum(cpu_s(int(child)) for child in (task / "children").read_text().split())
    return seconds


def measure(bench: Bench, target: Target, rounds: int) -> list[Measured]:
    """All cases against one target. A token's cost is what is left when its requests are paid."""
    rows = [Measured(target.name, case.name, case.goal_us) for case in (*REQUESTS, *TOKENS)]
    for _ in range(rounds):
        request_us = 0.0
        for row, case in zip(rows, (*REQUESTS, *TOKENS), strict=True):
            bench.pace(FLAT_OUT)
            bench.load(warm_up(case), target.port)
            bench.pace(case)
            before = cpu_s(target.pid)
            seen = bench.load(case, target.port)
            spent_us = (cpu_s(target.pid) - before) * 1e6
            if case is REQUESTS[0]:
                request_us = spent_us / seen["ok"]
            tokens_us = (spent_us - request_us * seen["ok"]) / (seen["ok"] * case.tokens)
            row.us.append(tokens_us if case.is_stream else spent_us / seen["ok"])
            row.per_s.append((seen["ok"] * case.tokens if case.is_stream else seen["ok"]) / seen["wall_s"])
            row.ttft_p50_us.append(seen["ttft_p50_us"])
            row.total_p50_us.append(seen["total_p50_us"])
    return rows


def table(rows: list[Measured]) -> Iterator[str]:
    """For people: medians, with the range of the rounds."""
    targets = list(dict.fromkeys(row.target for row in rows))
    yield f"{'CPU us':46}" + "".join(f"{target:>24}" for target in targets) + f"{'goal':>8}"
    for case in dict.fromkeys(row.case for row in rows):
        cells = {row.target: row for row in rows if row.case == case}
        line = f"{case:46}"
        for target in targets:
            us = cells[target].us
            line += f"{statistics.median(us):>10.1f} ({min(us):.1f}-{max(us):.1f})".rjust(24)
        goal = next(iter(cells.values())).goal_us
        yield line + (f"{goal:>8.0f}" if goal is not None else "")


def save(rows: list[Measured], rounds: int) -> None:
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=HERE, check=False, capture_output=True, text=True).stdout.strip()
    found = {"machine": machine, "commit": commit, "rounds": rounds, "load": os.getloadavg()[0]}
    found["rows"] = [
        {
            "target": row.target,
            "case": row.case,
            "goal_us": row.goal_us,
            "us": statistics.median(row.us),
            "us_range": [min(row.us), max(row.us)],
            "per_s": statistics.median(row.per_s),
            "ttft_p50_us": statistics.median(row.ttft_p50_us),
            "total_p50_us": statistics.median(row.total_p50_us),
        }
        for row in rows
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def embedded_model() -> Path:
    """The folder of the embedded model; the router needs its tokenizer alone."""
    command = [sys.executable, "-m", "engine", "convert", "smollm2"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a folder with tokenizer.json; the embedded model if not given")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results alone")
    arguments = parser.parse_args()
    if shutil.which("cc") is None or not Path("/proc/self/schedstat").exists():
        raise SystemExit("this benchmark needs a C compiler named cc, and Linux, whose /proc counts CPU time")
    rows: list[Measured] = []
    model = arguments.model or embedded_model()
    for start in (Bench.bare, Bench.headway, Bench.headway_upstreams, Bench.nginx, Bench.vllm_router):
        with tempfile.TemporaryDirectory() as directory, Bench(Path(directory), model) as bench:
            target = start(bench)
            if target is not None:
                rows += measure(bench, target, arguments.rounds)
    if not arguments.no_save:
        save(rows, arguments.rounds)
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {arguments.rounds} rounds")
    for line in table(rows):
        print(line)


if __name__ == "__main__":
    main()
