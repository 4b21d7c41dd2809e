"""The GPU runner gives the CPU's text whatever is in flight: ends, newcomers, chunks beside decodes, lost guesses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.compute import arrange
from engine.compute.gpu_runner import PARTS_MAX, GpuRunner
from engine.compute.runner import RunnerConfig, TorchRunner
from engine.kernels import tuned
from engine.kernels.plan import WHOLE, part_tokens
from engine.models import gpu
from engine.step import StepBatch
from engine.wire import Sampling
from tests.engine.driver import Blocks, Generation, batch_of
from tests.engine.kernels.attention_case import error
from tests.engine.kernels.test_gpu_decoder import BLOCK, config, on_cpu, weights

BLOCKS = 40
PACKING = arrange.Packing(2, BLOCK, 256, 64)


@pytest.fixture
def made(dtype: torch.dtype, device: torch.device) -> gpu.Weights:
    small = replace(config(has_qk_norm=False), hidden=64, layers=1, heads=2, kv_heads=1, ffn=64)
    return weights(small, dtype, device)


def on_gpu(made: gpu.Weights, *, is_kv_fp8: bool = False) -> GpuRunner:
    return GpuRunner(made, BLOCK, BLOCKS, 8, tuned.Table.empty("none"), is_kv_fp8=is_kv_fp8)


def with_room(batch: StepBatch, turns: list[tuple[Generation, int]]) -> StepBatch:
    """What the scheduler says: how far each sequence's blocks reach."""
    return replace(batch, room=np.array([len(one.blocks) * BLOCK for one, _ in turns], np.int32))


def step(
    runner: GpuRunner | TorchRunner, turns: list[tuple[Generation, int]], *, says_room: bool = True,
    ends_prompts: bool = False,
) -> None:  # fmt: skip
    """Each sequence in turn with so many rows; tokens are taken where all is computed."""
    ends = [one for one, rows in turns if one.computed + rows == len(one.ids)]
    batch = replace(batch_of(turns, BLOCK), ends_prompts=ends_prompts)
    result = runner.run(with_room(batch, turns) if says_room else batch)
    for one, rows in turns:
        one.computed += rows
    for one, token in zip(ends, result.ids.tolist(), strict=True):
        one.ids.append(token)


def story(runner: GpuRunner | TorchRunner, *, says_room: bool = True) -> list[list[int]]:
    """Six steps of two, a newcomer in two chunks, an end, a prompt of one row, a pause."""
    blocks = Blocks(BLOCKS, BLOCK)
    first, second, third = (blocks.start(list(range(at, at + n)), 16) for at, n in ((3, 20), (50, 33), (90, 40)))
    single = blocks.start([7], 8, Sampling(temperature=0.8, top_k=20, seed=5))
    step(runner, [(first, 20), (second, 33)], says_room=says_room)
    for _ in range(3):
        step(runner, [(first, 1), (second, 1)], says_room=says_room)
    step(runner, [(first, 1), (second, 1), (third, 25)], says_room=says_room)
    step(runner, [(first, 1), (second, 1), (third, 15)], says_room=says_room)
    step(runner, [(second, 1), (third, 1), (single, 1)], says_room=says_room)
    for _ in range(2):
        step(runner, [(second, 1), (third, 1), (single, 1)], says_room=says_room)
    step(runner, [(third, 1), (single, 1)], says_room=says_room)  # one ended: the step in flight is used in part
    step(runner, [(single, 1)], says_room=says_room)
    step(runner, [(third, 1), (single, 1)], says_room=says_room)  # one paused and came back
    step(runner, [(third, 1), (single, 1), (first, 1)], says_room=says_room)
    return [one.output for one in (first, second, third, single)]


def test_a_story_of_steps_gives_the_text_of_the_cpu(made: gpu.Weights) -> None:
    cpu = TorchRunner(on_cpu(made), RunnerConfig(block_tokens=BLOCK, kv_bytes=2**21))

    told = story(on_gpu(made))

    assert [len(output) for output in told] == [7, 9, 7, 7]
    assert told == story(on_gpu(made), says_room=False)  # every step launched when it is asked for
    assert told[:3] == story(cpu)[:3]  # the fourth draws: the GPU walks tokens by id, the CPU by rank


def test_weights_of_8_bits_give_the_text_of_the_same_numbers(made: gpu.Weights) -> None:
    rounded = replace(made, layers=tuple(map(gpu.rounded, made.layers)))
    cpu = TorchRunner(on_cpu(gpu.widened(rounded)), RunnerConfig(block_tokens=BLOCK, kv_bytes=2**21))

    assert story(on_gpu(rounded))[:3] == story(cpu)[:3]


