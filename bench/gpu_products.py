"""Matrix products of few rows: every tile worth trying against its oracle, cuBLAS and the weight's bytes.

Owns the candidates and the tuned table made of the winners. A tile that is wrong, or not the same twice, never wins."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu_timing import BF16, CUDA, PAST_L2_BYTES, ceilings, error, microseconds
from engine.kernels import fp8, ref, rows, scaled, tuned
from engine.kernels.linear import Epilogue, Scratch, linear
from engine.kernels.scaled import Scaled, Weight
from engine.kernels.tuned import CUBLAS, Choice

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PARTIALS = 8 << 20

Role = str
PRODUCTS: dict[str, dict[str, tuple[Role, int, int]]] = {
    "8b": {
        "qkv": ("norm", 6144, 4096), "o": ("residual", 4096, 4096), "gate_up": ("gated", 14336, 4096),
        "down": ("residual", 4096, 14336), "head": ("plain", 128256, 4096),
    },
    "0.6b": {
        "qkv": ("norm", 4096, 1024), "o": ("residual", 1024, 2048), "gate_up": ("gated", 3072, 1024),
        "down": ("residual", 1024, 3072), "head": ("plain", 151936, 1024),
    },
    "8b/2": {  # a rank's part of two; the head is whole
        "qkv": ("norm", 3072, 4096), "o": ("residual", 4096, 2048), "gate_up": ("gated", 7168, 4096),
        "down": ("residual", 4096, 7168),
    },
}  # fmt: skip
LAYERS = {"8b": 32, "0.6b": 28, "8b/2": 32}


def candidates(role: Role, row_count: int, outputs: int, columns: int, *, is_fp8: bool = False) -> Iterator[Choice]:
    """Tiles worth trying: those that won for some shape of micro-measurements on an H100, and their neighbours; for
    weights of 8 bits those that the compiler makes without spills."""
    if row_count <= 2:
        yield from _gemv_candidates(role, outputs, columns, is_fp8=is_fp8)
    if row_count == 1:
        return
    for kernel in ("dot", "tma"):
        if kernel == "tma" and (row_count < 32 or is_fp8):
            continue
        tiles = _fp8_tiles(role, row_count) if is_fp8 else _tiles(role, kernel, row_count)
        for block_n, block_k, stages, warps, swapped in tiles:
            for rows_max in (256, 128) if row_count == 256 else (256,):
                tile_rows = min(max(16, row_count), rows_max)
                weights = block_n * (2 if role == "gated" else 1) * (1 if is_fp8 else 2)
                shared = (weights + 2 * tile_rows) * block_k * stages
                if outputs % block_n or columns % block_k or shared > 225 << 10:
                    continue
                for splits in (1, 2, 4, 7) if role == "residual" else (1,):
                    programs = outputs // block_n * splits
                    if columns % (splits * block_k) or (splits > 1 and programs > 700):
                        continue
                    if splits > 1 and programs * block_n * row_count // outputs * outputs > PARTIALS:
                        continue
                    choice = Choice(kernel, block_n, block_k, 0, stages, warps, splits, swapped, rows_max)  # type: ignore[arg-type]
                    if row_count <= 128 or role not in ("norm", "gated"):
                        yield choice
                    if row_count >= 32 and role in ("norm", "gated"):
                        yield replace(choice, is_norm_apart=True)


GEMV_TILES = ((1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (2, 2048, 8))
GEMV_FP8_TILES = ((1, 2048, 4), (2, 2048, 4), (4, 2048, 4), (8, 2048, 4), (4, 1024, 4), (4, 2048, 8))


def _gemv_candidates(role: Role, outputs: int, columns: int, *, is_fp8: bool) -> Iterator[Choice]:
    for head in (8192, 4096, 2048, 1024) if is_fp8 else (4096, 2048, 1024):
        for block_n, block_k, warps in GEMV_FP8_TILES if is_fp8 else GEMV_TILES:
            weights = block_n * head * (2 if role == "gated" else 1)
            if head > columns or (columns - head) % block_k or outputs % block_n or head < 256 * warps:
                continue
            if 2048 <= weights <= (32768 if is_fp8 else 16384):
                yield Choice("gemv", block_n, block_k, head, warps=warps)


def _tiles(role: Role, kernel: str, row_count: int) -> list[tuple[int, int, int, int, bool]]:
    """block_n, block_k, stages, warps, swapped; a gated tile reads twice block_n weight rows."""
    if kernel == "tma":
        if role == "gated":
            return [
                (64, 64, 5, 4, True),
                (64, 128, 3, 8, True),
                (64, 64, 4, 8, True),
                (128, 64, 3, 8, False),
                (128, 64, 4, 8, True),
            ]
        return [(64, 128, 4, 4, True), (128, 64, 5, 4, True), (128, 64, 5, 8, True), (128, 128, 3, 8, True)]
    if role == "gated":
        tiles = [
            (64, 128, 3, 4, True),
            (64, 64, 5, 4, True),
            (64, 128, 3, 8, True),
            (64, 64, 4, 8, True),
            (128, 64, 3, 8, True),
        ]
        return tiles + (
            [(32, 128, 4, 4, False), (16, 256, 3, 4, False), (32, 256, 3, 4, False)] if row_count <= 64 else []
        )
    tiles = [(64, 128, 4, 4, True), (64, 256, 3, 4, True), (128, 128, 3, 8, True), (128, 64, 5, 4, True)]
    return tiles + ([(32, 256, 3, 4, False), (32, 128, 5, 4, False)] if row_count <= 64 else [])


def _fp8_tiles(role: Role, row_count: int) -> list[tuple[int, int, int, int, bool]]:
    """The same for weights of 8 bits: straight while the rows fit one tile of the older instruction (tuned.py)."""
    if row_count <= 32:
        tiles = [(32, 128, 5, 4, False), (64, 128, 4, 4, False), (16, 256, 4, 4, False), (64, 256, 3, 8, False)]
        return [*tiles, (32, 256, 3, 4, False), (64, 128, 4, 4, True)]
    tiles = [(64, 128, 4, 4, True), (64, 128, 3, 8, True), (64, 64, 5, 4, True)]
    return tiles if role == "gated" else [*tiles, (128, 128, 3, 8, True), (64, 256, 3, 8, True)]


def epilogue_of(role: Role) -> Epilogue:
    return Epilogue(1e-5 if role in ("norm", "gated") else None, role == "gated")


def all_choices(*, is_fp8: bool = False) -> list[tuple[Role, int, Choice]]:
    """Every kernel that the product section will launch, once."""
    found = {
        (role, row_count, replace(choice, pdl=pdl))
        for model in PRODUCTS.values()
        for role, outputs, columns in model.values()
        for row_count in ROWS
        for choice in candidates(role, row_count, outputs, columns, is_fp8=is_fp8)
        if role != "plain" or not is_fp8
        for pdl in ((0, 1) if choice.kernel == "gemv" else (0,))
    }
    return sorted(found, key=repr)


def compile_all(choices: list[tuple[Role, int, Choice]], *, is_fp8: bool = False) -> None:
    """Launch product kernels on tiny operands, so that the disk cache holds them."""
    scratch = Scratch.make(CUDA, 1 << 20, 1024)
    for role, row_count, choice in choices:
        columns = choice.head_k + choice.block_k if choice.kernel == "gemv" else choice.block_k * choice.splits
        outputs = choice.block_n * 16
        try:
            x = torch.zeros(row_count, columns, device=CUDA, dtype=BF16)
            wide = torch.zeros(outputs * (2 if role == "gated" else 1), columns, device=CUDA, dtype=BF16)
            weight = scaled.stored(wide, BF16, is_fp8=is_fp8)
            out = torch.zeros(row_count, outputs, device=CUDA, dtype=torch.float32 if role == "plain" else BF16)
            epilogue = epilogue_of(role)
            epilogue = replace(epilogue, norm_eps=None) if choice.is_norm_apart else epilogue
            linear(x, weight, out, choice, scratch, epilogue, residual=out if role == "residual" else None)
        except Exception as problem:  # border: a tile may not compile; the sweep reports it again  # noqa: BLE001
            print("compile", role, row_count, choice, repr(problem)[:160], flush=True)
    torch.cuda.synchronize()


def product_section(models: list[str], deadline_s: float, *, is_fp8: bool = False) -> dict[str, Any]:
    """For every shape and row count: cuBLAS with the separate kernels it needs, and the best of our own tiles. The head
    is never of 8 bits."""
    scratch = Scratch.make(CUDA, PARTIALS)
    table: list[dict[str, Any]] = []
    for model in models:
        for name, (role, outputs, columns) in PRODUCTS[model].items():
            if role == "plain" and is_fp8:
                continue
            height = outputs * (2 if role == "gated" else 1)
            read_bytes = height * columns * (1 if is_fp8 else 2)
            copies = max(2, min(48, math.ceil(PAST_L2_BYTES / read_bytes)))
            wide = (torch.randn(height, columns, device=CUDA, dtype=BF16).mul_(0.03) for _ in range(copies))
            weights = [scaled.stored(weight, BF16, is_fp8=is_fp8) for weight in wide]
            for row_count in ROWS:
                if time.time() > deadline_s:
                    print("products: out of time at", model, name, row_count)
                    return {"products": table}
                table.append(one_product(model, name, role, outputs, columns, row_count, weights, scratch))
            del weights
    return {"products": table}


def one_product(
    model: str, name: str, role: Role, outputs: int, columns: int, row_count: int, weights: list[Weight],
    scratch: Scratch,
) -> dict[str, Any]:  # fmt: skip
    """One cell of the table."""
    x = torch.randn(row_count, columns, device=CUDA, dtype=BF16)
    out = torch.empty(row_count, outputs, device=CUDA, dtype=torch.float32 if role == "plain" else BF16)
    normed = torch.empty_like(x)
    residual = torch.randn(row_count, outputs, device=CUDA, dtype=BF16) if role == "residual" else None
    epilogue = epilogue_of(role)
    wanted = ref.linear(x, weights[0], epilogue.norm_eps, epilogue.is_gated, None, residual)
    is_fp8 = isinstance(weights[0], Scaled)
    library, bare = fp8_calls(role, x, out, residual) if is_fp8 else (cublas_call(role, x, out, residual), None)
    bare = bare or (lambda w: functional.linear(x, w))
    entry: dict[str, Any] = {
        "model": model, "shape": name, "role": role, "rows": row_count, "outputs": outputs, "columns": columns,
        "floor_us": weight_bytes(weights[0]) / ceilings().read_bytes_s * 1e6, "is_fp8": is_fp8,
        "cublas_us": library_us(library, weights), "bare_cublas_us": library_us(bare, weights),
        "trials": [], "own_us": math.inf, "own": None,
    }  # fmt: skip

    def attempt(choice: Choice) -> float:
        def run(weight: Weight) -> None:
            linear(x, weight, out, choice, scratch, epilogue, residual=residual)

        if choice.is_norm_apart:
            apart = replace(epilogue, norm_eps=None)

            def run(weight: Weight) -> None:
                linear(rows.rms_norm(x, normed, 1e-5), weight, out, choice, scratch, apart)

        try:
            out.fill_(math.nan)
            run(weights[0])
            wrong = error(out, wanted)
            time_us = microseconds([lambda w=w: run(w) for w in weights]) if wrong < 1e-2 else math.inf
            if wrong < 1e-2 and not is_repeatable(lambda: run(weights[0]), out):
                wrong = 9.0
        except Exception as problem:  # border: a tile that does not fit is a result  # noqa: BLE001
            entry["trials"].append([asdict(choice), repr(problem)[:120]])
            return math.inf
        if wrong >= 1e-2:
            print("WRONG" if wrong < 9.0 else "MOVING", model, name, row_count, choice, wrong, flush=True)
            time_us = math.inf
        entry["trials"].append([asdict(choice), round(time_us, 2), wrong])
        if time_us < entry["own_us"]:
            entry["own_us"], entry["own"] = time_us, asdict(choice)
        return time_us

    for choice in candidates(role, row_count, outputs, columns, is_fp8=is_fp8):
        attempt(choice)
    if entry["own"]:
        best = Choice(**entry["own"])
        entry["pdl_us"] = {pdl: attempt(replace(best, pdl=pdl)) for pdl in (1, 2)}
    print(
        f"{model} {name} rows {row_count}: floor {entry['floor_us']:.1f}, cublas {entry['cublas_us']:.1f} "
        f"(bare {entry['bare_cublas_us']:.1f}), own {entry['own_us']:.1f} "
        f"{short(entry['own'])} pdl {entry.get('pdl_us')}",
        flush=True,
    )
    return entry


def is_repeatable(run: Callable[[], object], out: Tensor, times: int = 30) -> bool:
    """Whether the same launch gives the same bits every time: a moving error is a race."""
    run()
    first, differs = out.clone(), torch.zeros((), device=CUDA, dtype=torch.bool)
    for _ in range(times):
        out.fill_(math.nan)
        run()
        differs |= (out != first).any()
    return not bool(differs)


def short(choice: dict[str, Any] | None) -> str:
    if choice is None:
        return "-"
    fields = (
        "kernel",
        "block_n",
        "block_k",
        "head_k",
        "stages",
        "warps",
        "splits",
        "is_swapped",
        "rows_max",
        "is_norm_apart",
        "pdl",
    )
    return "/".join(str(int(choice[f]) if isinstance(choice[f], bool) else choice[f]) for f in fields)


def cublas_call(role: Role, x: Tensor, out: Tensor, residual: Tensor | None) -> Callable[[Tensor], object]:
    """The library's product with the separate kernels that our epilogue replaces."""
    normed = torch.empty_like(x)
    if role == "norm":
        return lambda w: torch.mm(rows.rms_norm(x, normed, 1e-5), w.t(), out=out)
    if role == "residual":
        return lambda w: torch.addmm(residual, x, w.t(), out=out)
    if role == "gated":
        both = torch.empty(len(x), 2 * out.shape[1], device=CUDA, dtype=BF16)
        return lambda w: rows.gated(torch.mm(rows.rms_norm(x, normed, 1e-5), w.t(), out=both), out)
    return lambda w: torch.mm(x, w.t(), out_dtype=torch.float32, out=out)


