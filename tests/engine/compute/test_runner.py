"""The runner's equivalences, on a tiny random Llama: chunked = whole, mixed = alone, and nobody reads another's KV."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.models.config import ModelError
from engine.models.pages import CHUNK_SPAN_ROWS
from tests.engine import tiny
from tests.engine.driver import Blocks, Generation, advance, all_logits, batch_of, generate

RNG = np.random.default_rng(11)


def prompt(tokens: int) -> list[int]:
    return [int(token) for token in RNG.integers(6, 211, tokens)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(st.integers(1, 70), max_size=5))
def test_any_split_of_a_prompt_gives_the_same_text(tiny_runner: TorchRunner, chunks: list[int]) -> None:
    """Whatever the chunks, the ids are those of the whole prompt in one step, and the logits nearly."""
    ids, blocks = list(range(6, 206)), Blocks(tiny_runner.blocks_total, tiny_runner.block_tokens)
    chunks = [rows for number, rows in enumerate(chunks) if sum(chunks[: number + 1]) < len(ids)]

    split = generate(tiny_runner, blocks, ids, 6, chunks)

    assert split == generate(tiny_runner, blocks, ids, 6)
    rest = [*chunks, len(ids) - sum(chunks)]
    torch.testing.assert_close(
        all_logits(tiny_runner, ids, rest), all_logits(tiny_runner, ids, [len(ids)]), atol=1e-4, rtol=0
    )


def test_a_chunk_longer_than_a_span_is_cut_without_a_seam(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path)
    runner = TorchRunner.load(tmp_path, RunnerConfig(block_tokens=16, kv_bytes=2**21))
    ids = prompt(3 * CHUNK_SPAN_ROWS + 5)

    ours = all_logits(runner, ids, [len(ids)])

    torch.testing.assert_close(ours, tiny.logits(model, ids), atol=1e-4, rtol=0)


def test_a_mixed_step_computes_each_sequence_as_if_alone(tiny_runner: TorchRunner) -> None:
    """Decodes of very different lengths and chunks, interleaved in the batch, over a dozen steps."""
    prompts = [prompt(tokens) for tokens in (3, 130, 40, 1, 75, 9)]
    blocks = Blocks(tiny_runner.blocks_total, tiny_runner.block_tokens)
    alone = [generate(tiny_runner, blocks, one, 8) for one in prompts]

    together = [blocks.start(one, 8) for one in prompts]
    while any(len(one.output) < 8 for one in together):
        running = [one for one in together if len(one.output) < 8]
        advance(tiny_runner, [(one, min(20, len(one.ids) - one.computed)) for one in running])

    assert [one.output for one in together] == alone


def test_a_step_may_sample_nothing(tiny_runner: TorchRunner) -> None:
    one = Blocks(tiny_runner.blocks_total, 4).start(prompt(20), 0)

    result = tiny_runner.run(batch_of([(one, 8)], 4))

    assert result.ids.shape == (0,)
    assert result.is_bad.shape == (0,)


def test_a_row_that_writes_nowhere_reads_its_cached_keys_and_changes_no_block(tiny_runner: TorchRunner) -> None:
    """A prompt found whole in the cache runs its last row only, with write slot -1."""
    one = Blocks(tiny_runner.blocks_total, 4).start(prompt(16), 0)
    expected = tiny_runner.run(batch_of([(one, 16)], 4))
    before = tiny_runner._pool.memory[: tiny_runner.blocks_total].clone()

    one.computed = 15
    batch = batch_of([(one, 1)], 4)
    again = tiny_runner.run(replace(batch, write_slots=np.array([-1], np.int64)))

    assert again.ids.tolist() == expected.ids.tolist()
    assert torch.equal(tiny_runner._pool.memory[: tiny_runner.blocks_total], before)


def test_a_sequence_that_is_not_finite_fails_alone_and_leaves_no_trace(tiny_llama: Path) -> None:
    """Its neighbours answer as ever, and so do those who get its blocks next."""
    runner = TorchRunner.load(tiny_llama, RunnerConfig(block_tokens=4, kv_bytes=2**20))
    poison, healthy = 210, list(range(20, 30))
    blocks = Blocks(runner.blocks_total, 4)
    expected = generate(runner, blocks, healthy, 6)
    with torch.inference_mode():
        runner._decoder.embedding[poison] = torch.nan

    bad, good = blocks.start([7, poison, 8, 9], 6), blocks.start(healthy, 6)
    advance(runner, [(bad, 4), (good, len(good.ids))])
    assert bad.is_bad
    assert not good.is_bad
    fresh = [blocks.free.pop() for _ in range(4)]  # its third block was the bad one's first, and stays half filled
    reused = Generation(list(healthy), len(healthy), [*fresh[:2], bad.blocks[0], *fresh[2:]])
    while len(good.output) < 6:
        advance(runner, [(good, 1), (reused, len(reused.ids) - reused.computed)])
    advance(runner, [(reused, 1)])

    assert good.output == expected
    assert reused.output == expected
    assert not reused.is_bad


def test_the_memory_budget_gives_the_number_of_blocks(tiny_llama: Path) -> None:
    block_bytes = 4 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, kv heads, head size, float32

    runner = TorchRunner.load(tiny_llama, RunnerConfig(block_tokens=4, kv_bytes=10 * block_bytes))

    assert runner.blocks_total == 8  # two are spare: zero for padding, and where nothing is written
    with pytest.raises(ModelError, match="holds no KV block"):
        TorchRunner.load(tiny_llama, RunnerConfig(block_tokens=4, kv_bytes=2 * block_bytes))