def test_logits_of_every_row_are_the_cpus(made: gpu.Weights) -> None:
    prompt = Blocks(BLOCKS, BLOCK).start(list(range(3, 13)), 1)
    rows = np.arange(10, dtype=np.int32)
    batch = batch_of([(prompt, 10)], BLOCK)
    batch = replace(batch, sample_rows=rows, sample_positions=rows, sampling=(Sampling(),) * len(rows))

    wanted = TorchRunner(on_cpu(made), RunnerConfig(block_tokens=BLOCK, kv_bytes=2**21)).logits(batch)

    assert error(on_gpu(made).logits(batch).cpu(), wanted) < 1e-2


def test_over_fp8_kv_a_prompt_says_the_same_at_once_in_chunks_and_from_blocks_brought_up(made: gpu.Weights) -> None:
    """Every token of a step is read as it was stored, so what comes later cannot tell how it was computed."""
    texts, brought = [], on_gpu(made, is_kv_fp8=True)
    for chunks in ([20], [13, 7]):
        runner = on_gpu(made, is_kv_fp8=True)
        one = Blocks(BLOCKS, BLOCK).start(list(range(3, 23)), 6)
        for rows in (*chunks, 1, 1):
            step(runner, [(one, rows)])
        texts.append(one.output)
    memory, into = runner.kv, brought.kv
    assert memory is not None
    assert into is not None
    payloads = [np.empty(memory.block_bytes, np.uint8)]
    memory.save(one.blocks[:1], payloads)()
    into.load(one.blocks[:1], payloads, into.fence())()
    warm = Generation(list(range(3, 23)), 20, one.blocks, computed=16)
    for rows in (4, 1, 1):
        step(brought, [(warm, rows)])

    assert texts[0] == texts[1] == warm.output


