"""Log-probabilities of a prompt's own tokens: those of one forward pass, however the prompt was cut and cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.scheduling.sequence import PROMPT_SCORES_MAX
from engine.step import ModelFacts
from engine.wire import Sampling
from policies.step_plan import PlanLimits
from tests.engine.driver import all_logits
from tests.engine.loop import Heard, Loop
from tests.engine.rig import BATCH, Rig, order

SIZE = 4
PROMPT = np.random.default_rng(3).integers(6, 211, 61).tolist()
SCORED = Sampling(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=True)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> torch.Tensor:
    runner = TorchRunner.load(tiny_llama, RunnerConfig(block_tokens=SIZE, kv_bytes=2**20))
    return all_logits(runner, PROMPT, [len(PROMPT)]).log_softmax(-1)


def facts_of(runner: TorchRunner, device: str = "cpu") -> ModelFacts:
    model = runner.model
    eos_ids = tuple(model.eos_ids)
    return ModelFacts("tiny", "digest", device, "float32", model.vocab_size, model.context_max, eos_ids)


def check(heard: Heard, expected: torch.Tensor) -> None:
    """The prompt's tokens from the second on, then the answer's, each once and in order."""
    assert heard.end is not None
    assert [scored.token for scored in heard.scored] == PROMPT[1:] + heard.ids
    for at, scored in enumerate(heard.scored[: len(PROMPT) - 1]):
        best = expected[at].topk(2)
        assert scored.logprob == pytest.approx(float(expected[at, PROMPT[at + 1]]), abs=1e-4)
        assert scored.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
        assert list(scored.top_ids) == best.indices.tolist()


def test_a_prompt_is_scored_cold_and_again_where_all_of_it_is_cached(
    tiny_runner: TorchRunner, expected: torch.Tensor
) -> None:
    loop = Loop(tiny_runner, facts_of(tiny_runner), SIZE)
    plain = Sampling(temperature=0.0, max_tokens=3, ignore_eos=True)

    check(loop.ask(PROMPT, SCORED), expected)
    together = [loop.submit(PROMPT, SCORED), loop.submit(PROMPT, plain), loop.submit(PROMPT, SCORED)]
    loop.run()

    check(together[0], expected)
    check(together[2], expected)
    assert together[1].scored == []
    assert together[0].ids == together[1].ids == together[2].ids


def test_a_resumed_answer_tells_no_prompt_again(tiny_runner: TorchRunner) -> None:
    loop = Loop(tiny_runner, facts_of(tiny_runner), SIZE)
    whole = loop.ask(PROMPT, SCORED)

    rest = loop.ask([*PROMPT, whole.ids[0]], SCORED, prompt_len=len(PROMPT))

    assert [scored.token for scored in rest.scored] == whole.ids[1:]


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_a_prompt_in_chunks_and_preempted_between_them_is_scored_once(
    tiny_runner: TorchRunner, expected: torch.Tensor, rows: int
) -> None:
    limits = PlanLimits(quantum_tokens=rows, rows_max=rows)
    rig = Rig(device=tiny_runner, facts=facts_of(tiny_runner), block_tokens=SIZE, plan_limits=limits)
    rig.submit(order(1, np.array(PROMPT, np.int32), cls=BATCH, sampling=SCORED))
    rig.step()
    rig.step()
    assert 1 not in rig.tokens
    rig.scheduler.renew(rig.trie.root_key, rig.now)  # its KV is void: it begins again
    rig.run()

    check(Heard(ids=rig.tokens[1], scored=rig.scored, end=rig.ends[1]), expected)
    assert len(rig.steps) >= len(PROMPT) // rows + 2


@pytest.mark.parametrize(("device", "logprobs", "words"), [("cuda:0", 1, "CPU"), ("cpu", 1100, "may have")])
def test_what_cannot_be_scored_is_invalid(tiny_runner: TorchRunner, device: str, logprobs: int, words: str) -> None:
    assert len(PROMPT) * 1101 > PROMPT_SCORES_MAX
    rig = Rig(device=tiny_runner, facts=facts_of(tiny_runner, device), block_tokens=SIZE)
    sampling = Sampling(max_tokens=3, logprobs=logprobs, prompt_logprobs=True)

    rig.submit(order(1, np.array(PROMPT, np.int32), sampling=sampling))

    assert rig.ends[1].reason == "invalid"
    assert words in rig.ends[1].message
