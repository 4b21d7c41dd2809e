"""Whole answers of a tiny random model: grammars hold, and an answer resumed anywhere goes on as it would have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.compute.grammar import GrammarCompiler
from engine.compute.runner import RunnerConfig, TorchRunner
from engine.step import ModelFacts
from engine.wire import Sampling
from tests.engine import tiny
from tests.engine.compute.test_grammar import EOS, byte_tokenizer
from tests.engine.loop import Heard, Loop

SIZE = 4
VOCAB = EOS + 1
FACTS = ModelFacts("tiny", "digest", "cpu", "float32", VOCAB, 512, (EOS,))
TOKENIZER: Tokenizer = byte_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER.to_str(), VOCAB, FACTS.eos_ids)
PROMPT: list[int] = TOKENIZER.encode("Tell me of the city: ").ids
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Zürich", "東京"]}, "days": {"type": "integer", "maximum": 99}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder: Path = tmp_path_factory.mktemp("tiny-bytes")
    tiny.save("llama", folder, vocab_size=VOCAB, eos_token_id=EOS)
    return TorchRunner.load(folder, RunnerConfig(block_tokens=SIZE, kv_bytes=2**20))


def ask(runner: TorchRunner, sampling: Sampling, said: list[int] = []) -> Heard:  # noqa: B006 -- never changed
    """One answer; `said` was emitted by an earlier attempt."""
    grammar = COMPILER.compile(sampling.grammar_kind, sampling.grammar) if sampling.grammar_kind else None
    for token in said:
        if grammar is not None:
            grammar.accept(token)
    loop = Loop(runner, FACTS, SIZE)
    return loop.ask(PROMPT + said, sampling, prompt_len=len(PROMPT), grammar=grammar)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_chance_the_answer_fits_its_schema(runner: TorchRunner, seed: int) -> None:
    sampling = Sampling(seed=seed, max_tokens=200, grammar_kind="json_schema", grammar=SCHEMA)
    heard = ask(runner, sampling)

    assert heard.end is not None
    assert (heard.end.reason, heard.ids[-1]) == ("stop", EOS)
    answer = json.loads(TOKENIZER.decode(heard.ids))
    assert answer["city"] in ("Oslo", "Zürich", "東京")
    assert answer["days"] <= 99


@pytest.mark.parametrize("seed", range(3))
def test_a_grammar_that_cannot_go_on_is_its_clients_fault_and_costs_nobody_the_cache(
    runner: TorchRunner, seed: int
) -> None:
    loop = Loop(runner, FACTS, SIZE)
    endless = Sampling(seed=seed, max_tokens=20, grammar_kind="json_schema", grammar='{"$ref": "#"}')
    stuck = loop.ask(PROMPT, endless, grammar=COMPILER.compile(endless.grammar_kind, endless.grammar))

    assert stuck.end is not None
    assert stuck.end.reason == "invalid"
    assert "grammar" in stuck.end.message
    again = loop.ask(PROMPT, Sampling(max_tokens=3))
    assert again.end is not None
    assert again.end.cached_tokens == (len(PROMPT) - 1) // SIZE * SIZE


def test_neither_ignore_eos_nor_min_tokens_goes_beyond_a_grammars_end(runner: TorchRunner) -> None:
    wanted = Sampling(ignore_eos=True, min_tokens=50, max_tokens=60, grammar_kind="regex", grammar="ab*c")

    heard = ask(runner, wanted)

    assert heard.end is not None
    assert heard.end.reason == "stop"
    assert heard.ids[-1] == EOS


def test_rows_with_and_without_a_grammar_share_steps(runner: TorchRunner) -> None:
    free, bound = (
        Sampling(seed=3, max_tokens=20),
        Sampling(seed=3, max_tokens=20, grammar_kind="regex", grammar="x{20}"),
    )
    alone = ask(runner, free).ids
    loop = Loop(runner, FACTS, SIZE)
    first = loop.submit(PROMPT, free)
    second = loop.submit(PROMPT, bound, grammar=COMPILER.compile("regex", "x{20}"))
    loop.run()

    assert first.ids == alone
    assert TOKENIZER.decode(second.ids) == "x" * 20


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0, max_tokens=24),
        Sampling(seed=5, top_p=0.9, max_tokens=24),
        Sampling(seed=5, temperature=0.0, max_tokens=24, **PENALTIES),  # type: ignore[arg-type]
        Sampling(seed=6, min_tokens=24, max_tokens=40, stop_ids=(101,), **PENALTIES),  # type: ignore[arg-type]
        Sampling(seed=11, max_tokens=60, grammar_kind="json_schema", grammar=SCHEMA),
        Sampling(seed=2, max_tokens=40, grammar_kind="regex", grammar="(東|京|ü){4,9}"),
    ],
    ids=["greedy", "sampled", "penalties", "stops", "schema", "characters"],
)
def test_an_answer_resumed_at_any_token_goes_on_as_it_would_have(runner: TorchRunner, sampling: Sampling) -> None:
    """The model speaks bytes: most cuts in `characters` fall inside a UTF-8 character."""
    whole = ask(runner, sampling)
    assert whole.end is not None

    for cut in range(1, len(whole.ids), 3):
        rest = ask(runner, sampling, whole.ids[:cut])
        assert rest.ids == whole.ids[cut:]
        assert rest.end is not None
        assert (rest.end.reason, rest.end.output_tokens) == (whole.end.reason, whole.end.output_tokens)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63), temperature=st.floats(0.1, 5), penalty=st.floats(0.5, 2))
def test_same_seed_same_text_whatever_runs_beside(
    runner: TorchRunner, seed: int, temperature: float, penalty: float
) -> None:
    wanted = Sampling(temperature, seed=seed, repetition_penalty=penalty, max_tokens=10)
    alone = ask(runner, wanted).ids
    loop = Loop(runner, FACTS, SIZE)
    beside = [loop.submit(PROMPT[: 5 + other], Sampling(seed=other, max_tokens=12)) for other in range(3)]
    mine = loop.submit(PROMPT, wanted)
    loop.run()

    assert mine.ids == alone
    assert all(len(other.ids) <= 12 for other in beside)


def test_scores_come_with_their_tokens_and_only_where_asked(runner: TorchRunner) -> None:
    loop = Loop(runner, FACTS, SIZE)
    told = loop.submit(PROMPT, Sampling(temperature=0.0, max_tokens=6, logprobs=2))
    quiet = loop.submit(PROMPT, Sampling(temperature=0.0, max_tokens=6))
    loop.run()

    assert [scored.top_ids[0] for scored in told.scored] == told.ids  # greedy: the likeliest was chosen
    assert all(scored.logprob == scored.top_logprobs[0] > scored.top_logprobs[1] for scored in told.scored)
    assert quiet.scored == []


@pytest.mark.parametrize("knobs", [{"logit_bias": ((VOCAB, 1.0),)}, {"stop_ids": (2**31 - 1,), "min_tokens": 3}])
def test_a_token_outside_the_vocabulary_is_the_clients_fault(runner: TorchRunner, knobs: dict[str, object]) -> None:
    heard = ask(runner, Sampling(max_tokens=4, **knobs))  # type: ignore[arg-type]

    assert heard.end is not None
    assert heard.end.reason == "invalid"
    assert str(VOCAB) in heard.end.message
