"""The router leaves, dies and comes back: workers survive it, clients are told the truth."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from router.cli import main
from router.settings.config import Config, Record, Server
from tests.faults.house import DEADLINE_S, house
from tests.router.host.test_keeper import is_alive, until

pytestmark = pytest.mark.model


def test_a_draining_router_finishes_its_streams_and_leaves(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, slower=20) as built:
            stream = await built.ask("a long story", tokens=60).until(lambda seen: len(seen.text) > 0)
            assert built.router is not None

            built.router.send_signal(signal.SIGTERM)

            await stream.end()
            assert stream.is_done
            assert await asyncio.get_running_loop().run_in_executor(None, built.router.wait, DEADLINE_S) == 0

    asyncio.run(scene())


def test_a_drain_that_runs_out_of_time_tells_clients_so(tmp_path: Path, model_folder: Path) -> None:
    config = Config(server=Server(drain_grace_s=0.5))

    async def scene() -> None:
        async with house(tmp_path, model_folder, config, slower=20) as built:
            stream = await built.ask("a long story", tokens=2000).until(lambda seen: len(seen.text) > 0)
            whole = built.ask("another", tokens=2000, stream=False)
            several = built.ask("three", tokens=2000, n=3)
            await built.until(lambda seen: sum(worker["requests"] for worker in seen.values()) == 5)
            assert built.router is not None

            built.router.send_signal(signal.SIGTERM)

            for answer in (stream, several):
                await answer.end()
                assert not answer.is_done
                assert answer.errors[0]["code"] == "stopping"
            await whole.end()
            assert (whole.status, whole.headers["retry-after"]) == (503, "1")
            assert await asyncio.get_running_loop().run_in_executor(None, built.router.wait, DEADLINE_S) == 0

    asyncio.run(scene())


def test_a_killed_router_is_replaced_and_workers_survive_it(tmp_path: Path, model_folder: Path) -> None:
    async def scene() -> None:
        async with house(tmp_path, model_folder, slower=20) as built:
            stream = await built.ask("a long story", tokens=200).until(lambda seen: len(seen.text) > 0)
            assert built.router is not None

            built.router.kill()
            built.router.wait()
            await stream.end()
            built.start_router()
            await built.until_up(2)

            assert not stream.is_done
            assert all(worker.poll() is None for worker in built.workers.values())
            await built.until(lambda seen: all(worker["load"]["running"] == 0 for worker in seen.values()))
            again = await built.ask("a long story", tokens=10).end()
            assert again.is_done
            assert again.text

    asyncio.run(scene())


def test_a_recorded_run_replays_byte_for_byte(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"

    async def scene() -> None:
        async with house(tmp_path, model_folder, Config(record=Record(path=str(path))), slower=5) as built:
            answers = [built.ask(f"tale {number}", tokens=30) for number in range(20)]
            await answers[0].until(lambda seen: len(seen.text) > 0)
            built.hurt("w0", signal.SIGKILL)
            await answers[1].leave()
            for answer in answers[2:]:
                await answer.end()

    asyncio.run(scene())

    assert main(["replay-events", str(path)]) == 0
    assert re.match(r"\d{2,} events, \d{2,} actions: equal byte for byte", capsys.readouterr().out)


LONG = 6000  # tokens: computing them again takes a fake worker 0.13 s, and so long it waits for them from the pool
BLOCK_TOKENS = 16


def stored_blocks(workers_url: str, name: str) -> int:
    (worker,) = [worker for worker in httpx.get(workers_url, timeout=DEADLINE_S).json() if worker["worker"] == name]
    return int(worker["load"]["tiers"]["stored"])


def takes_connections(base: str) -> bool:
    url = httpx.URL(base)
    with (
        contextlib.suppress(ConnectionRefusedError),
        socket.create_connection((url.host, url.port), timeout=DEADLINE_S),
    ):
        return True
    return False


def test_serve_answers_survives_a_killed_worker_and_leaves_no_process(tmp_path: Path, model_folder: Path) -> None:
    del model_folder  # converted already, so that the start is quick
    printed = tmp_path / "printed"
    command = [sys.executable, "-m", "router.cli", "serve", "--port", "0", "--admin-port", "0", "--device", "fake"]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    with printed.open("w") as file:
        keeper = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        until(lambda: "Ctrl-C drains and stops." in printed.read_text(), f"ready: {printed.read_text()}")
        text = printed.read_text()
        children = [int(pid) for pid in Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()]
        base, admin = (re.search(rf"{where}(http://127\.0\.0\.1:\d+)", text) for where in ("at ", "dashboard: "))
        assert base is not None
        assert admin is not None
        assert "chatbot+ " in text

        with httpx.Client(base_url=base[1], timeout=DEADLINE_S) as client:
            body = json.loads(re.search(r"-d '(.*)'", text)[1]) | {"max_tokens": 5}  # type: ignore[index]
            body["messages"][0]["content"] += " word" * LONG
            first = client.post("/v1/chat/completions", json=body)
            assert first.json()["choices"][0]["message"]["content"]
            worker = first.headers["x-headway-worker"]
            until(lambda: stored_blocks(f"{admin[1]}/workers", worker) * BLOCK_TOKENS >= LONG, "its KV is in the pool")
            os.kill(children[int(worker[1:])], signal.SIGKILL)
            until(lambda: f"{worker} is up" in printed.read_text().partition("ended (SIGKILL)")[2], "it is back")
            again = client.post("/v1/chat/completions", json=body).json()
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= LONG  # the KV outlived the worker
            assert again["choices"] == first.json()["choices"]

            client.post("/v1/chat/completions", json=body, headers={"x-session-id": "s1"})
            action = {"action_id": "a", "action_type": "retain", "payload": {"session": "s1", "ttl_s": 60}}
            hint = {"protocol_version": 1, "message_id": "m", "actions": [action]}
            (done,) = client.post(f"{admin[1]}/kv_hints", json=hint).json()["actions"]
            assert (done["status"], done["blocks"] >= 2, len(done["workers"])) == ("done", True, 2)

        with httpx.stream("POST", f"{base[1]}/v1/chat/completions", json=body | {"max_tokens": 200, "stream": True}):
            keeper.terminate()
            until(lambda: not takes_connections(base[1]), "who comes during the drain is refused, not left waiting")
        assert keeper.wait(DEADLINE_S) == 0
        assert not any(map(is_alive, children))
        assert not list(tmp_path.glob("headway-*"))
    finally:
        keeper.kill()
        keeper.wait()
