"""A judged run from start to end: read the trace, ask the target for its budgets, replay, judge, write the reports.

Owns the order of these steps, the progress line, and the server process where one is asked for. Ctrl-C ends the
offering; what was measured until then is reported all the same."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import httpx
import msgspec
import uvloop

from loadgen import formats, records, targets, texts, traces, watch
from loadgen.client import Client, Target
from loadgen.clients import Crew, enough
from loadgen.dialects import Name
from loadgen.judge import Verdict, judge
from loadgen.records import Incident, Record, Run
from loadgen.replay import Options, Progress, Replay
from loadgen.report import text
from loadgen.report_html import page
from loadgen.targets import PUBLISHED, Budgets

START_MAX_S = 300.0  # a first start converts the model
STOP_MAX_S = 40.0  # a drain takes up to 30 s
PROGRESS_S = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What `headway-loadgen replay` was asked for."""

    trace: Path
    target: str
    out: Path
    serve: str = ""
    model: str = ""
    budgets: Path | None = None
    seed: int = 1
    speed: float = 1.0
    duration_s: float = 0.0  # 0: the trace's own span
    warmup_s: float = 0.0
    clients: int = 0  # processes; 0: as many as the trace needs
    admin: str = ""  # a router's admin listener, to be watched
    stripped_share: float = 0.2
    dialect: Name = "completions"
    grace_s: float = 30.0
    is_strict: bool = False


def carry_out(plan: Plan) -> Verdict:
    """Replay, judge and publish. Raises ValueError for a trace or a target that cannot be used."""
    trace = formats.load(plan.trace, plan.is_strict)
    if plan.out.with_suffix(".jsonl").resolve() == plan.trace.resolve():
        raise ValueError(f"--out {plan.out} would write the records over the trace")
    Target.parse(plan.target)
    with serving(shlex.split(plan.serve), plan.target):
        run, found = measure(plan, trace)
    records.write(run, found, plan.out.with_suffix(".jsonl"))  # first: what was measured outlives a bug below
    return publish(run, found, targets.parse_budgets(run.budgets), plan.out)


def measure(plan: Plan, trace: traces.Trace, budgets: Budgets | None = None) -> tuple[Run, list[Record]]:
    """One run against a server that is up; with these budgets, or those that the plan or the target names."""
    texts.check(trace.rows, plan.dialect)
    if plan.admin:
        watch.check(plan.admin)
    served = targets.ask(plan.target)
    options = Options(
        model=plan.model or served.model,
        seed=plan.seed,
        speed=plan.speed,
        duration_s=plan.duration_s or span_s(trace, plan.speed),
        stripped_share=plan.stripped_share,
        dialect=plan.dialect,
        grace_s=plan.grace_s,
    )
    if plan.warmup_s >= options.duration_s:
        raise ValueError(f"a warm-up of {plan.warmup_s:g} s leaves nothing to judge of {options.duration_s:g} s")
    promised, budgets_from = (
        (budgets, "--budgets, or else the first side, for every run")
        if budgets is not None
        else _budgets(plan, served.budgets)
    )
    count = plan.clients or enough(trace, span_s(trace, plan.speed), os.cpu_count() or 1)
    target = Target.parse(plan.target)
    replay = Replay(trace, Client(target), options) if count == 1 else Crew(trace, target, options, count)
    started, began, cpu = datetime.now(UTC), time.monotonic(), time.process_time()
    incidents: list[Incident] = []
    is_interrupted = _run(replay, watch.watch(plan.admin, replay.now, incidents) if plan.admin else None)
    wall_s = time.monotonic() - began
    run = Run(
        target=plan.target,
        model=options.model,
        trace_name=plan.trace.name,
        trace_digest=hashlib.sha256(traces.encode(trace)).hexdigest()[:12],
        trace_notes=trace.header.notes,
        trace_bad_rows=trace.bad_count,
        dialect=plan.dialect,
        seed=plan.seed,
        speed=plan.speed,
        stripped_share=plan.stripped_share,
        duration_s=min(options.duration_s, wall_s) if is_interrupted else options.duration_s,
        warmup_s=plan.warmup_s,
        wall_s=wall_s,
        started=started.isoformat(timespec="seconds"),
        machine=machine(),
        version=version(),
        client_cpu_s=time.process_time() - cpu + (replay.cpu_s if isinstance(replay, Crew) else 0.0),
        clients=count,
        is_interrupted=is_interrupted,
        not_reached=replay.not_reached,
        budgets=targets.to_plain(promised),
        budgets_from=budgets_from,
        incidents=incidents,
    )
    return run, replay.records


