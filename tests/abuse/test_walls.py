"""Between tenants stands a wall: what one sent cannot be guessed by another, from figures or from where it runs.

An attacker sends again what a victim sent, and as much that nobody sent. The control is a colleague of the victim's,
who shares its cache: what the colleague can tell, the attacker could tell without the wall."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from router.access import keys
from router.settings.config import Config, Server
from tests.faults.house import House, house

pytestmark = pytest.mark.model

PROMPTS = 20  # over two workers
WORDS = 20  # numbers of four digits: 6 blocks; all prompts of the test fit the fake workers' KV


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client can see of its request."""

    cached_tokens: int
    worker: str


async def send(built: House, key: str, text: str) -> Seen:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    headers = {"x-api-key": key, "x-headway-class": "chat"}
    answer = await built.client.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"]["prompt_tokens_details"]
    return Seen(details["cached_tokens"], answer.headers["x-headway-worker"])


async def together(built: House, key: str, texts: Sequence[str]) -> list[tuple[str, Seen]]:
    """All at once, so that every worker gets some."""
    return list(zip(texts, await asyncio.gather(*[send(built, key, text) for text in texts]), strict=True))


def prompt(rng: random.Random) -> str:
    return " ".join(str(rng.randrange(10_000)) for _ in range(WORDS))


def auc(known: Sequence[float], unknown: Sequence[float]) -> float:
    """How often a figure of what was sent before is above one of what was not; 0.5 tells nothing."""
    wins = sum((a > b) + (a == b) / 2 for a in known for b in unknown)
    return wins / (len(known) * len(unknown))


def test_what_another_sent_cannot_be_told_from_what_nobody_sent(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "keys.json"
    victim, colleague = (keys.add(path, name, {"organisation": "acme"}, (), "") for name in ("victim", "colleague"))
    attacker = keys.add(path, "attacker", {"organisation": "other"}, (), "")
    rng = random.Random(3)

    async def probe(built: House, key: str, secrets: Sequence[tuple[str, Seen]]) -> tuple[float, int]:
        """How well its own figures tell this key what was sent before, and how many of its requests ran beside it."""
        pairs = [(await send(built, key, prompt(rng)), await send(built, key, secret)) for secret, _ in secrets]
        told = auc([sent.cached_tokens for _, sent in pairs], [fresh.cached_tokens for fresh, _ in pairs])
        return told, sum(sent.worker == seen.worker for (_, sent), (_, seen) in zip(pairs, secrets, strict=True))

    async def scene() -> None:
        async with house(tmp_path, model_folder, Config(server=Server(keys_file=str(path))), slower=8) as built:
            for key in (colleague, attacker):  # each has the template in its cache on both workers
                await together(built, key, [prompt(rng) for _ in range(8)])
            secrets = await together(built, victim, [prompt(rng) for _ in range(PROMPTS)])
            assert {seen.worker for _, seen in secrets} == set(built.names)
            told, beside = await probe(built, attacker, secrets)
            assert abs(told - 0.5) <= 0.05
            assert beside < PROMPTS
            assert await probe(built, colleague, secrets) == (1.0, PROMPTS)

    asyncio.run(scene())
