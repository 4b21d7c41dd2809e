"""Row-wise kernels agree with the oracle."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import ref, rows
from tests.engine.kernels.attention_case import error


def test_picked_rows_are_normed(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.randn(9, 300, device=device).to(dtype), torch.randn(300, device=device).to(dtype)
    picked = torch.tensor([7, 0, 3], device=device, dtype=torch.int32)
    out = torch.full((3, 300), torch.nan, device=device, dtype=dtype)

    rows.rms_norm(x, out, 1e-5, weight, picked)

    assert error(out, ref.rms_norm(x[picked.long()], 1e-5, weight)) < 4e-3


def test_all_rows_are_normed_without_a_weight(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(4, 256, device=device).to(dtype)

    out = rows.rms_norm(x, torch.full_like(x, torch.nan), 1e-5)

    assert error(out, ref.rms_norm(x, 1e-5)) < 4e-3


@pytest.mark.parametrize("count", [1, 4096, 4097, 10_000])
def test_words_are_carried_and_no_more_than_were_asked_for(count: int, device: torch.device) -> None:
    source = torch.arange(1, 10_001, dtype=torch.int32, pin_memory=device.type == "cuda")
    into = torch.zeros(10_000, dtype=torch.int32, device=device)
    back = torch.zeros(10_000, dtype=torch.int32, pin_memory=device.type == "cuda")

    rows.carry(source[:count], into[:count])
    rows.carry(into, back)

    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(back[:count], source[:count])
    assert not back[count:].any()


def test_gates_open(dtype: torch.dtype, device: torch.device) -> None:
    gate_up = torch.randn(3, 2 * 2100, device=device).to(dtype)

    out = rows.gated(gate_up, torch.full((3, 2100), torch.nan, device=device, dtype=dtype))

    assert error(out, ref.gated(gate_up)) < 4e-3


def test_embedding_brings_the_turn_of_its_position(dtype: torch.dtype, device: torch.device) -> None:
    table = torch.randn(50, 96, device=device).to(dtype)
    ids = torch.tensor([49, 0, 7], device=device, dtype=torch.int32)
    positions = torch.tensor([0, 131071, 5], device=device, dtype=torch.int32)
    frequencies = 1e4 ** (-torch.arange(0, 48, 2, device=device) / 48)

    x, turns = torch.empty(3, 96, device=device, dtype=dtype), torch.empty(3, 48, device=device)

    rows.embed_into(ids, positions, table, frequencies, x, turns)

    assert torch.equal(x, table[ids.long()])
    torch.testing.assert_close(turns, ref.turn(positions, frequencies), rtol=0, atol=2e-5)
