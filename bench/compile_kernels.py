"""Every kernel compiled for an H100 without a GPU: registers a thread, bytes spilled, shared memory a program.

    python3 bench/compile_kernels.py [--device "NVIDIA H100 80GB HBM3"] [--jobs 2]

Owns nothing but the signatures. The interpreter of the tests accepts what the compiler refuses, so CI runs both.
Exits 1 when a kernel does not compile or spills more than SPILL_BYTES_MAX."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from engine.kernels import attend, linear, plan, prefill, rows, sample, tuned

TARGET = GPUTarget("cuda", 90, 32)
SPILL_BYTES_MAX = 1024  # by Triton 3.7.1 the shared-prefix tile spills 804 bytes, prefill 160; by 3.6.0 264 at most
HALF, FLOAT, INT, BYTE = "*bf16", "*fp32", "*i32", "*i8"
ROW_COUNTS = (1, 16, 64, 128, 256)


@dataclass(frozen=True)
class Case:
    """One specialisation."""

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def products(device: str) -> list[Case]:
    """The tuned choices, once per tile and epilogue."""
    cases: dict[str, Case] = {}
    for (role, _, _), by_rows in tuned.load(device).linear.items():
        for row_count, choice in by_rows.items():
            if choice.kernel != "cublas" and row_count in ROW_COUNTS:
                case = product(role, row_count, choice)
                cases[case.name] = case
    return list(cases.values())


def product(role: str, row_count: int, choice: tuned.Choice) -> Case:
    """The kernel that linear() would launch."""
    pointers = dict.fromkeys(("x", "w", "bias", "residual", "y"), HALF)
    flags = {
        "EPS": 1e-5,
        "NORM": role in ("norm", "gated") and not choice.is_norm_apart,
        "BIAS": False,
        "GATED": role == "gated",
        "RESIDUAL": role == "residual",
        "PDL": choice.pdl,
    }
    name = f"{role} {row_count} rows {choice.block_n}x{choice.block_k}"
    if choice.kernel == "gemv":
        types = pointers | dict.fromkeys(("M", "N", "K"), "i32")
        constants = {"ROWS": row_count, "BN": choice.block_n, "HEAD": choice.head_k, "BK": choice.block_k, **flags}
        return Case(f"gemv {name}", "linear", "gemv", types, constants, {"num_warps": choice.warps})
    tile_rows = min(max(16, row_count), choice.rows_max)
    types = pointers | {"partials": FLOAT, "arrivals": INT} | dict.fromkeys(("M", "N", "K", "K_PART", "SPLITS"), "i32")
    if choice.kernel == "tma":
        types["x"] = f"tensordesc<bf16[{tile_rows},{choice.block_k}]>"
        types["w"] = f"tensordesc<bf16[{choice.block_n},{choice.block_k}]>"
    constants = {
        "ROWS": tile_rows,
        "BN": choice.block_n,
        "BK": choice.block_k,
        "SWAP": choice.is_swapped,
        "TMA": choice.kernel == "tma",
        "SPLIT": choice.splits > 1,
        **flags,
    }
    options = {"num_warps": choice.warps, "num_stages": choice.stages}
    return Case(f"{choice.kernel} {name} s{choice.stages} w{choice.warps}", "linear", "gemm", types, constants, options)


def attention() -> list[Case]:
    """The 8B shape: decode, verify, shared, merge, chunks, writing, plan."""
    shape = {"H": 32, "HEAD_DIM": 128, "D": 128}
    tiles = shape | {"HK": 8, "G": 4, "GP": 4, "BLOCK": 64, "EPS": 1e-5, "NORMED": True, "AHEAD": False, "PDL": 2}
    pointers = dict.fromkeys(("qkv", "kv", "out"), HALF) | dict.fromkeys(
        ("turn", "q_norm", "k_norm", "part_o", "part_lse"), FLOAT
    )
    pointers |= dict.fromkeys(("table", "items", "item_count", "slots", "slot_starts"), INT)
    types = pointers | {"TABLE_STRIDE": "i32", "BLOCK_STRIDE": "i32", "scale": "fp32"}
    many, deep = {"num_warps": 4, "num_stages": 2, "maxnreg": 128}, {"num_warps": 4, "num_stages": 3}
    lists = dict.fromkeys(
        (
            "row_starts",
            "contexts",
            "shared",
            "leads",
            "items",
            "shared_items",
            "chunk_items",
            "counts",
            "slot_starts",
            "part_size",
        ),
        INT,
    )
    return [
        Case(
            "attend decode, 528 programs",
            "attend",
            "attend",
            types,
            tiles | {"ROWS": 16, "R": 1, "SHARED": False},
            many,
        ),
        Case(
            "attend decode, 264 programs",
            "attend",
            "attend",
            types,
            tiles | {"ROWS": 16, "R": 1, "SHARED": False},
            deep,
        ),
        Case("attend verify 4", "attend", "attend", types, tiles | {"ROWS": 16, "R": 4, "SHARED": False}, deep),
        Case("attend shared", "attend", "attend", types, tiles | {"ROWS": 64, "R": 1, "SHARED": True}, deep),
        Case(
            "merge",
            "attend",
            "merge",
            {"part_o": FLOAT, "part_lse": FLOAT, "slot_starts": INT, "row_starts": INT, "out": HALF},
            shape | {"G": 4, "GP": 4, "R": 1, "CHUNK": 8, "PDL": 2},
            {"num_warps": 4},
        ),
        Case(
            "plan",
            "plan",
            "plan_step",
            lists | {"N": "i32"},
            {
                "S": 256,
                "R": 1,
                "BLOCK": 64,
                "MEMBERS": 16,
                "SHARED_PART": 256,
                "CHUNK_ROWS": 32,
                "HAS_SHARED": True,
                "HAS_CHUNKS": True,
            },
            {"num_warps": 8},
        ),
        Case(
            "prefill",
            "prefill",
            "prefill",
            dict.fromkeys(("table", "row_starts", "contexts", "chunk_items", "counts"), INT)
            | {
                "qkv": HALF,
                "kv": "tensordesc<bf16[64,128]>",
                "out": HALF,
                "layer": "i32",
                "TABLE_STRIDE": "i32",
                "LAYERS": "i32",
                "scale": "fp32",
            },
            shape | {"HK": 8, "BLOCK": 64, "ROWS": 128, "PACK": 4},
            deep,
        ),
        Case(
            "rope_write",
            "rows",
            "rope_write",
            {
                "qkv": HALF,
                "turn": FLOAT,
                "q_norm": FLOAT,
                "k_norm": FLOAT,
                "kv": HALF,
                "slots": INT,
                "BLOCK_STRIDE": "i32",
            },
            shape | {"HK": 8, "BLOCK": 64, "HEADS": 32, "EPS": 1e-5, "NORMED": True},
            {"num_warps": 4},
        ),
    ]


def others() -> list[Case]:
    """Rows and sampling at 4096 wide and 128,256 tokens."""
    knobs = dict.fromkeys(
        ("logits", "temperatures", "top_ps", "min_ps", "uniforms", "sub_best", "chunk_sum", "values"), FLOAT
    )
    knobs |= {"top_ks": INT, "names": INT, "subs": INT, "ids": INT, "is_bad": BYTE}
    return [
        Case(
            "embed",
            "rows",
            "embed",
            {
                "ids": INT,
                "positions": INT,
                "table": HALF,
                "frequencies": FLOAT,
                "x": HALF,
                "turn": FLOAT,
                "WIDTH": "i32",
                "HALF": "i32",
            },
            {"W": 4096, "D": 64},
            {"num_warps": 4},
        ),
        Case(
            "norm",
            "rows",
            "norm_rows",
            {"x": HALF, "rows": INT, "weight": HALF, "y": HALF, "WIDTH": "i32"},
            {"W": 4096, "EPS": 1e-5, "PICKED": True, "WEIGHTED": True},
            {"num_warps": 4},
        ),
        Case("gate", "rows", "gate_rows", {"gate_up": HALF, "y": HALF, "WIDTH": "i32"}, {"W": 2048}, {"num_warps": 4}),
        Case(
            "scan",
            "sample",
            "scan",
            {
                "logits": FLOAT,
                "temperatures": FLOAT,
                "sub_best": FLOAT,
                "chunk_sum": FLOAT,
                "V": "i32",
                "SUBS": "i32",
                "CHUNKS": "i32",
            },
            {},
            {"num_warps": 8},
        ),
        Case(
            "choose",
            "sample",
            "choose",
            knobs | {"V": "i32", "SUB_STRIDE": "i32", "CHUNKS": "i32"},
            {"SUBS": 512, "CHUNKS_PAD": 32},
            {"num_warps": 8},
        ),
    ]


MODULES = {"attend": attend, "linear": linear, "plan": plan, "prefill": prefill, "rows": rows, "sample": sample}
DIVISIBLE = {"N", "K", "K_PART", "BLOCK_STRIDE", "WIDTH", "V"}  # by 16, as real shapes are: wide loads need to know


def compiled(case: Case) -> tuple[str, int, int, int, str]:
    """Name, registers, spilled bytes, shared bytes, problem."""
    kernel = getattr(MODULES[case.module], case.kernel)
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in DIVISIBLE
    }
    try:
        made = triton.compile(
            ASTSource(kernel, signature, case.constants, attributes), target=TARGET, options=case.options
        )
    except Exception as problem:  # border: the compiler's complaint is the result  # noqa: BLE001
        return case.name, 0, 0, 0, f"{type(problem).__name__}: {str(problem)[-300:]}"
    registers, spilled = assembled(made.asm["ptx"])
    return case.name, registers, spilled, int(made.metadata.shared), ""


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="NVIDIA H100 80GB HBM3")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    cases = attention() + others() + products(options.device)
    print(f"{'kernel':48} registers  spilled   shared")
    is_fine = True
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, registers, spilled, shared, problem in pool.map(compiled, cases):
            is_fine &= not problem and spilled <= SPILL_BYTES_MAX
            print(f"{name:48} {registers:9} {spilled:8} {shared:8}  {problem}", flush=True)
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
