"""Tiles measured for weights of 8 bits join the card's table; without Triton: skipped."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu_products
from engine.kernels import tuned
from engine.kernels.tuned import CUBLAS, Choice

CARD = "NVIDIA H200"
OWN = Choice("dot", block_n=32, is_swapped=False)


def entry(rows: int, own_us: float) -> dict[str, Any]:
    """One measured cell; the library took 10 us."""
    shape = {"model": "8b", "shape": "o", "role": "residual", "outputs": 4096, "columns": 4096, "rows": rows}
    return {**shape, "is_fp8": True, "own": asdict(OWN), "own_us": own_us, "cublas_us": 10.0}


def test_they_stand_beside_those_that_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)

    table = tuned.parse(gpu_products.tuned_table([entry(16, 8.0), entry(64, 12.0), entry(128, math.inf)]))

    shipped = json.loads((Path(tuned.__file__).parent / "tuned" / f"{tuned.slug(CARD)}.json").read_text())
    assert table.linear == tuned.parse(shipped).linear
    chosen = [tuned.choose(table, "residual", rows, 4096, 4096, is_fp8=True) for rows in (9, 64, 128)]
    assert chosen == [OWN, CUBLAS, CUBLAS]


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
def test_every_candidate_divides_its_shape(name: str, rows: int) -> None:
    role, outputs, columns = gpu_products.PRODUCTS["8b"][name]

    tried = list(gpu_products.candidates(role, rows, outputs, columns, is_fp8=True))

    assert tried
    for choice in tried:
        step = choice.block_k * choice.splits
        assert outputs % choice.block_n == 0
        assert (columns - choice.head_k) % step == 0
