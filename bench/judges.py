"""Two judges, one server, one trace: goodput as `headway-loadgen` counts it beside aiperf's, at the same flat targets.

Owns the recipe. Never part of CI: aiperf wants an environment of its own (pip install aiperf==0.13.0) and a minute."""

# python -m bench.judges TRACE --aiperf PATH/TO/aiperf --tokenizer FOLDER. The server is bench.fake_engine with a few
# slots, so that first tokens wait in line: who sends late, or counts from the wrong moment, gets other figures.

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec

from bench.judge import engine
from loadgen import formats, records, shape
from loadgen.compose import scale
from loadgen.formats import export
from loadgen.judge import judge
from loadgen.session import Plan, measure
from loadgen.targets import BudgetLine, Budgets
from loadgen.traces import Trace

FIRST_S, PACE_S = 0.05, 0.02
LIMIT_S = 600.0
HUB_ID = "0" * 40


def slice_of(path: Path, seconds: float, divisor: int) -> Trace:
    """The first seconds, small enough for any machine, without answers of one token: aiperf calls those bad, for
    they have no pace; here they are met by their first token."""
    whole = shape.jitter(formats.load(path), 3.0, seed=1)  # the recorder's steps would be bursts
    rows = tuple(row for row in whole.rows if row.timestamp is not None and row.timestamp < seconds * 1e3)
    scaled = scale(replace(whole, rows=rows), divisor)
    return replace(scaled, rows=tuple(row for row in scaled.rows if row.output_length > 1))


def ours(trace: Trace, port: int, ttft_s: float, tpot_s: float, folder: Path) -> tuple[int, int]:
    """Met and offered."""
    line = BudgetLine(ttft_s=ttft_s, tpot_s=tpot_s)
    budgets: Budgets = {"chatbot+": line, "background-agent": line, "data-processor": line}
    plan = Plan(folder / "trace.jsonl", f"http://127.0.0.1:{port}", folder / "ours", model="m", dialect="chat")
    run, found = measure(replace(plan, stripped_share=0.0), trace, budgets)
    records.write(run, found, folder / "ours.jsonl")
    verdict = judge(run, found, budgets)
    print(f"headway-loadgen: lag p99 {verdict.lag_ms.p99:.1f} ms, invalid: {verdict.invalid or 'no'}")
    return verdict.met, verdict.offered


def theirs(folder: Path, arguments: argparse.Namespace, port: int, block: int) -> tuple[int, int]:
    """Good and all, by aiperf's own export."""
    goodput = f"time_to_first_token:{1e3 * arguments.ttft:g} inter_token_latency:{1e3 * arguments.tpot:g}"
    command = [str(arguments.aiperf), "profile", "-m", "m", "-u", f"http://127.0.0.1:{port}", "--endpoint-type", "chat"]
    command += ["--streaming", "--input-file", str(folder / "aiperf.jsonl"), "--custom-dataset-type", "mooncake_trace"]
    command += ["--fixed-schedule", "--isl-block-size", str(block), "--tokenizer", "local/model", "--goodput", goodput]
    command += ["--ui-type", "none", "--no-gpu-telemetry", "--no-server-metrics"]
    command += ["--artifact-dir", str(folder / "aiperf")]
    told = {**os.environ, "HF_HOME": str(hub(folder / "hf", arguments.tokenizer)), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=told, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
    found = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
    return round(found["good_request_count"]["avg"]), round(found["request_count"]["avg"])


def hub(folder: Path, tokenizer: Path) -> Path:
    """A cache of the hub with one model: aiperf takes hash ids only with a tokenizer that has a name there."""
    model = folder / "hub" / "models--local--model"
    kept = model / "snapshots" / HUB_ID
    kept.mkdir(parents=True)
    for path in tokenizer.glob("*.json"):
        shutil.copy(path, kept)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(HUB_ID)
    return folder


def main() -> None:
    """Both, one after the other, each with a server of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="a Mooncake trace")
    parser.add_argument("--aiperf", type=Path, required=True, help="its command")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with tokenizer.json and config.json")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--divisor", type=int, default=16, help="of tokens and blocks")
    parser.add_argument("--slots", type=int, default=3)
    parser.add_argument("--ttft", type=float, default=0.5, metavar="S")
    parser.add_argument("--tpot", type=float, default=0.03, metavar="S")
    parser.add_argument("--keep", type=Path, help="a folder for the records of both")
    arguments = parser.parse_args()
    asked = slice_of(arguments.trace, arguments.seconds, arguments.divisor)
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        export.write(asked, folder / "aiperf.jsonl", "aiperf")
        with engine(FIRST_S, PACE_S, f"slots={arguments.slots}") as port:
            met, offered = ours(asked, port, arguments.ttft, arguments.tpot, folder)
        with engine(FIRST_S, PACE_S, f"slots={arguments.slots}") as port:
            good, counted = theirs(folder, arguments, port, asked.header.block_size)
    print(f"headway-loadgen: {met} of {offered} met ({met / offered:.1%})")
    print(f"aiperf:          {good} of {counted} good ({good / counted:.1%})")
    print(msgspec.json.encode({"ours": met, "theirs": good, "apart": abs(met - good) / max(met, 1)}).decode())


if __name__ == "__main__":
    main()
