"""Masks beside steps: a slow one costs its own sequence time, and nobody a token."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.compute.masks import THREADS_MAX, Grammar
from engine.compute.runner import RunnerConfig, TorchRunner
from engine.step import Int32
from engine.wire import Sampling
from tests.engine import tiny
from tests.engine.loop import Heard, Loop
from tests.engine.test_answers import COMPILER, EOS, FACTS, SIZE, VOCAB

FREE = Sampling(seed=3, max_tokens=30, ignore_eos=True)
BOUND = Sampling(seed=4, max_tokens=40, logprobs=1, grammar_kind="regex", grammar="[a-z]{40}")
PATIENCE_S = 60.0


class Slow:
    """A grammar some of whose masks are not there before somebody has ended."""

    def __init__(self, grammar: Grammar, slow: set[int], waits_for: Heard) -> None:
        self._grammar, self._slow, self._waits_for = grammar, slow, waits_for
        self._masks = 0
        self.waited: list[bool] = []  # of each slow mask: whether that one ended meanwhile

    @property
    def mask_words(self) -> int:
        return self._grammar.mask_words

    def fill(self, mask: Int32) -> None:
        self._masks += 1
        if self._masks in self._slow:
            until = time.monotonic() + PATIENCE_S
            while self._waits_for.end is None and time.monotonic() < until:
                time.sleep(1e-3)
            self.waited.append(self._waits_for.end is not None)
        self._grammar.fill(mask)

    def accept(self, token: int) -> None:
        self._grammar.accept(token)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder: Path = tmp_path_factory.mktemp("tiny-bytes")
    tiny.save("llama", folder, vocab_size=VOCAB, eos_token_id=EOS)
    return TorchRunner.load(folder, RunnerConfig(block_tokens=SIZE, kv_bytes=2**20))


def bound() -> Grammar:
    return COMPILER.compile(BOUND.grammar_kind, BOUND.grammar)


# The first token's mask, one within a block, and those beside every place of a block: its end is published by then.
@pytest.mark.parametrize("slow", [1, 2, *range(5, 5 + SIZE)])
@pytest.mark.parametrize("prompt_tokens", [SIZE * 2, SIZE * 2 + 1])
def test_a_slow_mask_holds_up_its_own_sequence_alone(runner: TorchRunner, slow: int, prompt_tokens: int) -> None:
    prompt, other = list(range(30, 30 + prompt_tokens)), list(range(90, 110))
    expected = Loop(runner, FACTS, SIZE).ask(prompt, BOUND, grammar=bound())
    free_alone = Loop(runner, FACTS, SIZE).ask(other, FREE)

    loop = Loop(runner, FACTS, SIZE)
    free = loop.submit(other, FREE)
    grammar = Slow(bound(), {slow}, free)
    heard = loop.submit(prompt, BOUND, grammar=grammar)
    loop.run()

    assert grammar.waited == [True]
    assert (heard.ids, len(heard.scored)) == (expected.ids, len(expected.ids))
    assert free.ids == free_alone.ids


def test_more_slow_masks_than_threads_all_come(runner: TorchRunner) -> None:
    loop = Loop(runner, FACTS, SIZE)
    free = loop.submit(list(range(90, 110)), FREE)
    prompts = [list(range(30 + at, 50 + at)) for at in range(THREADS_MAX + 2)]
    heard = [loop.submit(prompt, BOUND, grammar=Slow(bound(), {3}, free)) for prompt in prompts]
    loop.run()

    for prompt, one in zip(prompts, heard, strict=True):
        assert one.ids == Loop(runner, FACTS, SIZE).ask(prompt, BOUND, grammar=bound()).ids