def test_steps_are_launched_ahead_and_used(made: gpu.Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, launched = on_gpu(made), []
    launch = GpuRunner._launch
    monkeypatch.setattr(GpuRunner, "_launch", lambda self, *what: launched.append(what) or launch(self, *what))
    one = Blocks(BLOCKS, BLOCK).start(list(range(3, 23)), 8)

    step(runner, [(one, 20)])
    for _ in range(5):
        step(runner, [(one, 1)])

    assert len(launched) == 1 + 1 + 5  # the prompt, the first decode, and one ahead of each decode
    assert [what[1] is not None for what in launched] == [False, False] + [True] * 5


def test_the_decodes_behind_the_last_prompts_are_launched_ahead(
    made: gpu.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[bool] = []
    launch = GpuRunner._launch

    def noted(self: GpuRunner, batch: StepBatch, sources: Any, known: Any = None) -> Any:
        launched.append(sources is not None)
        return launch(self, batch, sources, known)

    monkeypatch.setattr(GpuRunner, "_launch", noted)
    texts = []
    for ends in (True, False):
        launched.clear()
        runner, blocks = on_gpu(made), Blocks(BLOCKS, BLOCK)
        first, second, third = (blocks.start(list(range(at, at + n)), 8) for at, n in ((3, 20), (50, 33), (90, 5)))
        step(runner, [(first, 20)], ends_prompts=ends)
        step(runner, [(first, 1), (second, 33), (third, 5)], ends_prompts=ends)
        for _ in range(3):
            step(runner, [(second, 1), (first, 1), (third, 1)])  # in whatever order they stand then
        texts.append([one.output for one in (first, second, third)])
        # The prompt, its decode, two prompts beside that decode, the three decodes behind, and so on.
        behind = [True, False, True] if ends else [False, False]
        assert launched == [False, *behind, True, True, True]

    assert texts[0] == texts[1]


def test_nothing_is_launched_ahead_where_no_block_is(made: gpu.Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, launched = on_gpu(made), []
    launch = GpuRunner._launch
    monkeypatch.setattr(GpuRunner, "_launch", lambda self, *what: launched.append(what) or launch(self, *what))
    one = Blocks(BLOCKS, BLOCK).start(list(range(3, 3 + BLOCK - 1)), 1)

    step(runner, [(one, BLOCK - 1)])
    step(runner, [(one, 1)])

    assert len(launched) == 2


def test_a_text_does_not_end_before_its_least_length(made: gpu.Weights) -> None:
    greedy = Sampling(temperature=0.0)
    ends = on_gpu(made)
    one = Blocks(BLOCKS, BLOCK).start(list(range(3, 23)), 8, greedy)
    step(ends, [(one, 20)])
    banned = one.output[0]

    other = Blocks(BLOCKS, BLOCK).start(
        list(range(3, 23)), 8, Sampling(temperature=0.0, min_tokens=1, stop_ids=(banned,))
    )
    step(on_gpu(made), [(other, 20)])

    assert other.output[0] != banned


def test_rows_in_device_order_are_all_rows_once() -> None:
    blocks = Blocks(BLOCKS, BLOCK)
    chunk, decode, single = blocks.start(list(range(40)), 4), blocks.start(list(range(10)), 4), blocks.start([1], 4)
    decode.computed = 9
    batch = batch_of([(chunk, 30), (decode, 1), (single, 1)], BLOCK)

    arranged = arrange.arrange(batch, PACKING)

    assert (arranged.decodes, arranged.chunk_rows, arranged.chunked) == (4, 64, 1)
    assert arranged.arrays["row_starts"].tolist() == [0, 1, 2, 3, 4, 34]
    assert arranged.arrays["ids"].tolist() == [9, 1, 0, 0, *range(30)]
    assert arranged.arrays["slots"].tolist()[2:4] == [-1, -1]
    assert arranged.arrays["sample_rows"].tolist() == [0, 1]
    assert arranged.arrays["contexts"].tolist() == [10, 1, 1, 1, 30]


def test_a_step_one_token_on_is_arranged_as_if_anew() -> None:
    knobs = Sampling(temperature=0.8, top_k=20, seed=5), Sampling(temperature=0.0)
    kept = dict.fromkeys((True, False), 0)
    decodes = [
        Generation([1] * 200, 0, list(range(at * 9, at * 9 + 9)), knobs[at % 2], computed=20 + 3 * at)
        for at in range(5)
    ]
    before, sources = None, np.arange(5, dtype=np.int32)
    for number in range(60):
        batch = replace(batch_of([(one, 1) for one in decodes], BLOCK), sample_positions=np.full(5, number, np.int32))
        anew = arrange.arrange(batch, PACKING, sources)
        quick = arrange.advanced(before, batch, BLOCK) if before is not None else None
        kept[quick is not None] += 1
        if quick is not None and before is not None:
            assert replace(quick, arrays={}, tables=anew.tables) == replace(anew, arrays={})
            assert {name: array.tolist() for name, array in quick.arrays.items() if name != "ids"} == {
                name: array.tolist() for name, array in anew.arrays.items() if name != "ids"
            }
            assert quick.tables is before.tables
        before = anew
        for one in decodes:
            one.computed += 1

    assert min(kept.values()) > 10


def test_parts_are_larger_where_they_would_be_too_many() -> None:
    own = np.full(2, 4000)

    assert part_tokens(own, 1, PARTS_MAX) == 64
    assert part_tokens(own, 1, parts_max=40) == 256
    assert part_tokens(own, 1, parts_max=1) == WHOLE


def test_a_block_copied_out_and_in_is_the_same(made: gpu.Weights) -> None:
    runner = on_gpu(made)
    memory = runner.kv
    assert memory is not None
    content = np.random.default_rng(3).integers(0, 100, memory.block_bytes).astype(np.uint8)
    back = np.zeros_like(content)

    memory.load([7], [content], memory.fence())()
    memory.save([7], [back])()

    assert (back == content).all()
    memory.save([6], [back])()
    assert not back.any()


def test_decodes_behind_a_long_common_prefix_stand_side_by_side() -> None:
    blocks = 40  # of 16 tokens: 640 in common
    common, other = list(range(100, 100 + blocks)), list(range(200, 200 + blocks))
    sequences = [
        Generation([1] * 660, 0, (other if at % 2 else common) + [at, at + 50], computed=658) for at in range(40)
    ]
    batch = batch_of([(one, 1) for one in sequences], BLOCK)

    arranged = arrange.arrange(batch, replace(PACKING, parts_max=4096))

    assert arranged.has_shared
    assert arranged.tables[:, 0].tolist() == [100] * 20 + [200] * 20
    assert arranged.arrays["shared"].tolist() == [640] * 40
    assert arranged.arrays["leads"].tolist() == [0] * 20 + [20] * 20
    few = arrange.arrange(batch_of([(one, 1) for one in sequences[:6]], BLOCK), PACKING)
    assert not few.has_shared


def test_a_shared_prefix_is_read_for_the_whole_group_and_changes_no_text(
    made: gpu.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for least in (1 << 30, 32):
        monkeypatch.setattr(arrange, "SHARED_TOKENS_MIN", least)
        runner, blocks = on_gpu(made), Blocks(BLOCKS, BLOCK)
        first = blocks.start(list(range(3, 43)), 8)
        step(runner, [(first, 40)])
        second = Generation([*range(3, 35), 99, 98], 34, [*first.blocks[:2], blocks.free.pop()], computed=32)
        step(runner, [(first, 1), (second, 2)])
        for _ in range(3):
            step(runner, [(first, 1), (second, 1)])
        texts.append([first.output, second.output])

    assert texts[0] == texts[1]
