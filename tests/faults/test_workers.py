"""Workers die, freeze and lie: what that costs the clients, and that nothing else is cost."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from router.settings.config import Classes, Config, Promise
from tests.faults.house import DEADLINE_S, House, Stream, house

pytestmark = pytest.mark.model

LONG = "word " * 1500  # prefill of this takes a fake worker 0.6 s at 20 times its usual slowness
IN_PREFILL = ("--calibrate-s", "0", "--fault", "stall@2:60")  # the step behind the warm-up: no token before its death


CHAT = {"x-headway-class": "chatbot+"}


def patient_for(seconds: float) -> Config:
    """Clients of chatbot+ that leave after this."""
    return Config(classes=Classes(chatbot=Promise(patience_s=seconds)))


async def healthy_answer(built: House, prompt: str, tokens: int = 20) -> str:
    """What this prompt's answer is when nothing goes wrong."""
    answer = await built.ask(prompt, tokens=tokens).end()
    assert answer.is_done
    assert answer.text
    return answer.text


async def running(built: House, count: int, tokens: int) -> list[Stream]:
    """So many streams after their first token, spread over both workers by their long prompts."""
    streams = [built.ask(f"{number} {LONG}", tokens=tokens) for number in range(count)]
    for stream in streams:
        await stream.until(lambda seen: len(seen.text) > 0)
    return streams


def test_a_worker_killed_in_prefill_costs_the_client_nothing(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, flags={"w0": IN_PREFILL}, slower=20) as built:
            answers = [built.ask(f"{number} {LONG}") for number in range(4)]
            await built.until(lambda seen: seen["w0"]["requests"] > 0)

            built.hurt("w0", signal.SIGKILL)

            ended = [await answer.end() for answer in answers]
            assert [answer.status for answer in ended] == [200] * 4
            assert all(answer.is_done and not answer.errors for answer in ended)
            assert {answer.headers["x-headway-worker"] for answer in ended} == {"w1"}
            assert ended[0].text == await healthy_answer(built, f"0 {LONG}")

    asyncio.run(scene())


def test_a_worker_killed_in_mid_stream_costs_a_gap_and_no_token(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, slower=20) as built:
            streams = await running(built, 4, tokens=60)
            assert {stream.headers["x-headway-worker"] for stream in streams} == {"w0", "w1"}

            built.hurt("w0", signal.SIGKILL)

            moved = next(stream for stream in streams if stream.headers["x-headway-worker"] == "w0")
            for stream in [await stream.end() for stream in streams]:
                assert stream.is_done
                assert stream.finish_reason == "length"
                assert not stream.errors
            assert moved.text == await healthy_answer(built, moved.prompt, tokens=60)
            assert await built.metric("headway_worker_losses_total") == 1

    asyncio.run(scene())


def test_a_stream_that_cannot_go_on_ends_with_an_error(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, patient_for(6.0), slower=20) as built:
            stream = await built.ask("a story", tokens=400, **CHAT).until(lambda seen: len(seen.text) > 0)

            for name in ("w0", "w1"):
                built.hurt(name, signal.SIGKILL)

            await stream.end()
            assert stream.status == 200
            assert len(stream.errors) == 1
            assert stream.errors[0]["message"]
            assert not stream.is_done
            assert stream.finish_reason is None

    asyncio.run(scene())


def test_a_frozen_worker_is_ejected_named_to_the_keeper_and_may_come_back(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, slower=20) as built:
            built.hurt("w0", signal.SIGSTOP)  # before it is asked: else it might answer all before it stops
            answers = [built.ask(f"{number} {LONG}") for number in range(4)]
            await built.until(lambda seen: seen["w0"]["requests"] > 0)
            ended = [await answer.end() for answer in answers]
            async with asyncio.timeout(DEADLINE_S):
                asked = await asyncio.get_running_loop().run_in_executor(None, os.read, built.asked_read, 100)
            built.hurt("w0", signal.SIGCONT)
            await built.until_up(2)

            assert all(answer.is_done and not answer.errors for answer in ended)
            assert asked == b"w0\n"
            assert ended[0].text == await healthy_answer(built, f"0 {LONG}")

    asyncio.run(scene())


def test_a_request_without_workers_is_held_until_one_is_back(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, patient_for(DEADLINE_S)) as built:
            expected = await healthy_answer(built, "hello")
            for name in ("w0", "w1"):
                built.hurt(name, signal.SIGKILL)
            await built.until(lambda seen: not any(worker["is_up"] for worker in seen.values()))
            assert (await built.client.get("/readyz")).status_code == 503

            held = built.ask("hello", **CHAT)
            built.start_worker("w1")

            await held.end()
            assert held.is_done
            assert held.text == expected

    asyncio.run(scene())


def test_a_request_without_workers_is_refused_when_its_patience_ends(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, patient_for(0.5)) as built:
            for name in ("w0", "w1"):
                built.hurt(name, signal.SIGKILL)
            await built.until(lambda seen: not any(worker["is_up"] for worker in seen.values()))

            refused = await built.ask("hello", **CHAT).end()

            assert refused.status == 503
            assert refused.headers["x-headway-class"] == "chatbot+"
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.body["error"]["message"]

    asyncio.run(scene())


def test_a_worker_that_sends_garbage_is_ejected_and_nobody_sees_it(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, slower=5, fault="bad-frame@60") as built:
            answers = [await answer.end() for answer in [built.ask(f"tale {n}", tokens=80) for n in range(8)]]

            assert await built.metric("headway_worker_losses_total") >= 1
            for answer in answers:
                assert answer.is_done
                assert not answer.errors
                assert answer.text == await healthy_answer(built, answer.prompt, tokens=80)

    asyncio.run(scene())


@pytest.mark.parametrize("fault", ["nan@60", "foreign@60"])
def test_a_sequence_that_the_model_fails_on_ends_alone(tmp_path: Path, model_folder: Path, fault: str) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, names=["w0"], slower=5, fault=fault) as built:
            answers = [await answer.end() for answer in [built.ask(f"tale {n}", tokens=80) for n in range(8)]]

            (broken,) = [answer for answer in answers if not answer.is_done]
            assert len(broken.errors) == 1
            assert await built.metric("headway_worker_losses_total") == 0
            whole = next(answer for answer in answers if answer.is_done)
            assert whole.text == await healthy_answer(built, whole.prompt, tokens=80)

    asyncio.run(scene())


def test_clients_that_leave_give_every_block_back(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, slower=5) as built:
            streams = [built.ask(f"{number} once upon a time", tokens=400) for number in range(60)]
            for number, stream in enumerate(streams):
                if number % 3:  # the others leave while they wait
                    await stream.until(lambda seen: len(seen.text) > 0 or seen.status > 200)
                await stream.leave()

            def is_free(worker: dict[str, dict[str, int]]) -> bool:
                load = worker["load"]
                idle = load["running"] == load["waiting"] == 0
                return idle and load["blocks_free"] + load["blocks_cached"] == worker["blocks_total"]

            await built.until(lambda seen: all(worker["requests"] == 0 and is_free(worker) for worker in seen.values()))
            assert await built.metric("headway_requests_live") == 0

    asyncio.run(scene())
