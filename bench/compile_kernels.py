"""Every kernel that a worker launches on an H100, compiled without one: registers, bytes spilled, shared memory.

    python3 bench/compile_kernels.py [--models llama-8b,qwen3-0.6b] [--weights bf16,fp8] [--kv bf16,fp8] [--jobs 2]
                                     [--device "NVIDIA H100 80GB HBM3"]

Owns the table. What is compiled is the list that a worker's start compiles (engine/compute/precompile.py). The
interpreter of the tests accepts what the compiler refuses, so CI runs both. Exits 1 when a kernel does not compile or
spills more than SPILL_BYTES_MAX."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.pop("TRITON_INTERPRET", None)

from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from engine.compute.precompile import Absent, Special, compiled, specials
from engine.config import GPU_BLOCK_TOKENS, GPU_SEQUENCES_MAX
from engine.models import config

MODELS = Path(__file__).parent / "models"
CAPABILITY = 90
# By Triton 3.7.1 the shared-prefix tile with query norms spills 1,740 bytes at its 128 registers and 792 at 255.
SPILL_BYTES_MAX = 2048


def constants(special: Special) -> dict[str, Any]:
    """Compile-time constants and options by name."""
    data = json.loads(special.data)
    names = getattr(importlib.import_module(special.module), special.kernel).arg_names
    found = {names[at]: value for (at,), value in zip(data["constant_keys"], data["constant_vals"], strict=True)}
    return found | {name: data["options"][name] for name in ("num_warps", "num_stages", "maxnreg")}


def named(wanted: Iterable[Special]) -> list[tuple[str, Special]]:
    """Each with what tells it from its kernel's others."""
    groups: dict[str, list[Special]] = defaultdict(list)
    for special in wanted:
        groups[special.kernel].append(special)
    rows = []
    for kernel, group in groups.items():
        facts = [constants(special) for special in group]
        telling = [name for name in facts[0] if len({str(fact.get(name)) for fact in facts}) > 1]
        for special, fact in zip(group, facts, strict=True):
            told = (name if fact[name] is True else f"{name}={fact[name]}" for name in telling if fact.get(name))
            rows.append((" ".join([kernel, *told]), special))
    return rows


def measured(special: Special) -> tuple[int, int, int, str]:
    """Registers, spilled bytes, shared bytes, problem."""
    try:
        made = compiled(special)
    except Exception as problem:  # border: the compiler's complaint is the result  # noqa: BLE001
        return 0, 0, 0, f"{type(problem).__name__}: {str(problem)[-300:]}"
    return *assembled(made.asm["ptx"]), int(made.metadata.shared), ""


def assembled(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes, as the assembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    return int(registers[1]) if registers else 0, int(spilled[1]) if spilled else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-8b,qwen3-0.6b")
    parser.add_argument("--device", default="NVIDIA H100 80GB HBM3")
    parser.add_argument("--weights", default="bf16,fp8")
    parser.add_argument("--kv", default="bf16,fp8")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    driver.set_active(Absent(CAPABILITY))
    logging.disable(logging.WARNING)  # the self-check fails where nothing runs
    is_fine = True
    for model in options.models.split(","):
        shape = config.read(MODELS / model)
        facts = (options.device, GPU_BLOCK_TOKENS, GPU_SEQUENCES_MAX)
        kinds = itertools.product(options.weights.split(","), options.kv.split(","))
        lists = [specials(shape, *facts, has_fp8_weights=w == "fp8", is_kv_fp8=kv == "fp8") for w, kv in kinds]
        rows = named({special.key: special for wanted in lists for special in wanted}.values())
        print(f"{model}: {len(rows)} kernels\nregisters  spilled   shared  kernel")
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
            found = pool.map(measured, [special for _, special in rows])
            for (name, _), (registers, spilled, shared, problem) in zip(rows, found, strict=True):
                is_fine &= not problem and spilled <= SPILL_BYTES_MAX
                print(f"{registers:9} {spilled:8} {shared:8}  {name}  {problem}", flush=True)
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
