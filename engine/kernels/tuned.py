"""Which kernel computes a matrix product: tables measured per device, and a rule for shapes nobody has measured.

Owns Choice and the reading of tuned/<device>.json. Never imports torch or triton, never measures."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

Kernel = Literal["gemv", "dot", "tma", "cublas"]
Role = Literal["norm", "gated", "residual", "plain"]  # the epilogue; "gated" has the norm too

GEMV_ROWS_MAX = 2  # row-dot loses to tensor cores from 4 rows on, except on the smallest shapes (1.6-2.3x at 8)
OWN_ROWS_MAX = 64  # beyond, a shape nobody has measured goes to cuBLAS
# Up to so many rows 8-bit weights are the product's second operand: copied to shared memory by 16 bytes, read by 8. As
# its first, which wgmma takes widened from registers, by 8 and by 2; from 64 rows on the second would be written again.
FP8_STRAIGHT_ROWS_MAX = 32
GEMV_BYTES_AHEAD = 16384  # weight bytes a GEMV program holds in registers before its input is ready


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel and its tile. `cublas` uses none of the numbers."""

    kernel: Kernel
    block_n: int = 64
    block_k: int = 128
    head_k: int = 0  # gemv: columns read ahead of the input
    stages: int = 3
    warps: int = 4
    splits: int = 1
    is_swapped: bool = True
    rows_max: int = 256  # rows of one tile; more rows are more tiles
    is_norm_apart: bool = False  # a norm kernel before; inside the product it costs more from about 100 rows on
    pdl: int = 0  # programmatic launch: 0 off, 1 signal at once, 2 signal after the loop


CUBLAS = Choice("cublas")


@dataclass(frozen=True, slots=True)
class Table:
    """Measured choices of one device: (role, outputs, columns) -> rows -> choice."""

    device: str
    linear: dict[tuple[str, int, int], dict[int, Choice]]
    fp8: dict[tuple[str, int, int], dict[int, Choice]] = field(default_factory=dict)  # the same for weights of 8 bits

    is_library: bool = False  # every product by cuBLAS: the fall-back when our kernels fail their self-check

    @classmethod
    def empty(cls, device: str) -> Table:
        """A table that knows nothing: every choice is the rule's."""
        return cls(device, {})


def library(device: str) -> Table:
    """A table that chooses cuBLAS for everything."""
    return Table(device, {}, is_library=True)


def slug(device: str) -> str:
    """The file name of a device: `NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@cache
def load(device: str, folder: Path = Path(__file__).parent / "tuned") -> Table:
    """The shipped table of a device, or an empty one."""
    path = folder / f"{slug(device)}.json"
    return parse(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Table.empty(device)


def parse(raw: dict[str, Any]) -> Table:
    """A table from its JSON: {"device", "linear": [{"role", "outputs", "columns", "rows": {"16": {...}}}], "fp8": [the
    same, where measured]}."""
    return Table(raw["device"], _measured(raw["linear"]), _measured(raw.get("fp8", [])))


def _measured(shapes: list[dict[str, Any]]) -> dict[tuple[str, int, int], dict[int, Choice]]:
    return {
        (shape["role"], shape["outputs"], shape["columns"]): {
            int(rows): Choice(**choice) for rows, choice in shape["rows"].items()
        }
        for shape in shapes
    }


def choose(table: Table, role: Role, rows: int, outputs: int, columns: int, *, is_fp8: bool = False) -> Choice:
    """The measured choice of the next larger row count, else the rule's. `outputs` counts what is stored."""
    if table.is_library:
        return CUBLAS
    measured = (table.fp8 if is_fp8 else table.linear).get((role, outputs, columns), {})
    at_least = [count for count in measured if count >= rows]
    return measured[min(at_least)] if at_least else rule(role, rows, outputs, columns, is_fp8=is_fp8)


def rule(role: Role, rows: int, outputs: int, columns: int, *, is_fp8: bool = False) -> Choice:
    """For shapes nobody has measured: the tiles that did well on ten shapes of an H100, where they divide evenly. Those
    for weights of 8 bits are reasoned from what the compiler makes of them, not measured."""
    if rows > OWN_ROWS_MAX:
        return CUBLAS
    choice = _gemv(role, rows, outputs, columns, is_fp8=is_fp8) if rows <= GEMV_ROWS_MAX else None
    choice = choice or _dot(role, outputs, columns)
    if choice and is_fp8 and choice.kernel == "dot":
        return replace(choice, is_swapped=choice.is_swapped and rows > FP8_STRAIGHT_ROWS_MAX)
    return choice or CUBLAS


def _gemv(role: Role, rows: int, outputs: int, columns: int, *, is_fp8: bool) -> Choice | None:
    head = max((size for size in (4096, 2048, 1024, 512) if size <= columns), default=0)
    sizes = (2048, min(head, 1024)) if is_fp8 else (min(head, 1024),)  # of 8 bits twice as many for as many bytes
    block_k = next((size for size in sizes if 0 < size <= head and (columns - head) % size == 0), 0)
    if not block_k:
        return None
    weights_a_row = (1 if is_fp8 else 2) * head * (2 if role == "gated" else 1)
    block_n = max(1, min(4, GEMV_BYTES_AHEAD // weights_a_row) // (rows if is_fp8 else 1))  # else 215 registers
    warps = max(1, min(4, block_k // 256))  # fewer columns a warp and x goes through shared memory in every iteration
    return Choice("gemv", block_n, block_k, head, warps=warps) if outputs % block_n == 0 else None


def _dot(role: Role, outputs: int, columns: int) -> Choice | None:
    block_k = max((size for size in (128, 64, 32) if columns % size == 0), default=0)
    block_n = max((size for size in (64, 32) if outputs % size == 0 and outputs // size >= 64), default=32)
    if not block_k or outputs % block_n:
        return None
    programs = outputs // block_n
    splits = 1
    if role in ("residual", "plain"):  # a norm needs whole rows of x in one program
        while programs * splits < 128 and splits < 4 and columns % (2 * splits * block_k) == 0:
            splits *= 2
    return Choice("dot", block_n, block_k, stages=4, splits=splits, is_swapped=block_n >= 64)
