"""Attention over work lists and over tiles agrees with the oracle, whoever splits, shares or merges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.kernels import ref
from engine.kernels.paged import Launch, Shape
from engine.kernels.plan import WHOLE, chunk_parts, part_tokens
from tests.engine.kernels import attention_case

RAGGED = [(1, 1), (37, 1), (16, 1), (100, 1), (17, 1)]


def shape(group: int, head_dim: int, few_rows: int = 1, has_qk_norm: bool = True, is_kv_fp8: bool = False) -> Shape:
    return Shape(group * 2, 2, head_dim, 2, 16, 1e-6, has_qk_norm, few_rows, is_kv_fp8=is_kv_fp8)


def written(case: attention_case.Case) -> tuple[torch.Tensor, torch.Tensor]:
    """What the step has written, and what it was to write."""
    tokens = case.shape.block_tokens
    return tuple(
        kv[case.step.slots.long() // tokens, :, :, case.step.slots.long() % tokens]
        for kv in (ref.read(case.last), case.wanted_last)
    )


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (4, 96), (7, 32), (8, 128)])
@pytest.mark.parametrize("size", [16, 32, WHOLE])
def test_decode_agrees_with_the_oracle(
    group: int, head_dim: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = attention_case.make(shape(group, head_dim), RAGGED, dtype, device)

    got = attention_case.few(case, Launch(5), size)

    assert attention_case.error(got, case.wanted) < 5e-3
    torch.testing.assert_close(ref.read(case.last), case.wanted_last, equal_nan=True, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("size", [16, WHOLE])
def test_reading_ahead_changes_nothing(size: int, dtype: torch.dtype, device: torch.device) -> None:
    plain, ahead = (attention_case.make(shape(4, 64), RAGGED, dtype, device) for _ in range(2))

    first = attention_case.few(plain, Launch(3), size)
    second = attention_case.few(ahead, Launch(3, is_ahead=True), size)

    assert attention_case.error(second, first) < 1e-4


def test_drafted_rows_see_their_own_past_only(dtype: torch.dtype, device: torch.device) -> None:
    case = attention_case.make(shape(3, 64, few_rows=5), [(40, 5), (5, 5), (64, 1), (33, 3)], dtype, device)

    got = attention_case.few(case, Launch(4), 16)

    assert attention_case.error(got, case.wanted) < 5e-3


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (4, 96), (7, 32), (8, 128)])
@pytest.mark.parametrize("size", [16, WHOLE])
def test_decode_over_fp8_agrees_with_the_oracle(
    group: int, head_dim: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = attention_case.make(shape(group, head_dim, is_kv_fp8=True), RAGGED, dtype, device)

    got = attention_case.few(case, Launch(5, is_ahead=size == 16), size)

    assert attention_case.error(got, case.wanted) < 5e-3
    torch.testing.assert_close(ref.read(case.last), case.wanted_last, equal_nan=True, rtol=0.13, atol=2e-2)
    assert attention_case.error(*written(case)) < 5e-3


def test_fp8_of_drafted_rows_of_chunks_and_of_shared_prefixes(dtype: torch.dtype, device: torch.device) -> None:
    drafts = attention_case.make(
        shape(3, 64, few_rows=5, is_kv_fp8=True), [(40, 5), (5, 5), (64, 1), (33, 3)], dtype, device
    )
    chunked = attention_case.make(shape(4, 96, is_kv_fp8=True), [(40, 40), (70, 33), (150, 150)], dtype, device)
    lengths = [(48 + 5 * number + 1, 1) for number in range(5)]
    group = attention_case.make(shape(4, 64, is_kv_fp8=True), lengths, dtype, device, shared=48)

    assert attention_case.error(attention_case.few(drafts, Launch(4), 16), drafts.wanted) < 5e-3
    assert attention_case.error(attention_case.chunks(chunked), chunked.wanted) < 5e-3
    assert attention_case.error(attention_case.few(group, Launch(6), 16, is_shared=True), group.wanted) < 5e-3
    for case in (drafts, chunked, group):
        assert attention_case.error(*written(case)) < 5e-3


def test_a_step_reads_its_own_token_as_fp8_stored_it(dtype: torch.dtype, device: torch.device) -> None:
    case = attention_case.make(shape(2, 64, is_kv_fp8=True), [(1, 1)], dtype, device)

    got = attention_case.few(case, Launch(2), WHOLE)

    block, place = divmod(int(case.step.slots[0]), case.shape.block_tokens)
    read = ref.read(case.last)[block, 1, :, place].repeat_interleave(2, 0)
    torch.testing.assert_close(got[0], read, rtol=1e-3, atol=1e-5)
    assert attention_case.error(got[0], case.qkv[0].unflatten(-1, (-1, 64))[-2:].float().repeat_interleave(2, 0)) > 5e-3


@pytest.mark.parametrize("is_chunk", [False, True])
def test_what_is_no_number_is_told_by_its_scale(is_chunk: bool, dtype: torch.dtype, device: torch.device) -> None:
    rows = 2 if is_chunk else 1
    case = attention_case.make(shape(2, 64, is_kv_fp8=True), [(20, rows), (5, rows)], dtype, device)
    case.qkv[0, -3] = torch.nan  # a value of the last kv head
    block, place = divmod(int(case.step.slots[0]), case.shape.block_tokens)

    got = attention_case.chunks(case) if is_chunk else attention_case.few(case, Launch(2), WHOLE)

    assert got[0, -1].isnan().all()
    assert got[-1].isfinite().all()
    assert case.last.numbers.float().isfinite().all()
    assert ref.read(case.last)[block, 1, -1, place].isnan().all()


@pytest.mark.parametrize("members", [2, 19])
def test_a_shared_prefix_is_read_for_the_whole_group(members: int, dtype: torch.dtype, device: torch.device) -> None:
    lengths = [(48 + 5 * number + 1, 1) for number in range(members)]
    case = attention_case.make(shape(4, 64), lengths, dtype, device, shared=48)

    got = attention_case.few(case, Launch(6), 16, is_shared=True)

    assert attention_case.error(got, case.wanted) < 5e-3


@pytest.mark.parametrize("group", [1, 3, 4])
def test_chunks_agree_with_the_oracle_at_any_offset(group: int, dtype: torch.dtype, device: torch.device) -> None:
    case = attention_case.make(shape(group, 64), [(40, 40), (70, 33), (50, 2), (150, 150)], dtype, device)

    got = attention_case.chunks(case)

    assert attention_case.error(got, case.wanted) < 5e-3


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (7, 32), (4, 96), (8, 128)])
def test_a_chunk_whose_past_is_cut_agrees_with_the_oracle(
    group: int, head_dim: int, parts: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Past of 200 tokens and none, parts without any block, a chunk that begins where a block does."""
    case = attention_case.make(shape(group, head_dim), [(233, 33), (20, 20), (70, 2), (80, 16)], dtype, device)

    got = attention_case.chunks(case, parts)

    assert attention_case.error(got, case.wanted) < 5e-3


