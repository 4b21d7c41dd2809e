"""The drill: workers are killed again and again under streaming load, and every stream says what it would have said,
wherever it was cut: inside a thought, a tool call's JSON, half a character, one of several answers, a grammar."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router.language.vocabulary import Vocabulary
from router.settings.config import Config, Model
from tests.faults.house import House, Stream, house

pytestmark = pytest.mark.model

STREAMS = 8
TOKENS = 60
NIGHTLY_S = 120.0
EOS = 2  # of fake workers
SPOKEN = (
    "<think>\nThe user wants the weather in Grüße 🌍 and 東京; that is two calls, with odd strings: <b> & \\u00e9.\n"
    "</think>\n\nI shall ask — twice: naïve café 👩‍👩‍👧 🇺🇳.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "東京 \\"q\\" </tool", "days": [1, 2]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Grüße 🌍", "deep": {"a": {"b": null}}}}\n</tool_call>'
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
VOICED = Config(model=Model(calls="hermes", thoughts="think"))

Ask = Callable[[House, int], Stream]


def ask_plainly(built: House, number: int) -> Stream:
    return built.ask(f"{number} {'word ' * 200}", tokens=TOKENS)


async def kill_and_restart(built: House, name: str) -> None:
    built.hurt(name, signal.SIGKILL)
    built.workers[name].wait()
    await built.until(lambda seen: not seen[name]["is_up"])  # else the old one may be taken for the new
    built.start_worker(name)
    await built.until_up(2)


async def drill(built: House, ask: Ask, goes_on: Callable[[int], bool], rng: random.Random) -> int:
    """Kill one worker after the other at random moments of running streams. How many died."""
    calm = [await ask(built, number).end() for number in range(STREAMS)]
    assert all(stream.is_done and not stream.errors for stream in calm)
    kills = 0
    while goes_on(kills):
        streams = [ask(built, number) for number in range(STREAMS)]
        watched = rng.choice(streams)
        chars = rng.randrange(1, max(2, len(str(calm[streams.index(watched)].said)) * 3 // 4))
        await watched.until(lambda seen, chars=chars: len(str(seen.said)) >= chars)  # type: ignore[misc]
        await kill_and_restart(built, built.names[kills % len(built.names)])
        kills += 1
        ended = [await stream.end() for stream in streams]
        assert [stream.said for stream in ended] == [stream.said for stream in calm]
        assert [stream.finish_reason for stream in ended] == [stream.finish_reason for stream in calm]
        assert all(stream.is_done and not stream.errors for stream in ended)
    assert await built.metric("headway_worker_losses_total") == kills
    return kills


def spoken(tmp_path: Path, model: Path) -> tuple[Path, Ask]:
    """A file that makes fake workers think and call tools, and a way to ask for it."""
    ids = [*Vocabulary.load(model).encode_data([SPOKEN])[0], EOS]
    path = tmp_path / "says.bin"
    path.write_bytes(b"".join(token.to_bytes(4, "little") for token in ids))

    def ask(built: House, number: int) -> Stream:
        fields: dict[str, Any] = {"tools": [WEATHER], "ignore_eos": False}
        return built.ask(f"{number} {'word ' * 100}", tokens=2 * len(ids), n=1 + number % 2, fields=fields)

    return path, ask


def test_no_stream_loses_or_repeats_a_token_in_a_few_kills(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, slower=8) as built:
            await drill(built, ask_plainly, lambda kills: kills < 2, random.Random(5))

    asyncio.run(scene())


def test_thoughts_calls_and_characters_that_were_cut_go_on(tmp_path: Path, model_folder: Path) -> None:
    path, ask = spoken(tmp_path, model_folder)

    async def scene() -> None:
        async with house(tmp_path, model_folder, VOICED, slower=6, says=path) as built:
            healthy = await ask(built, 0).end()
            said = healthy.said
            assert said["0.reasoning_content"].startswith("The user wants the weather in Grüße 🌍 and 東京")
            assert "naïve café 👩‍👩‍👧 🇺🇳" in said["0.content"]
            assert json.loads(said["0.call 1"].removeprefix("weather"))["city"] == "Grüße 🌍"
            assert (len(said), healthy.finish_reason) == (4, "tool_calls")
            await drill(built, ask, lambda kills: kills < 3, random.Random(6))

    asyncio.run(scene())


PLACES = {  # by answer and part: what stands there when its worker is killed, and that is not all of it
    "0.reasoning_content": "The user wants the weather in",
    "0.content": "naïve café ",  # a family of seven characters is next, each of several tokens
    "0.call 0": 'weather{"city": "',
    "0.call 1": 'weather{"city": "Grüße 🌍", "deep"',
}


def test_what_is_cut_inside_a_thought_a_text_or_a_calls_json_is_said_once_and_whole(
    tmp_path: Path, model_folder: Path
) -> None:
    path, ask = spoken(tmp_path, model_folder)

    async def scene() -> None:
        async with house(tmp_path, model_folder, VOICED, slower=10, says=path) as built:
            calm = await ask(built, 0).end()
            for part, begun in PLACES.items():
                stream = await ask(built, 0).until(
                    lambda seen, part=part, begun=begun: begun in seen.said.get(part, "")
                )  # type: ignore[misc]
                assert len(stream.said[part]) < len(calm.said[part])
                await kill_and_restart(built, stream.headers["x-headway-worker"])
                ended = await stream.end()
                assert (ended.said, ended.finish_reason) == (calm.said, calm.finish_reason)
                assert ended.is_done
                assert not ended.errors
            receipts = (await built.admin.get("/receipts")).json()
            assert [receipt["attempts"] for receipt in reversed(receipts)] == [1] + [2] * len(PLACES)

    asyncio.run(scene())


@pytest.mark.nightly
@pytest.mark.parametrize("has_parts", [False, True], ids=["plain", "thoughts and calls"])
def test_no_stream_loses_or_repeats_a_token_in_two_minutes_of_kills(
    tmp_path: Path, model_folder: Path, has_parts: bool
) -> None:
    path, ask = spoken(tmp_path, model_folder)
    config, worker = (VOICED, {"says": path}) if has_parts else (Config(), {})
    until = time.monotonic() + NIGHTLY_S

    async def scene() -> None:
        async with house(tmp_path, model_folder, config, slower=8, **worker) as built:
            asking = ask if has_parts else ask_plainly
            kills = await drill(built, asking, lambda _: time.monotonic() < until, random.Random())
            assert kills > 10

    asyncio.run(scene())


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"type": "integer"}, "rivers": {"type": "array"}},
    "required": ["city", "population", "rivers"],
}


@pytest.mark.nightly
@pytest.mark.parametrize(
    "fields",
    [
        {"ignore_eos": False},
        {"temperature": 1.0, "seed": 7, "frequency_penalty": 0.5},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}},
    ],
    ids=["greedy", "drawn with penalties", "by a grammar"],
)
def test_a_real_models_answer_goes_on_as_it_would_have(
    tmp_path: Path, model_folder: Path, fields: dict[str, Any]
) -> None:
    engine = ("engine", "worker", "--model", str(model_folder), "--device", "cpu", "--kv-bytes", str(256 * 2**20))

    async def scene() -> None:
        async with house(tmp_path, model_folder, engine=engine) as built:

            def ask() -> Stream:
                return built.ask("Tell me about Paris, as JSON.", tokens=60, fields=fields)

            calm = await ask().end()
            assert calm.is_done
            for chars in (5, 40, 90):
                stream = await ask().until(lambda seen, chars=chars: len(seen.text) >= chars)  # type: ignore[misc]
                await kill_and_restart(built, stream.headers["x-headway-worker"])
                assert (await stream.end()).said == calm.said
                assert not stream.errors

    asyncio.run(scene())
