"""Drafts: what they change is time. Text, chance, ends and cache are those of single steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.scheduling.habit import REST_STEPS_MAX, Habit
from engine.scheduling.speculate import lookup
from engine.step import ModelFacts
from engine.wire import Sampling
from tests.engine import tiny
from tests.engine.loop import Heard, Loop
from tests.engine.test_answers import COMPILER

SIZE = 16
FACTS = ModelFacts("tiny", "digest", "cpu", "float32", 257, 512, (256,))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder: Path = tmp_path_factory.mktemp("tiny-speculate")
    tiny.save("llama", folder, vocab_size=257, eos_token_id=256)
    return TorchRunner.load(folder, RunnerConfig(block_tokens=SIZE, kv_bytes=2**21))


def prompt(seed: int, tokens: int, period: int) -> list[int]:
    """Random, then repeating itself: there is something to look up."""
    words = np.random.default_rng(seed).integers(6, 250, period)
    return [int(token) for token in np.resize(words, tokens)]


def both(runner: TorchRunner, orders: list[tuple[list[int], Sampling]]) -> tuple[list[Heard], list[Heard], Loop]:
    """The same orders without drafts and with them."""
    plain, drafting = Loop(runner, FACTS, SIZE), Loop(runner, FACTS, SIZE, has_drafts=True)
    heard = [[loop.submit(ids, sampling) for ids, sampling in orders] for loop in (plain, drafting)]
    plain.run()
    drafting.run()
    return heard[0], heard[1], drafting


def right_tokens(loop: Loop) -> tuple[int, int]:
    speculator = loop.core._speculator
    assert speculator is not None
    return speculator.right, speculator.drafted


def test_greedy_loops_are_drafted_and_the_text_is_the_same(runner: TorchRunner) -> None:
    """A tiny greedy model soon repeats itself."""
    orders = [(prompt(seed, 40, 13), Sampling(temperature=0.0, max_tokens=120, ignore_eos=True)) for seed in range(3)]
    for order in orders:
        (plain,), (drafted,), loop = both(runner, [order])
        assert drafted.ids == plain.ids
        assert drafted.end == plain.end
        right, tried = right_tokens(loop)
        assert right > 20
        assert right / tried > 0.3
        assert loop.core._steps < 120


SAMPLING = st.builds(
    lambda temperature, seed, length, first: Sampling(
        temperature, seed=seed, max_tokens=length, min_tokens=min(first, length), stop_ids=(seed + 100,)
    ),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.integers(0, 50),
    st.integers(1, 60),
    st.integers(0, 10),
)
ORDERS = st.lists(st.tuples(st.builds(prompt, st.integers(0, 9), st.integers(4, 70), st.integers(2, 20)), SAMPLING))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(orders=ORDERS.filter(lambda orders: 0 < len(orders) < 4))
def test_drafts_on_or_off_the_answers_are_the_same(
    runner: TorchRunner, orders: list[tuple[list[int], Sampling]]
) -> None:
    """Sampling too, for each token is chosen by its own place's number: so the distribution is kept as well."""
    plain, drafted, _ = both(runner, orders)

    assert [heard.ids for heard in drafted] == [heard.ids for heard in plain]
    assert [heard.end for heard in drafted] == [heard.end for heard in plain]


def test_what_was_drafted_is_cached_as_ever(runner: TorchRunner) -> None:
    """The next turn of a conversation finds every full block of the answer, and goes on from right KV."""
    first = Sampling(temperature=0.0, max_tokens=100, ignore_eos=True)
    texts = []
    for has_drafts in (False, True):
        loop = Loop(runner, FACTS, SIZE, has_drafts=has_drafts)
        ids = prompt(1, 40, 13)
        ids = ids + loop.ask(ids, first).ids
        again = loop.ask(ids, first)
        assert again.end is not None
        assert again.end.cached_tokens == (len(ids) - 1) // SIZE * SIZE
        texts.append(again.ids)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "bound",
    [
        Sampling(temperature=0.0, max_tokens=40, logprobs=1),
        Sampling(temperature=0.0, max_tokens=40, repetition_penalty=1.1),
        Sampling(temperature=0.0, max_tokens=40, grammar_kind="regex", grammar="(ab)*"),
    ],
    ids=["scores", "penalties", "grammar"],
)
def test_what_depends_on_every_token_before_it_is_not_drafted(runner: TorchRunner, bound: Sampling) -> None:
    loop = Loop(runner, FACTS, SIZE, has_drafts=True)
    grammar = COMPILER.compile("regex", bound.grammar) if bound.grammar_kind else None
    heard = loop.ask(prompt(1, 40, 4), bound, grammar=grammar)

    assert len(heard.ids) == 40
    assert right_tokens(loop) == (0, 0)


@pytest.mark.parametrize(
    "bound",
    [
        Sampling(temperature=0.0, max_tokens=60, logprobs=1),
        Sampling(temperature=0.0, max_tokens=60, repetition_penalty=1.1),
        Sampling(temperature=0.0, max_tokens=60, grammar_kind="regex", grammar="(ab)*"),
    ],
    ids=["scores", "penalties", "grammar"],
)
def test_beside_a_drafted_neighbour_each_says_what_it_says_alone(runner: TorchRunner, bound: Sampling) -> None:
    free, kind = Sampling(temperature=0.0, max_tokens=60), bound.grammar_kind
    asked = [(prompt(1, 40, 4), free, ""), (prompt(2, 40, 4), bound, kind)]

    def submit(loop: Loop, ids: list[int], sampling: Sampling, kind: str) -> Heard:
        grammar = COMPILER.compile(kind, sampling.grammar) if kind else None
        return loop.submit(ids, sampling, grammar=grammar)

    together = Loop(runner, FACTS, SIZE, has_drafts=True)
    heard = [submit(together, *one) for one in asked]
    together.run()
    for one, said in zip(asked, heard, strict=True):
        alone = Loop(runner, FACTS, SIZE)
        expected = submit(alone, *one)
        alone.run()
        assert (said.ids, len(said.scored)) == (expected.ids, len(expected.scored))


@given(ids=st.lists(st.integers(0, 3), max_size=60), count=st.integers(0, 9), words=st.integers(1, 4))
def test_a_draft_is_what_followed_the_same_words_last(ids: list[int], count: int, words: int) -> None:
    drafted = lookup(np.array(ids, np.int32), count, words).tolist()

    places = [at for at in range(len(ids) - words) if ids[at : at + words] == ids[-words:]]
    expected = ids[places[-1] + words : places[-1] + words + count] if places and count else []
    assert drafted == expected


def test_who_is_always_wrong_rests_longer_and_longer_and_one_success_ends_that() -> None:
    habit, asked = Habit(), []
    for _ in range(9):
        habit.note(4, 0)
        asked.append(next(steps for steps in range(1000) if not habit.is_resting()))
    assert asked == sorted(asked)
    assert asked[-1] == REST_STEPS_MAX - 1
    assert habit.right < 0.05
    habit.note(4, 4)
    assert not habit.is_resting()
    assert habit.right > 0.2
