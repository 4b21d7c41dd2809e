"""The embedded model: the text of the engine is the text of transformers, token for token, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engine.runner import TorchRunner
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
PROMPTS = (*(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in QUESTIONS), *TEXTS)


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
    assert len(prompts) >= 20

    for text, prompt, output in zip(PROMPTS, prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == output, text


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