@pytest.mark.parametrize(
    ("programs", "context", "wanted"),
    [(24, 12_000, 8), (24, 2048, 4), (24, 1000, 1), (64, 30_000, 4), (128, 8192, 2), (264, 32_768, 1), (0, 0, 1)],
)
def test_the_past_of_chunks_is_cut_only_when_programs_would_idle(programs: int, context: int, wanted: int) -> None:
    assert chunk_parts(programs, context) == wanted


def test_a_row_does_not_depend_on_its_neighbours_when_parts_are_fixed(dtype: torch.dtype, device: torch.device) -> None:
    case = attention_case.make(shape(4, 64, has_qk_norm=False), [(100, 1)], dtype, device)
    crowd = attention_case.make(shape(4, 64, has_qk_norm=False), [(100, 1), (3, 1), (80, 1)], dtype, device)
    crowd.pool[crowd.step.table[0, :7].long()] = case.pool[case.step.table[0, :7].long()]
    crowd.qkv[0] = case.qkv[0]

    alone = attention_case.few(case, Launch(2), 32)
    together = attention_case.few(crowd, Launch(7), 32)

    assert torch.equal(alone[0], together[0])


@pytest.mark.parametrize(
    ("batch", "context", "wanted"),
    [(1, 576, 64), (8, 576, WHOLE), (64, 576, WHOLE), (256, 2048, WHOLE), (1, 32768, 1024), (8, 32768, 1024)],
)
def test_contexts_are_cut_only_when_programs_would_idle(batch: int, context: int, wanted: int) -> None:
    assert part_tokens(np.full(batch, context), 8) == wanted