def library_us(call: Callable[[Any], object], weights: list[Weight]) -> float:
    """Infinite where the library refuses: rows of 8 bits are not taken on every card and in every number."""
    try:
        return microseconds([lambda w=w: call(w) for w in weights])
    except RuntimeError as problem:
        print("refused:", repr(problem)[:160], flush=True)
        return math.inf


def weight_bytes(weight: Weight) -> int:
    """What a product reads of it."""
    if isinstance(weight, Scaled):
        return weight.values.nbytes + weight.scales.nbytes
    return weight.nbytes


def fp8_calls(
    role: Role, x: Tensor, out: Tensor, residual: Tensor | None
) -> tuple[Callable[[Any], object], Callable[[Any], object]]:
    """The library's product of 8 bits with the kernels around it, and alone. Its down projection is charged for
    rounding rows, which in a step the gate before it does."""
    columns, outputs = x.shape[1], out.shape[1]
    both = torch.empty(len(x), 2 * outputs, device=CUDA, dtype=BF16)
    room = fp8.Room(fp8.Rounding.make(len(x), columns, CUDA), torch.empty_like(out), both)
    rounded, into = scaled.rounded(x), both if role == "gated" else room.summand
    return (
        lambda w: fp8.product(role, x, w, out, room, 1e-5, None, residual),  # type: ignore[arg-type]
        lambda w: fp8.multiplied(rounded, w, into),
    )


