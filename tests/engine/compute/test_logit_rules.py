"""Penalties, bias and log-probabilities: as transformers and OpenAI define them, and nothing for rows that ask none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from engine.compute.logit_rules import penalise, steer
from engine.compute.sampling import choose
from engine.step import History, Masked
from engine.wire import Sampling

VOCAB = 40
ROW = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 3


def penalised(ids: list[int], prompt_len: int, **knobs: float) -> torch.Tensor:
    logits = ROW.clone()
    penalise(logits, [Sampling(**knobs)], {0: History(np.array(ids, np.int32), prompt_len)})  # type: ignore[arg-type]
    return logits


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60), penalty=st.floats(0.2, 3.0))
def test_repetition_is_penalised_as_in_transformers(ids: list[int], penalty: float) -> None:
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), ROW.clone())

    torch.testing.assert_close(penalised(ids, len(ids) // 2, repetition_penalty=penalty), theirs)


def test_presence_counts_once_and_frequency_each_time_and_neither_counts_the_prompt() -> None:
    logits = penalised([1, 1, 2, 7, 7, 7, 8], 3, presence_penalty=0.5, frequency_penalty=0.25)

    taken = (ROW - logits)[0]
    assert taken[7].item() == pytest.approx(0.5 + 3 * 0.25)
    assert taken[8].item() == pytest.approx(0.5 + 0.25)
    assert taken.count_nonzero() == 2


def test_a_bias_is_added_and_decides() -> None:
    logits = ROW.repeat(2, 1)
    steer(logits, [Sampling(logit_bias=((3, 100.0), (4, -2.0))), Sampling()], np.zeros(2, np.int32), [])

    assert logits.argmax(-1).tolist() == [3, int(ROW.argmax())]
    assert (logits[0] - ROW[0])[4].item() == pytest.approx(-2.0)
    assert torch.equal(logits[1], ROW[0])


def test_log_probabilities_are_the_models_own_whatever_the_settings() -> None:
    asked = Sampling(temperature=0.0, logprobs=3, logit_bias=((9, 100.0),))
    chosen = choose(ROW.repeat(2, 1), [Sampling(temperature=0.0), asked], np.zeros(2, np.int32), [])

    plain = ROW[0].log_softmax(-1)
    assert list(chosen.scores) == [1]
    score = chosen.scores[1]
    assert (chosen.ids[1], score.chosen) == (9, pytest.approx(plain[9].item()))
    assert score.top_ids == tuple(plain.topk(3).indices.tolist())
    assert score.top == pytest.approx(plain.topk(3).values.tolist())


class Ready:
    """Masks that were made before."""

    def __init__(self, masked: Masked) -> None:
        self._masked = masked

    def take(self) -> Masked:
        return self._masked


def test_a_mask_holds_at_every_temperature_and_touches_no_other_row() -> None:
    bits = np.zeros((1, 2), np.int32)
    bits[0, 0], bits[0, 1] = 1 << 6, 1 << 1  # ids 6 and 33
    for seed in range(30):
        sampling = [Sampling(seed=seed, temperature=2.0), Sampling(seed=seed, temperature=2.0)]
        masked = choose(ROW.repeat(2, 1), sampling, np.zeros(2, np.int32), [], masks=Ready(Masked([1], bits, {})))
        free = choose(ROW.repeat(2, 1), sampling, np.zeros(2, np.int32), [])
        assert masked.ids[1] in (6, 33)
        assert masked.ids[0] == free.ids[0]


def test_a_row_that_may_say_nothing_is_bad_and_says_why() -> None:
    nothing = Masked([0], np.zeros((1, 2), np.int32), {0: "out of fuel"})
    chosen = choose(ROW.repeat(2, 1), [Sampling()] * 2, np.zeros(2, np.int32), [], masks=Ready(nothing))

    assert chosen.is_bad.tolist() == [True, False]
    assert chosen.messages == {0: "out of fuel"}


def test_a_mask_does_not_hide_that_a_row_is_not_a_number() -> None:
    logits = ROW.clone()
    logits[0, 5] = torch.nan
    only_six = Masked([0], np.array([[1 << 6, 0]], np.int32), {})

    assert choose(logits, [Sampling()], np.zeros(1, np.int32), [], masks=Ready(only_six)).is_bad.tolist() == [True]
