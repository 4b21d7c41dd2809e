"""A changed configuration: what a running router takes at once, what it names, and what changes nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from policies.events import WorkerUp
from policies.request import Tenant, WorkerId
from router.access.accounts import Accounts
from router.access.salts import Salts
from router.access.tenants import Tenants
from router.cli import main
from router.control.mind import Mind
from router.control.reducer import build, load_policy, loader
from router.listener.readiness import Readiness
from router.settings.config import Classes, Config, Policy, Promise, Server
from router.settings.reconfigure import Reconfigurer
from tests.router.desk import run
from tests.router.listener.test_readiness import PROFILE
from tests.router.upstreams.scripted import DONE, Scripted, chat

DEADLINE_S = 120.0


class NoFleet:
    """Nobody computes; one model is known."""

    up_count = 0

    def is_ready(self) -> bool:
        return True

    def models(self) -> dict[str, Any]:
        return {"tiny": None}


def scene(tmp_path: Path, config: Config) -> tuple[Reconfigurer, Mind, Readiness]:
    faults: Any = deque()
    policy = load_policy(config, faults, is_timed=False)
    reducer = build(config, policy, 1, loader(faults, is_timed=False))
    mind = Mind(reducer, faults)
    mind.worker_up(WorkerUp(WorkerId(0), "tiny", 16, 64, 1024, PROFILE))
    readiness = Readiness(NoFleet(), policy, reducer.fleet.profile, Tenant())
    tenants = Tenants(None, Salts(b"k" * 32), Tenant(), Accounts(None, time.monotonic, time.time))
    return Reconfigurer(tmp_path / "config.json", config, mind, readiness, tenants), mind, readiness


def in_loop(work: Callable[[], None]) -> None:
    async def inside() -> None:
        work()

    asyncio.run(inside())


def chat_patience_s(readiness: Readiness) -> float:
    budgets: Any = readiness.state()[1]["budgets"]
    return float(budgets["chatbot+"]["patience_s"])


def test_classes_and_policy_change_at_once_and_the_rest_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def work() -> None:
        reconfigurer, mind, readiness = scene(tmp_path, Config())
        assert chat_patience_s(readiness) == 30.0
        before = mind._reducer._trust._policy  # type: ignore[attr-defined]
        wanted = Config(
            server=Server(port=9000), classes=Classes(chatbot=Promise(patience_s=7.0)), policy=Policy(ref="lmetric")
        )
        (tmp_path / "config.json").write_bytes(wanted.to_json())

        reconfigurer.apply()

        assert chat_patience_s(readiness) == 7.0
        assert mind._reducer._trust._policy is not before  # type: ignore[attr-defined]
        assert reconfigurer.config == msgspec.structs.replace(wanted, server=Server())
        assert "changed: classes.chatbot+.patience_s, policy.ref, server.port" in caplog.text
        assert "need a restart: server.port" in caplog.text
        mind.close()

    in_loop(work)


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"policy": {"ref": "nobody-has-this"}}', b'{"classes": {"chatbot+": {"tpot_s": "x"}}}']
)
def test_what_cannot_be_used_changes_nothing_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    def work() -> None:
        reconfigurer, mind, readiness = scene(tmp_path, Config())
        (tmp_path / "config.json").write_bytes(data)
        reconfigurer.apply()
        assert reconfigurer.config == Config()
        assert chat_patience_s(readiness) == 30.0
        assert "the configuration is not changed" in caplog.text
        mind.close()

    in_loop(work)


def test_sighup_rereads_the_file_and_the_recording_replays(tmp_path: Path) -> None:
    path, record = tmp_path / "headway.toml", tmp_path / "run.jsonl"

    def write(upstream: str, patience_s: str) -> None:
        served = f'[[upstreams]]\nurl = "{upstream}"\n[record]\npath = "{record}"\n'
        path.write_text(f'{served}[classes."chatbot+"]\npatience_s = {patience_s}\n')

    async def work() -> None:
        async with Scripted() as one:
            write(one.url, "21.0")
            command = ["serve", "--config", str(path), "--port=0", "--admin-port=0"]
            env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HEADWAY_SERVER_STATE_DIR": str(tmp_path)}
            with (tmp_path / "log").open("wb") as log:
                keeper = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "router.cli", *command, stdout=PIPE, stderr=log, env=env
                )
            assert keeper.stdout is not None
            try:
                async with asyncio.timeout(DEADLINE_S):
                    said = (await keeper.stdout.readuntil(b"Ctrl-C drains and stops.")).decode()
                    url = re.search(r"Headway serves m at (http://\S+)", said)
                    assert url is not None
                    async with httpx.AsyncClient(base_url=url[1], timeout=DEADLINE_S) as client:

                        async def patience_s() -> float:
                            budgets = (await client.get("/readyz")).json()["budgets"]
                            return float(budgets["chatbot+"]["patience_s"])

                        assert await patience_s() == 21.0
                        write(one.url, "22.0")
                        keeper.send_signal(signal.SIGHUP)
                        await keeper.stdout.readuntil(b"SIGHUP: the configuration was read again")
                        while await patience_s() != 22.0:  # noqa: ASYNC110
                            await asyncio.sleep(0.05)
                        write(one.url, '"soon"')
                        keeper.send_signal(signal.SIGHUP)
                        await keeper.stdout.readuntil(b"SIGHUP: the configuration was not changed")
                        assert await patience_s() == 22.0
                        answer = await client.post("/v1/chat/completions", json=chat(stream=True))
                        assert answer.content.endswith(DONE)
            finally:
                keeper.terminate()
                async with asyncio.timeout(DEADLINE_S):
                    await keeper.wait()
        assert "classes.chatbot+.patience_s: expected a number" in (tmp_path / "log").read_text()

    run(work())
    assert record.read_text().count('"Reconfigured"') == 1
    assert main(["replay-events", str(record)]) == 0
