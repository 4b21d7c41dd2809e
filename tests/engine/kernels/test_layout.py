"""A block is one piece, every number has a place of its own in it, and fp8 halves it."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import ref
from engine.kernels.layout import Layout

LLAMA_8B = (32, 8, 64, 128)  # layers, kv heads, tokens, head_dim


def test_a_block_of_fp8_is_half_of_one_and_its_scales() -> None:
    plain, fp8 = (Layout(*LLAMA_8B, is_fp8=is_fp8).block_bytes(torch.bfloat16) for is_fp8 in (False, True))

    assert (plain, fp8) == (8 * 2**20, 4 * 2**20 + 64 * 2**10)
    assert round(plain / fp8, 2) == 1.97  # so many times the blocks in the same memory


@pytest.mark.parametrize("head_dim", [32, 96])
def test_every_byte_belongs_to_one_layer_or_to_the_end(head_dim: int) -> None:
    layout = Layout(3, 2, 8, head_dim, is_fp8=True)
    pool = layout.pool(4, torch.bfloat16, torch.device("cpu"))
    counts = torch.zeros(pool.shape, dtype=torch.int16)

    for number in range(3):
        layer = layout.layer(pool[1:], number)  # of some blocks: the first of them is block 1
        layer.numbers.view(torch.uint8).fill_(1)
        assert layer.scales is not None
        layer.scales.fill_(0x01010101)
        counts += pool
        pool.zero_()

    used = 3 * 2 * 2 * 8 * (head_dim + 2)
    assert (counts[1:, :used] == 1).all()
    assert not counts[1:, used:].any()
    assert not counts[0].any()
    assert pool.shape[1] - used < 4 * head_dim
    assert layout.rows(pool).shape == (4 * layout.block_rows(pool), head_dim)


def test_what_is_written_is_read_and_nothing_beside_it(dtype: torch.dtype) -> None:
    layout = Layout(2, 3, 8, 32, is_fp8=True)
    pool = layout.pool(3, dtype, torch.device("cpu"))
    keys, values = torch.randn(2, 4, 3, 32)
    values[2] *= 1e4

    ref.write(layout.layer(pool, 1), torch.tensor([17, 3, -1, 6]), keys, values)

    read = ref.read(layout.layer(pool, 1))
    for row, (block, place) in ((0, (2, 1)), (1, (0, 3)), (3, (0, 6))):
        for which, wanted in enumerate((keys[row], values[row])):
            torch.testing.assert_close(read[block, which, :, place], wanted, rtol=0.07, atol=1e-2)
            read[block, which, :, place] = 0
    assert not read.any()
    assert not ref.read(layout.layer(pool, 0)).any()
