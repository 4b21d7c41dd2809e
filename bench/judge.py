"""How true the judge is, and what it costs: error against a server's own send stamps, tokens a core reads, memory.

Prints three tables. Run: python -m bench.judge [--requests N] [--out FILE]"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import uvloop

from loadgen.client import Answer, Client, Target
from loadgen.dialects import DIALECTS, Name
from loadgen.records import Record, fill
from loadgen.replay import Options, Replay
from loadgen.traces import Header, Row, Trace, write

FIRST_S, PACE_S = 0.05, 0.02
RSS_BOUND_MB, TOKENS_BOUND = 300, 50_000


@contextlib.contextmanager
def engine(first_s: float, pace_s: float, *flags: str) -> Iterator[int]:
    """A fake engine in a process of its own, and its port."""
    command = [sys.executable, "-m", "bench.fake_engine", "0", str(first_s), str(pace_s), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().split()[1])
        finally:
            process.kill()


def trace(requests: int, seconds: float, mean_output: int) -> Trace:
    """Poisson arrivals, a third of them sessions of three turns; seeded."""
    rng, rows = np.random.default_rng(1), []
    at_ms = np.sort(rng.uniform(0, seconds * 1e3, requests))
    outputs = rng.geometric(1 / mean_output, requests)
    turn = 0
    for number in range(requests):
        turn = turn + 1 if 0 < turn < 3 else int(number % 5 == 0)
        later = turn > 1
        rows.append(
            Row(
                timestamp=None if later else round(float(at_ms[number]), 3),
                delay=500.0 if later else None,
                session_id=f"s{number - turn + 1}" if turn else "",
                user=f"user-{number % 40:02d}",
                input_length=96,
                output_length=int(outputs[number]),
                hash_ids=[number % 50, 1000 + number],
            )
        )
    return Trace(Header(block_size=48, notes={"duration_s": seconds}), tuple(rows))


async def _timed(port: int, requests: int, dialect: Name) -> tuple[list[float], list[float], list[float]]:
    """Errors in ms of TTFT and of TPOT, and the lag, against what the engine stamped."""
    asked = trace(requests, requests / 50, 20)
    options = Options(model="m", duration_s=requests / 50, grace_s=60.0, dialect=dialect, stripped_share=0.0)
    replay = Replay(asked, Client(Target("127.0.0.1", port)), options)
    await replay.run()
    answer = Answer()
    await Client(Target("127.0.0.1", port)).post("/stamps", {}, b"", answer)
    stamps: list[list[float]] = json.loads(answer.body())
    ttft, tpot, lag = [], [], []
    for record in replay.records:
        sent = stamps[int(record.worker)]
        assert record.outcome == "done"
        assert len(record.token_s) == len(sent)
        ttft.append((record.token_s[0] + replay.origin - sent[0]) * 1e3)
        if len(sent) > 1:
            measured = (record.token_s[-1] - record.token_s[0]) / (len(sent) - 1)
            tpot.append((measured - (sent[-1] - sent[0]) / (len(sent) - 1)) * 1e3)
        lag.append(((record.sent_s or 0.0) - (record.intended_s or 0.0)) * 1e3)
    return ttft, tpot, lag


def errors(requests: int) -> dict[str, dict[str, list[float]]]:
    """Percentiles 50, 90, 99 and the largest, in ms."""
    found = {}
    for dialect in ("completions", "anthropic"):
        with engine(FIRST_S, PACE_S, "stamp") as port:
            ttft, tpot, lag = uvloop.run(_timed(port, requests, dialect))
        found[dialect] = {name: _ranks(values) for name, values in (("ttft", ttft), ("tpot", tpot), ("lag", lag))}
    return found


def _ranks(values: Sequence[float]) -> list[float]:
    """Of their sizes: an error below zero is one too."""
    sizes = np.abs(values)
    return [round(float(value), 3) for value in (*np.percentile(sizes, [50, 90, 99]), sizes.max())]


async def _read(port: int, streams: int, tokens: int) -> tuple[float, float]:
    """Tokens a second of the client's CPU, and network reads a token."""
    client, body = Client(Target("127.0.0.1", port)), b'{"max_tokens":%d,"stream":true}' % tokens
    begun, reads = time.process_time(), 0

    async def one(row: int) -> None:
        nonlocal reads
        answer = Answer()
        await client.post("/v1/completions", {}, body, answer)
        record = Record(row=row, request_class="chatbot+", input_tokens=1, output_tokens=tokens, outcome="unfinished")
        fill(record, answer, 0.0, DIALECTS["completions"])
        assert len(record.token_s) == tokens
        reads += len({at for at, _ in answer.pieces})

    await asyncio.gather(*(one(row) for row in range(streams)))
    count = streams * tokens
    return count / (time.process_time() - begun), reads / count