def tuned_table(products: list[dict[str, Any]]) -> dict[str, Any]:
    """The shipped table's JSON: own kernel where it beats cuBLAS with its helpers, which needs no row beyond. What the
    shipped table has of weights of the other width is kept."""
    linear_entries: dict[tuple[str, int, int], dict[str, Any]] = {}
    for entry in products:
        shape = linear_entries.setdefault((entry["role"], entry["outputs"], entry["columns"]), {})
        is_own = entry["own"] is not None and entry["own_us"] < entry["cublas_us"]
        default = asdict(Choice("dot"))
        choice = entry["own"] if is_own else asdict(CUBLAS)
        shape[str(entry["rows"])] = {k: v for k, v in choice.items() if k == "kernel" or v != default[k]}
    device = torch.cuda.get_device_name()
    shipped = Path(tuned.__file__).parent / "tuned" / f"{tuned.slug(device)}.json"
    kept = json.loads(shipped.read_text(encoding="utf-8")) if shipped.exists() else {"device": device, "linear": []}
    return kept | {
        "fp8" if any(entry.get("is_fp8") for entry in products) else "linear": [
            {"role": role, "outputs": outputs, "columns": columns, "rows": by_rows}
            for (role, outputs, columns), by_rows in linear_entries.items()
        ]
    }


def summary(products: list[dict[str, Any]]) -> None:
    """Microseconds: cuBLAS with its helpers / our best, and what a step of all layers and the head would take."""
    for model in sorted({entry["model"] for entry in products}):
        shapes = list(dict.fromkeys(entry["shape"] for entry in products if entry["model"] == model))
        print(f"\n{model}: rows | " + " | ".join(shapes) + " | step cublas | step best | floor")
        for row_count in ROWS:
            cells = {e["shape"]: e for e in products if e["model"] == model and e["rows"] == row_count}
            if len(cells) < len(shapes):
                continue
            times = {name: 1 if name == "head" else LAYERS[model] for name in cells}
            own = {name: min(entry["own_us"], entry["cublas_us"]) for name, entry in cells.items()}
            columns = ({n: e["cublas_us"] for n, e in cells.items()}, own, {n: e["floor_us"] for n, e in cells.items()})
            steps = [sum(times[n] * value for n, value in column.items()) / 1e3 for column in columns]
            row = " | ".join(f"{cells[n]['cublas_us']:.1f}/{cells[n]['own_us']:.1f}" for n in shapes)
            print(f"{row_count} | {row} | {steps[0]:.2f} | {steps[1]:.2f} | {steps[2]:.2f} ms")
