"""Orders about the worker itself: other weights between two steps, and another policy."""

from __future__ import annotations

from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.kv import keys
from engine.step import ModelFacts
from engine.wire import Sampling, SetPolicy, UpdateWeights
from tests.engine import tiny
from tests.engine.loop import Loop

SIZE = 4
FACTS = ModelFacts("tiny", "digest", "cpu", "float32", 211, 512, (5,))
PROMPT = list(range(20, 50))
WANTED = Sampling(seed=3, temperature=0.7, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two models of one shape, and one of another."""
    old, new, other = (tmp_path_factory.mktemp(name) for name in ("old", "new", "other"))
    tiny.save("llama", old)
    model = tiny.model_of("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(new)
    tiny.save("llama", other, num_hidden_layers=1)
    return old, new, other


def runner(folder: Path) -> TorchRunner:
    return TorchRunner.load(folder, RunnerConfig(block_tokens=SIZE, kv_bytes=2**20))


def test_who_runs_goes_on_behind_its_tokens_with_the_new_weights(folders: tuple[Path, Path, Path]) -> None:
    old, new, _ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    heard = loop.submit(PROMPT, WANTED)
    loop.tell(UpdateWeights(1, str(new), 7), after_tokens=20)
    loop.run()

    changed = heard.versions.index(7)
    assert 20 <= changed < 60
    assert heard.versions == [0] * changed + [7] * (60 - changed)
    assert [(told.request, told.error) for told in loop.told] == [(1, "")]
    assert heard.ids[:changed] == Loop(runner(old), FACTS, SIZE).ask(PROMPT, WANTED).ids[:changed]
    resumed = Loop(runner(new), FACTS, SIZE).ask(PROMPT + heard.ids[:changed], WANTED, prompt_len=len(PROMPT))
    assert heard.ids[changed:] == resumed.ids


def test_kv_of_the_old_weights_is_never_found_again(folders: tuple[Path, Path, Path]) -> None:
    old, new, _ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    greedy = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
    before = loop.ask(PROMPT, greedy)
    loop.tell(UpdateWeights(1, str(new), 2))
    after, again = loop.ask(PROMPT, greedy), loop.ask(PROMPT, greedy)

    assert after.end is not None
    assert again.end is not None
    assert (after.end.cached_tokens, again.end.cached_tokens) == (0, 28)
    assert after.ids == again.ids == Loop(runner(new), FACTS, SIZE).ask(PROMPT, greedy).ids
    assert after.ids != before.ids
    hello = loop.attach()
    assert hello.weights_version == 2
    assert hello.root == keys.root(hello.model_digest, weights_version=2)
    assert hello.model_digest != FACTS.digest


def test_weights_of_another_shape_or_place_are_refused_and_all_goes_on(folders: tuple[Path, Path, Path]) -> None:
    old, _, other = folders
    loop = Loop(runner(old), FACTS, SIZE)
    heard = loop.submit(PROMPT, WANTED)
    loop.tell(UpdateWeights(1, str(other), 7), after_tokens=5)
    loop.run()
    loop.tell(UpdateWeights(2, "/no/such/folder", 8))

    assert heard.ids == Loop(runner(old), FACTS, SIZE).ask(PROMPT, WANTED).ids
    assert heard.versions == [0] * 60
    first, second = loop.told
    assert "another shape" in first.error
    assert "/no/such/folder" in second.error


def test_steps_are_planned_by_another_policy_and_the_text_stays(folders: tuple[Path, Path, Path]) -> None:
    old, *_ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    loop.tell(SetPolicy(1, "static-512"))
    loop.tell(SetPolicy(2, "no-such-policy"))

    assert loop.ask(PROMPT, WANTED).ids == Loop(runner(old), FACTS, SIZE).ask(PROMPT, WANTED).ids
    assert loop.told[0].error == ""
    assert "no-such-policy" in loop.told[1].error


def test_one_set_of_weights_is_loaded_at_a_time(folders: tuple[Path, Path, Path]) -> None:
    old, new, _ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    control = loop.core._control
    for number in (1, 2):
        control.begin(1, UpdateWeights(number, str(new), number))
    wait([control._loading[0].renewal], timeout=60)

    assert [(told.request, bool(told.error)) for _, told in control.done(0.0)] == [(2, True), (1, False)]
    assert control.weights_version == 1