def reading() -> dict[str, list[float]]:
    """A steady pace, where every token is a read of its own, and as fast as a server can."""
    found = {}
    for name, pace_s, streams, tokens in (("paced", 0.02, 150, 200), ("flat out", 0.0, 100, 500)):
        with engine(0.0, pace_s) as port:
            found[name] = [round(value, 3) for value in uvloop.run(_read(port, streams, tokens))]
    return found


def scale(requests: int) -> dict[str, float | str]:
    """The command line itself, at --speed 10, in a process whose memory is measured."""
    seconds = max(10.0, requests / 50)  # 500 requests a second
    with tempfile.TemporaryDirectory() as folder, engine(0.02, 0.01) as port:
        path, out = Path(folder) / "t.jsonl", Path(folder) / "r"
        write(trace(requests, seconds, 8), path)
        command = [sys.executable, "-m", "loadgen.cli", "replay", str(path), "--speed", "10", "--out", str(out)]
        subprocess.run([*command, "--target", f"http://127.0.0.1:{port}"], check=False, stdout=subprocess.DEVNULL)
        verdict = json.loads(out.with_suffix(".json").read_text())
        page_mb = out.with_suffix(".html").stat().st_size / 1e6
    rss_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    lag = verdict["lag_ms"]
    done = sum(found["cell"]["outcomes"]["done"] for found in verdict["classes"].values())
    return {
        "requests": verdict["offered"],
        "done": done,
        "rss_mb": round(rss_mb),
        "lag_p50_ms": round(lag["p50"], 2),
        "lag_p90_ms": round(lag["p90"], 2),
        "lag_p99_ms": round(lag["p99"], 2),
        "client_cpu_s": round(verdict["run"]["client_cpu_s"], 1),
        "wall_s": round(verdict["run"]["wall_s"], 1),
        "page_mb": round(page_mb, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.judge", description=__doc__)
    parser.add_argument("--requests", type=int, default=60_000, help="of the memory table (60000)")
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    print(f"the judge, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    timed = errors(1000)
    print("error against the engine's send stamps, ms: p50, p90, p99, largest (1,000 streams, 50 a second)")
    for dialect, rows in timed.items():
        for name, ranks in rows.items():
            print(f"  {dialect:12} {name:5}", *(f"{value:8.3f}" for value in ranks))
    read = reading()
    print(f"tokens a second of client CPU, reads a token (bound {TOKENS_BOUND})")
    for name, (rate, reads) in read.items():
        print(f"  {name:9} {rate:9.0f} {reads:6.2f}")
    large = scale(arguments.requests)
    print(f"replay --speed 10 by the command line (bound {RSS_BOUND_MB} MB)")
    for name, value in large.items():
        print(f"  {name:13} {value}")
    if arguments.out is not None:
        kept = {"errors_ms": timed, "tokens_per_cpu_s": read, "scale": large}
        arguments.out.write_text(json.dumps(kept, indent=1) + "\n")
    slow = [name for name, (rate, _) in read.items() if rate < TOKENS_BOUND]
    return 1 if slow or float(large["rss_mb"]) > RSS_BOUND_MB else 0


if __name__ == "__main__":
    sys.exit(main())
