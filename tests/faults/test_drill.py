"""The drill: workers are killed again and again under streaming load, and every stream says what it would have said."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.faults.house import House, house

pytestmark = [pytest.mark.model, pytest.mark.nightly]

ROUNDS = 24
STREAMS = 8
TOKENS = 60


async def kill_and_restart(built: House, name: str) -> None:
    built.hurt(name, signal.SIGKILL)
    built.workers[name].wait()
    built.start_worker(name)
    await built.until_up(2)


def test_no_stream_loses_or_repeats_a_token_in_two_dozen_kills(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, slower=8) as built:
            prompts = [f"{number} {'word ' * 200}" for number in range(STREAMS)]
            calm = [await built.ask(prompt, tokens=TOKENS).end() for prompt in prompts]
            for round_number in range(ROUNDS):
                streams = [built.ask(prompt, tokens=TOKENS) for prompt in prompts]
                for stream in streams:
                    await stream.until(lambda seen: len(seen.text) > 0)
                await kill_and_restart(built, f"w{round_number % 2}")
                ended = [await stream.end() for stream in streams]
                assert [stream.text for stream in ended] == [stream.text for stream in calm]
                assert all(stream.is_done and not stream.errors for stream in ended)
            assert await built.metric("headway_worker_losses_total") == ROUNDS

    asyncio.run(scene())
