"""Grammars: whatever the sampler picks from the mask, the text fits; a hostile grammar is refused within bounds."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.compute.grammar import Grammar, GrammarCompiler, GrammarError, GrammarLimits

EOS = 256


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)} | {"<end>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER.to_str(), 257, [EOS], GrammarLimits())


def allowed(grammar: Grammar) -> list[int]:
    mask = np.zeros(9, np.int32)
    grammar.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def generate(grammar: Grammar, seed: int, tokens_max: int = 400) -> str:
    chance, ids = random.Random(seed), []
    for _ in range(tokens_max):
        token = chance.choice(allowed(grammar))
        if token == EOS:
            break
        grammar.accept(token)
        ids.append(token)
    return TOKENIZER.decode(ids)


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bern"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(20))
def test_any_choice_from_the_masks_fits_the_schema(compiler: GrammarCompiler, seed: int) -> None:
    schema = json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}})
    answer = json.loads(generate(compiler.compile("json_schema", schema), seed))
    assert answer["city"] in {"Oslo", "Bern"}
    assert 1 <= answer["days"] <= 9


def test_the_end_is_allowed_only_where_the_text_is_whole(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile("regex", "ab?")
    assert EOS not in allowed(grammar)
    grammar.accept(TOKENIZER.token_to_id("a"))
    assert EOS in allowed(grammar)


def test_a_grammar_from_the_cache_starts_at_its_beginning(compiler: GrammarCompiler) -> None:
    first = compiler.compile("json_schema", json.dumps(SCHEMA))
    for token in TOKENIZER.encode('{"city": "Os').ids:
        first.accept(token)

    assert allowed(first) == [TOKENIZER.token_to_id("l")]
    assert TOKENIZER.token_to_id("{") in allowed(compiler.compile("json_schema", json.dumps(SCHEMA)))


def test_a_token_outside_the_mask_fails_that_sequence(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile("regex", "a")
    with pytest.raises(GrammarError):
        grammar.accept(TOKENIZER.token_to_id("z"))


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", "{"),
        ("json_schema", '{"type": 7}'),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}'),
        ("json_schema", '{"$ref": "https://example.org/elsewhere.json"}'),
        ("json_schema", "[" * 50_000),
        ("regex", "(a"),
        ("lark", "start: nowhere"),
        ("gbnf", "root ::= x"),
        ("json_schema", " " * 70_000 + "{}"),
    ],
)
def test_a_malformed_impossible_or_hostile_grammar_is_refused(
    compiler: GrammarCompiler, kind: str, source: str
) -> None:
    with pytest.raises(GrammarError) as refused:
        compiler.compile(kind, source)
    assert len(str(refused.value)) < 400


def masks_until_it_fails(grammar: Grammar, token: int, steps_max: int) -> int:
    for step in range(steps_max):
        try:
            allowed(grammar)
            grammar.accept(token)
        except GrammarError:
            return step
    return steps_max


def test_a_mask_that_outruns_its_fuel_fails_that_sequence_alone() -> None:
    frugal = GrammarCompiler(TOKENIZER.to_str(), 257, [EOS], GrammarLimits(step_items_max=300))
    ambiguous = frugal.compile("lark", 'start: s\ns: s s s | s s | "a"')
    modest = frugal.compile("regex", "a+")
    letter = TOKENIZER.token_to_id("a")
    assert masks_until_it_fails(ambiguous, letter, 200) < 200
    assert masks_until_it_fails(modest, letter, 200) == 200


def test_the_cache_is_bounded() -> None:
    small = GrammarCompiler(TOKENIZER.to_str(), 257, [EOS], GrammarLimits(cached_grammars_max=2))
    for text in ("a", "b", "c", "d"):
        small.compile("regex", text)
    assert len(small._cache) == 2
