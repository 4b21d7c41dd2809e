"""What a decision costs: 64 workers, 10,000 waiting; microseconds per event of each kind, against a bare dict.

Owns the scene and the table. Asserts nothing about time: figures are read, kept in bench/results, and compared."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from policies.actions import Dispatch
from policies.builtin import BUILTINS
from policies.costs import StepModel
from policies.dispatcher import Dispatcher
from policies.events import Arrived, Event, Gone, Offered, WorkerLoad, WorkerReport, WorkerUp
from policies.limits import Limits
from policies.request import Facts, Request, RequestClass, RequestId, Tenant, WorkerId

BLOCK = 64
STEP_MODEL = StepModel(0.006, 50e-6, 0.0005, 52e-9, 1.3e-9, 1e-5, version=1)  # an 8B-class model on one 80 GB GPU
PROMISES = {
    "promises": {name: {"patience_s": 1e9} for name in ("chatbot+", "background-agent")}  # nobody leaves meanwhile
}
LIMITS = Limits(
    requests_max=200_000,
    tokenising_max=200_000,
    tokenising_per_tenant=200_000,
    room_s=(1e12, 1e12, 1e12),
    workers_max=64,
)


GOALS_US = {"arrived, held": 50.0, "frame": 15.0}


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    p10_us: float  # as on a quiet machine
    p50_us: float
    p90_us: float
    mean_us: float
    events: int
    goal_us: float | None


class Scene:
    """A fleet and a stream of requests of sessions that come back, over 16 tenants."""

    def __init__(self, policy: str, workers: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        params = PROMISES if policy == "headway" else {}
        self.dispatcher = Dispatcher(BUILTINS[policy](params), LIMITS, np.random.default_rng(seed))
        self.now = 0.0
        self.workers = workers
        self.number = 0
        self.chains = [self.rng.bytes(16 * int(blocks)) for blocks in self.rng.integers(16, 512, size=512)]
        for worker in range(workers):
            self.timed(WorkerUp(WorkerId(worker), "m", BLOCK, 16_384, 131_072, STEP_MODEL))

    def timed(self, event: Event) -> float:
        """Microseconds that `event` took."""
        begin = time.perf_counter_ns()
        self.actions = self.dispatcher.handle(event, self.now)
        return (time.perf_counter_ns() - begin) / 1e3

    def request(self, most: RequestClass = RequestClass.BACKGROUND_AGENT) -> tuple[Offered, Arrived]:
        """The next request: a turn of one of 512 sessions, 1k to 32k tokens, of class chatbot+ to `most`."""
        session = int(self.rng.integers(len(self.chains)))
        self.number += 1
        chain = self.chains[session]
        tokens = len(chain) // 16 * BLOCK + int(self.rng.integers(1, BLOCK))
        cls = RequestClass(int(self.rng.integers(0, most + 1)))
        request = Request(
            id=RequestId(f"r{self.number}"),
            tenant=Tenant(id=f"t{session % 16}"),
            session=f"s{session}",
            model="m",
            facts=Facts(declared_class=cls, stream=True, has_session=True, template_hash=session),
            arrived=self.now,
            body_bytes=tokens * 4,
            estimated_tokens=tokens,
            max_output=512,
        )
        return Offered(request), Arrived(request.id, tokens, chain)

    def report(self, blocks_free: int, stored: bytes = b"") -> WorkerReport:
        """A frame of a busy worker."""
        load = WorkerLoad(24, 2, 4_000, blocks_free, 0, 200_000, 0.02)
        return WorkerReport(WorkerId(int(self.rng.integers(self.workers))), load, stored=stored)


def decisions(policy: str, workers: int, count: int) -> tuple[list[float], list[float]]:
    """Offered and Arrived of requests that are placed; each leaves 30 requests later."""
    scene = Scene(policy, workers)
    offered, arrived, running = [], [], []
    for _ in range(count):
        scene.now += 0.002
        offer, arrive = scene.request()
        offered.append(scene.timed(offer))
        arrived.append(scene.timed(arrive))
        (placed,) = [action for action in scene.actions if isinstance(action, Dispatch)]
        running.append(offer.request.id)
        load = WorkerLoad(1, 0, 0, 12_000, 4_000, 0, 0.02)
        scene.timed(WorkerReport(placed.worker, load, first_tokens=((placed.request_id, placed.predicted_hit_tokens),)))
        if len(running) > 30:
            scene.timed(Gone(running.pop(0)))
        for worker in scene.rng.integers(workers, size=4):  # every worker is heard of each 32 ms
            scene.timed(WorkerReport(WorkerId(int(worker)), load))
    return offered, arrived


def crowded(policy: str, workers: int, waiting: int, count: int) -> dict[str, list[float]]:
    """No KV anywhere: everything waits. Then more come, some leave, frames go on, and the heads are asked again."""
    scene = Scene(policy, workers)
    for _ in range(workers * 4):
        for event in scene.request(RequestClass.CHATBOT):  # agents would give their KV back to a chat prompt
            scene.timed(event)
    for worker in range(workers):
        scene.timed(WorkerReport(WorkerId(worker), WorkerLoad(24, 2, 4_000, 0, 0, 200_000, 0.02)))
    ids = []
    while scene.dispatcher.waiting_count < waiting:
        offer, arrive = scene.request()
        scene.timed(offer)
        scene.timed(arrive)
        ids.append(offer.request.id)
    taken: dict[str, list[float]] = {"arrived, held": [], "gone, held": [], "frame": [], "frame, heads asked": []}
    for _ in range(count):
        scene.now += 0.0005
        offer, arrive = scene.request()
        scene.timed(offer)
        taken["arrived, held"].append(scene.timed(arrive))
        taken["gone, held"].append(scene.timed(Gone(ids.pop(0))))
        ids.append(offer.request.id)
        taken["frame"].append(scene.timed(scene.report(0, scene.rng.bytes(32))))
        scene.now += LIMITS.reexamine_s
        taken["frame, heads asked"].append(scene.timed(scene.report(0, scene.rng.bytes(32))))
    assert scene.dispatcher.waiting_count >= waiting
    return taken


def floor(count: int) -> list[float]:
    """The same clock around a dict write: what timing itself costs."""
    book: dict[int, int] = {}
    taken = []
    for number in range(count):
        begin = time.perf_counter_ns()
        book[number] = number
        taken.append((time.perf_counter_ns() - begin) / 1e3)
    return taken


def row(what: str, taken: Sequence[float], goal_us: float | None = None) -> Row:
    cut = statistics.quantiles(taken, n=10)
    return Row(what, cut[0], statistics.median(taken), cut[8], statistics.fmean(taken), len(taken), goal_us)


def measure(workers: int, waiting: int, count: int) -> list[Row]:
    offered, arrived = decisions("headway", workers, count)
    _, baseline = decisions("lmetric", workers, count)
    crowd = crowded("headway", workers, waiting, count)
    return [
        row("clock and dict", floor(count)),
        row("offered", offered),
        row("arrived, placed", arrived, 50.0),
        row("arrived, placed (lmetric)", baseline),
        *(
            row(what, crowd[what], 50.0 if what.startswith("arrived") else 15.0 if what == "frame" else None)
            for what in crowd
        ),
    ]


def commit() -> str:
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    answer = run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--machine", default=f"{platform.machine()} {platform.system()}")
    parser.add_argument("--commit", default=commit())
    parser.add_argument("--out", type=Path, help="write JSON here, e.g. bench/results/dispatcher.json")
    options = parser.parse_args()
    rows = measure(options.workers, options.waiting, options.count)
    if options.out:
        head = {"machine": options.machine, "commit": options.commit, "python": platform.python_version()}
        scene = {"workers": options.workers, "waiting": options.waiting}
        rounded = [
            replace(row, **{f: round(getattr(row, f), 1) for f in ("p10_us", "p50_us", "p90_us", "mean_us")})
            for row in rows
        ]
        body = {
            row.what: {"p10_us": row.p10_us, "p50_us": row.p50_us, "p90_us": row.p90_us, "mean_us": row.mean_us}
            for row in rounded
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**head, **scene, "events": body}, indent=1) + "\n")
    print(f"{options.workers} workers, {options.waiting} waiting; {options.machine}, commit {options.commit}")
    print(f"{'event':28} {'p10 us':>8} {'p50 us':>8} {'p90 us':>8} {'mean us':>8} {'goal us':>8}")
    for line in rows:
        goal = f"{line.goal_us:8.0f}" if line.goal_us else " " * 8
        print(f"{line.what:28} {line.p10_us:8.1f} {line.p50_us:8.1f} {line.p90_us:8.1f} {line.mean_us:8.1f} {goal}")


if __name__ == "__main__":
    main()
