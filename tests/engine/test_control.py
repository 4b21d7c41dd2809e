"""Orders about the worker itself: other weights between two steps, another policy, sleep and wake."""

from __future__ import annotations

import shutil
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.kv import keys
from engine.loading import manifest, room
from engine.step import ModelFacts
from engine.wire import Hint, HintAction, Sampling, SetPolicy, Sleep, UpdateWeights, Wake
from policies.api import PolicySpec
from tests.engine import tiny
from tests.engine.loop import Loop
from tests.engine.rig import order
from tests.engine.test_equivalence import rig_of

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
    assert "/no/such/folder/config.json cannot be read" in second.error


def test_steps_are_planned_by_another_policy_and_the_text_stays(folders: tuple[Path, Path, Path]) -> None:
    old, *_ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    loop.tell(SetPolicy(1, "static-512"))
    loop.tell(SetPolicy(2, "no-such-policy"))

    assert loop.ask(PROMPT, WANTED).ids == Loop(runner(old), FACTS, SIZE).ask(PROMPT, WANTED).ids
    assert loop.told[0].error == ""
    assert "no-such-policy" in loop.told[1].error
    assert loop.attach().policy_digest == PolicySpec("static-512").digest


def test_a_policy_that_cannot_be_made_leaves_the_one_that_is_there(folders: tuple[Path, Path, Path]) -> None:
    loop = Loop(runner(folders[0]), FACTS, SIZE)
    before = loop.attach().policy_digest
    loop.tell(SetPolicy(1, "tests.engine.test_control:broken"))

    assert (
        loop.told[0].error == "engine policy 'tests.engine.test_control:broken' cannot be made: ZeroDivisionError('oh')"
    )
    assert loop.attach().policy_digest == before
    assert len(loop.ask(PROMPT, WANTED).ids) == 60


def broken() -> None:
    raise ZeroDivisionError("oh")


def test_weights_that_are_damaged_or_too_large_are_refused_and_all_goes_on(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, _ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    damaged = shutil.copytree(new, tmp_path / "damaged")
    size = (damaged / "model.safetensors").stat().st_size
    manifest.write(damaged, manifest.Manifest(manifest.LAYOUT, "m.gguf", "0", "model.safetensors", size, "f" * 32))
    loop.tell(UpdateWeights(1, str(damaged), 7))
    monkeypatch.setattr(room, "available_bytes", lambda: 1000)
    loop.tell(UpdateWeights(2, str(new), 8))

    assert "is damaged" in loop.told[0].error
    assert "0.0 GiB of weights, and 0.0 GiB of memory are free; free some" in loop.told[1].error
    assert loop.attach().weights_version == 0


def test_one_set_of_weights_is_loaded_at_a_time(folders: tuple[Path, Path, Path]) -> None:
    old, new, _ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    control = loop.core._control
    for number in (1, 2):
        control.begin(1, UpdateWeights(number, str(new), number), 0.0)
    wait([control._loading[0].renewal], timeout=240)

    assert [(told.request, bool(told.error)) for _, told in control.done(0.0)] == [(2, True), (1, False)]
    assert control.weights_version == 1


@pytest.mark.parametrize("level", [1, 2])
def test_who_runs_waits_while_the_worker_sleeps_and_goes_on_behind_its_tokens(
    folders: tuple[Path, Path, Path], level: int
) -> None:
    old, *_ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    heard = loop.submit(PROMPT, WANTED)
    loop.tell(Sleep(1, level), after_tokens=20)
    with pytest.raises(AssertionError, match="no end within"):
        loop.run(steps_max=40)

    slept = len(heard.ids)
    assert 20 <= slept < 60
    assert loop.attach().asleep == level
    loop.tell(Wake(2))
    loop.run()

    assert heard.ids == Loop(runner(old), FACTS, SIZE).ask(PROMPT, WANTED).ids
    assert [(told.request, told.error) for told in loop.told] == [(1, ""), (2, "")]
    assert loop.attach().asleep == 0


def test_a_worker_that_sleeps_takes_nothing_and_touches_no_memory(folders: tuple[Path, Path, Path]) -> None:
    old, new, _ = folders
    loop = Loop(runner(old), FACTS, SIZE)
    loop.tell(Sleep(1, 2))
    refused = loop.ask(PROMPT, WANTED)
    loop.tell(UpdateWeights(2, str(new), 7))
    loop.tell(Sleep(3, 3))

    assert refused.end is not None
    assert (refused.end.reason, refused.end.message) == ("refused", "the worker is asleep")
    errors = [told.error for told in loop.told]
    assert errors[0] == ""
    assert "wake it first" in errors[1]
    assert "level 1" in errors[2]


def test_a_hint_cannot_bring_blocks_to_a_device_that_sleeps(folders: tuple[Path, Path, Path]) -> None:
    """They lie in the pool: `prefetch` is answered by nothing, and works again after waking."""
    rig = rig_of(folders[0])
    rig.submit(order(1, np.arange(20, 50, dtype=np.int32), session="s"))
    rig.run()
    rig.scheduler.sleep(rig.now)
    rig.runner.sleep(1)
    hint = Hint("m", [HintAction("a", "prefetch", b"", "s")])

    assert [ack.status for _, ack in rig.scheduler.hints.obey(1, hint, rig.speed, rig.now)] == ["nothing"]
    rig.runner.wake()()
    rig.scheduler.wake()
    assert rig.scheduler.hints.obey(1, hint, rig.speed, rig.now) == []
    rig.tiers.wait(rig.now)
    assert [ack.status for _, ack in rig.scheduler.hints.arrived()] == ["done"]


def test_a_worker_whose_weights_are_gone_from_the_disk_stays_asleep_and_says_so(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[0], folder)
    loop = Loop(runner(folder), FACTS, SIZE)
    loop.tell(Sleep(1, 2))
    shutil.rmtree(folder)
    loop.tell(Wake(2))
    assert "does not hold the weights any more" in loop.told[-1].error
    shutil.copytree(folders[1], folder)
    loop.tell(Wake(3))
    assert "does not hold the weights any more" in loop.told[-1].error

    shutil.rmtree(folder)
    shutil.copytree(folders[0], folder)
    loop.tell(Wake(4))
    assert loop.told[-1].error == ""
    assert loop.ask(PROMPT, WANTED).ids == Loop(runner(folders[0]), FACTS, SIZE).ask(PROMPT, WANTED).ids


def test_memory_is_really_given_back(folders: tuple[Path, Path, Path]) -> None:
    """64 MiB of KV, written once so that they are pages."""
    sleeper = TorchRunner.load(folders[0], RunnerConfig(block_tokens=SIZE, kv_bytes=64 * 2**20))
    with torch.inference_mode():
        sleeper._pool.memory.fill_(1.0)
    before = resident_bytes()
    sleeper.sleep(1)
    assert before - resident_bytes() > 60 * 2**20
    sleeper.wake()()
    assert sleeper._pool.memory.count_nonzero() == 0


def resident_bytes() -> int:
    """Of this process, without files and shared memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])
