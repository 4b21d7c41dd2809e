"""The choice of a kernel: measured where a table knows the shape, the rule's elsewhere, and always one that divides."""

from __future__ import annotations

import json
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
        choice = choose(Table.empty("none"), role, rows, outputs, columns)  # type: ignore[arg-type]

        assert _divides(choice, outputs, columns), (role, outputs, columns, choice)


def _divides(choice: Choice, outputs: int, columns: int) -> bool:
    if choice.kernel == "cublas":
        return True
    if choice.kernel == "gemv":
        return outputs % choice.block_n == 0 and (columns - choice.head_k) % choice.block_k == 0
    return outputs % choice.block_n == 0 and columns % (choice.splits * choice.block_k) == 0


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
        for (role, outputs, columns), choices in table.linear.items():
            for choice in choices.values():
                assert _divides(choice, outputs, columns)
                assert choice.splits == 1 or role in ("residual", "plain")


def test_an_unknown_device_has_an_empty_table() -> None:
    assert tuned.load("no such card") == Table.empty("no such card")
