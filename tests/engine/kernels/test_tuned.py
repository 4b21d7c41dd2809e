"""The choice of a kernel: measured where a table knows the shape, the rule's elsewhere, and always one that divides."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.kernels import tuned
from engine.kernels.tuned import CUBLAS, Choice, Table, choose

KNOWN = Choice("dot", block_n=64, block_k=256)
TABLE = Table("test", {("norm", 6144, 4096): {16: KNOWN, 64: CUBLAS}})
SHAPES = [(4096, 6144, 14336, 4096), (1024, 4096, 3072, 2048), (576, 960, 1536, 576), (3584, 4608, 18944, 3584)]


def test_a_measured_row_count_serves_all_below_it() -> None:
    assert choose(TABLE, "norm", 9, 6144, 4096) == KNOWN
    assert choose(TABLE, "norm", 17, 6144, 4096) == CUBLAS


def test_beyond_what_was_measured_the_rule_decides() -> None:
    assert choose(TABLE, "norm", 65, 6144, 4096) == CUBLAS
    assert choose(TABLE, "norm", 1, 4096, 4096).kernel == "gemv"


@pytest.mark.parametrize(("hidden", "qkv", "ffn", "width"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 64, 65, 4096])
def test_the_rule_names_only_tiles_that_divide_the_shape(
    rows: int, hidden: int, qkv: int, ffn: int, width: int
) -> None:
    shapes = {("norm", qkv, hidden), ("residual", hidden, width), ("gated", ffn, hidden), ("residual", hidden, ffn)}
    for role, outputs, columns in sorted(shapes):
        for is_fp8 in (False, True):
            choice = choose(Table.empty("none"), role, rows, outputs, columns, is_fp8=is_fp8)  # type: ignore[arg-type]

            assert _divides(choice, outputs, columns), (role, outputs, columns, choice)


def _divides(choice: Choice, outputs: int, columns: int) -> bool:
    if choice.kernel == "cublas":
        return True
    if choice.kernel == "gemv":
        return outputs % choice.block_n == 0 and (columns - choice.head_k) % choice.block_k == 0
    return outputs % choice.block_n == 0 and columns % (choice.splits * choice.block_k) == 0


def test_weights_of_8_bits_have_choices_of_their_own() -> None:
    table = tuned.parse({"device": "test", "linear": [_shape(KNOWN)], "fp8": [_shape(CUBLAS)]})

    assert choose(table, "norm", 9, 6144, 4096) == KNOWN
    assert choose(table, "norm", 9, 6144, 4096, is_fp8=True) == CUBLAS
    assert choose(TABLE, "norm", 9, 6144, 4096, is_fp8=True) != KNOWN  # nobody measured it: the rule's


def _shape(choice: Choice) -> dict[str, object]:
    return {"role": "norm", "outputs": 6144, "columns": 4096, "rows": {"16": asdict(choice)}}


def test_a_norm_is_never_split_along_its_row() -> None:
    for role in ("norm", "gated"):
        for rows in (1, 8, 64):
            assert choose(Table.empty("none"), role, rows, 1024, 4096).splits == 1  # type: ignore[arg-type]


def test_every_shipped_table_reads_back_and_divides() -> None:
    paths = sorted((Path(tuned.__file__).parent / "tuned").glob("*.json"))
    assert paths
    for path in paths:
        table = tuned.parse(json.loads(path.read_text()))
        assert tuned.slug(table.device) == path.stem
        for (role, outputs, columns), choices in [*table.linear.items(), *table.fp8.items()]:
            for choice in choices.values():
                assert _divides(choice, outputs, columns)
                assert choice.splits == 1 or role in ("residual", "plain")


def test_an_unknown_device_has_an_empty_table() -> None:
    assert tuned.load("no such card") == Table.empty("no such card")
