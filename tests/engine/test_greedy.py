"""The embedded model: the text of the engine is the text of transformers, token for token, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engine.compute.runner import TorchRunner
from tests.engine.driver import Blocks, advance, generate

pytestmark = pytest.mark.model

NEW = 24
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List three uses of a paperclip.",
    "Translate 'good morning' to Spanish.",
    "What is 12 + 30?",
    "Who wrote Hamlet, and when?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "Summarise: the cat sat on the mat, then it slept.",
    "What do bees eat?",
    "Name the planets in order.",
    "Is 91 a prime number?",
    "Write a short letter to a landlord about a broken heater.",
)
TEXTS = (
    "Once upon a time, in a village by the river,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The three laws of thermodynamics are",
    '{"name": "Ada", "born": 1815, "fields": [',
    "Ünïcödé und 日本語: a note on 🎉 emoji",
    "SELECT name, count(*) FROM users WHERE",
    "A",
    "To be, or not to be, that is the question: " * 12,
)
MORE_QUESTIONS = (
    "How do I boil an egg?",
    "Qu'est-ce que la photosynthèse ?",
    "Was ist der Unterschied zwischen das und dass?",
    "¿Cuántos planetas hay?",
    "Rewrite politely: give me the report now.",
    "Which is heavier, a kilo of feathers or a kilo of iron?",
    "Give three synonyms of happy as a JSON list.",
    "What comes next: 2, 4, 8, 16?",
    "Explain recursion in one sentence.",
    "Correct the grammar: he go to school yesterday.",
    "Plan a day in Rome.",
    "Is it safe to eat raw potatoes?",
)
MORE_TEXTS = (
    "<html>\n<head>\n<title>",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "Dear Sir or Madam,\n\nI am writing to",
    "1. Preheat the oven to 180 degrees.\n2.",
    "Q: What is DNA?\nA:",
    "| name | age |\n| --- | --- |\n| Ada | 36 |\n|",
    "    \n\n\t\tindented",
    "0123456789 " * 9,
    "🙂🙃🙂🙃🙂🙃",
    "In 1969, humans first",
)
# Up to a thousand tokens; by night one of 4,000.
LINE = "Item {number}: the {thing} weighs {weight} grams and is kept in box {box}.\n"
LONG_TEXTS = tuple(
    "".join(LINE.format(number=at, thing=thing, weight=at * 7 % 50, box=at % 9) for at in range(lines))
    for thing, lines in (("red stone", 14), ("blue bottle", 22), ("old coin", 32), ("small key", 46))
)
SHORT = (
    *(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in (*QUESTIONS, *MORE_QUESTIONS)),
    *TEXTS,
    *MORE_TEXTS,
)
PROMPTS = (*SHORT, *LONG_TEXTS)


@pytest.fixture(scope="session")
def prompts(embedded_folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(embedded_folder / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in PROMPTS]


@pytest.fixture(scope="session")
def outputs(embedded_runner: TorchRunner, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts together: continuous batching, chunks of at most 48 rows beside the decodes."""
    blocks = Blocks(embedded_runner.blocks_total, embedded_runner.block_tokens)
    together = [blocks.start(prompt, NEW) for prompt in prompts]
    while any(len(one.output) < NEW for one in together):
        running = [one for one in together if len(one.output) < NEW][:12]
        advance(embedded_runner, [(one, min(48, len(one.ids) - one.computed)) for one in running])
    return [one.output for one in together]


def test_ids_of_the_rebuilt_tokenizer_are_those_of_transformers(oracle: Any, prompts: list[list[int]]) -> None:
    _, tokenizer = oracle

    assert [tokenizer(text)["input_ids"] for text in PROMPTS] == prompts


def test_greedy_text_equals_transformers_on_every_prompt(
    oracle: Any, prompts: list[list[int]], outputs: list[list[int]]
) -> None:
    """The oracle reads prompt and output at once: if its best token is ours at every place, its own text is ours."""
    model, _ = oracle
    assert len(prompts) == 49
    assert sum(len(prompt) <= 256 for prompt in prompts) == 45

    for text, prompt, output in zip(PROMPTS, prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output]), logits_to_keep=NEW + 1).logits[0, :-1]
        assert logits.argmax(-1).tolist() == output, text


@pytest.mark.nightly
def test_greedy_text_equals_transformers_behind_four_thousand_tokens(
    oracle: Any, embedded_runner: TorchRunner, embedded_folder: Path
) -> None:
    """The fiftieth prompt; a chunk of 512 rows at a time."""
    model, _ = oracle
    tokenizer = Tokenizer.from_file(str(embedded_folder / "tokenizer.json"))
    prompt = tokenizer.encode(LONG_TEXTS[-1] * 6).ids[:4000]
    assert len(prompt) == 4000

    blocks = Blocks(embedded_runner.blocks_total, embedded_runner.block_tokens)
    output = generate(embedded_runner, blocks, prompt, NEW, [512] * 7)

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output]), logits_to_keep=NEW + 1).logits[0, :-1]
    assert logits.argmax(-1).tolist() == output


def test_greedy_text_equals_what_transformers_generates(
    oracle: Any, prompts: list[list[int]], outputs: list[list[int]]
) -> None:
    """Its own loop with its own cache, on two prompts, up to where it ends."""
    model, _ = oracle

    for prompt, output in list(zip(prompts, outputs, strict=True))[1:15:13]:
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        assert theirs == output[: len(theirs)]
        assert len(theirs) == NEW or theirs[-1] == model.config.eos_token_id


def test_a_prompt_in_chunks_and_alone_gives_the_same_text(
    embedded_runner: TorchRunner, prompts: list[list[int]], outputs: list[list[int]]
) -> None:
    blocks = Blocks(embedded_runner.blocks_total, embedded_runner.block_tokens)

    assert generate(embedded_runner, blocks, prompts[-1], 8, [1, 16, 33, 5]) == outputs[-1][:8]
