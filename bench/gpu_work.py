"""Work for engines on a GPU, the same for each: prompts of token ids, output lengths, temperatures, all from a seed.

Owns the named workloads. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

VOCAB = 10_000  # ids below it exist in every model measured


@dataclass(frozen=True, slots=True)
class Item:
    """One request; it ends after `out` tokens whatever they are."""

    prompt: list[int]
    out: int
    temperature: float = 0.0


def alike(count: int, tokens: int, out: int, seed: int) -> list[Item]:
    """Requests of one length, no two with a common prefix."""
    random = Random(seed)
    return [Item([random.randrange(VOCAB) for _ in range(tokens)], out) for _ in range(count)]


def grouped(
    seed: int, groups: int = 8, members: int = 32, shared: int = 2048, own: int = 128, out: int = 64
) -> list[Item]:
    """Agents behind a few long system prompts: `members` of each group, arriving in turn."""
    random = Random(seed)
    heads = [[random.randrange(VOCAB) for _ in range(shared)] for _ in range(groups)]
    return [
        Item([*head, *(random.randrange(VOCAB) for _ in range(own))], out) for _ in range(members) for head in heads
    ]


def mixed(seed: int, count: int = 256) -> list[Item]:
    """100 to 1,024 tokens in and out, drawn at temperature 0.6: the spread of nano-vllm's published benchmark."""
    random = Random(seed)
    prompts = [[random.randrange(VOCAB) for _ in range(random.randint(100, 1024))] for _ in range(count)]
    return [Item(prompt, random.randint(100, 1024), 0.6) for prompt in prompts]


WORKLOADS = {
    "f256x512x128": lambda seed: alike(256, 512, 128, seed),
    "share8x32": grouped,
    "nano256": mixed,
}