def publish(run: Run, found: Sequence[Record], budgets: Budgets, out: Path) -> Verdict:
    """Judge, print, and write OUT.json and OUT.html."""
    verdict = judge(run, found, budgets)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(verdict), indent=1))
    out.with_suffix(".html").write_text(page(verdict, found, budgets), encoding="utf-8")
    print(text(verdict, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    print(f"\nwrote {out.with_suffix('.html')} and .json")
    return verdict


def read_budgets(path: Path) -> Budgets:
    """Budgets from a file: the JSON of /readyz, or its `budgets` alone."""
    parsed = msgspec.json.decode(path.read_bytes())
    return targets.parse_budgets(parsed.get("budgets", parsed) if isinstance(parsed, dict) else parsed)


def _budgets(plan: Plan, served: Budgets | None) -> tuple[Budgets, str]:
    if plan.budgets is not None:
        return read_budgets(plan.budgets), str(plan.budgets)
    if served is not None:
        return served, "the target's /readyz"
    return PUBLISHED, "the published defaults: the target states none"


def span_s(trace: traces.Trace, speed: float) -> float:
    """Composed traces say how long they are; others last until their last nominal start."""
    noted = trace.header.notes.get("duration_s")
    whole_s = float(noted) if isinstance(noted, (int, float)) else max(traces.nominal_starts_s(trace.rows))
    return max(whole_s, 1e-3) / speed


def _run(replay: Replay | Crew, beside: Coroutine[None, None, None] | None) -> bool:
    """True when it was interrupted. SIGINT cancels the replay, which then winds down by itself."""

    async def main() -> bool:
        task = asyncio.ensure_future(replay.run())
        others = [asyncio.ensure_future(one) for one in (_show_progress(replay), beside) if one is not None]
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return True
        finally:
            for other in others:
                other.cancel()
            print(file=sys.stderr)
        return False

    return uvloop.run(main())


async def _show_progress(replay: Replay | Crew) -> None:
    is_terminal = sys.stderr.isatty()
    every_s = PROGRESS_S if is_terminal else 10 * PROGRESS_S
    while True:
        await asyncio.sleep(every_s)
        line = _progress_line(replay.progress(), replay.options.duration_s)
        print(f"\r\x1b[K{line}" if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)


def _progress_line(now: Progress, duration_s: float) -> str:
    return (
        f"{min(now.at_s, duration_s):4.0f} of {duration_s:.0f} s   offered {now.offered}   open {now.open}   "
        f"done {now.done}   other {now.other}"
    )


@contextlib.contextmanager
def serving(command: Sequence[str], url: str) -> Iterator[None]:
    """Run a server around the block: ready before it, stopped with SIGINT after it. No command: nothing."""
    if not command:
        yield
        return
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_ready(process, url)
        yield
    finally:
        _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    print(f"waiting for {url.rstrip('/')}/readyz", file=sys.stderr, flush=True)
    until = time.monotonic() + START_MAX_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ValueError(f"the server ended with code {process.returncode} before it was ready")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url.rstrip("/") + "/readyz", timeout=2.0).status_code == 200:
                return
        time.sleep(0.2)
    raise ValueError(f"the server was not ready at {url} within {START_MAX_S:.0f} s: does it serve there?")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_MAX_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def machine() -> str:
    """The machine in words, for the report."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{os.cpu_count()} cores of {name}, {platform.system()}, Python {platform.python_version()}"


def version() -> str:
    try:
        return metadata.version("headway")
    except metadata.PackageNotFoundError:
        return "unknown"
