"""`headway serve --upstream`: keeper and router as processes, no engine among them."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import httpx

from router.host.plan import make_plan
from router.settings.config import Config, Upstream
from tests.router.desk import run
from tests.router.upstreams.scripted import DONE, Scripted, chat

DEADLINE_S = 120.0


def test_a_router_in_front_of_upstreams_prepares_no_model_and_starts_no_worker() -> None:
    plan = make_plan(Config(upstreams=(Upstream(url="http://gpu1:8000"),)), {})

    assert (plan.prepare, plan.workers, plan.pool_bytes, plan.serving) == ((), {}, 0, 1)


async def all_up(client: httpx.AsyncClient, admin: str) -> bool:
    workers = (await client.get(f"{admin}/workers")).json()
    return [worker["is_up"] for worker in workers] == [True, True]


def test_serve_answers_from_its_upstreams_and_leaves(tmp_path: Path) -> None:
    async def work() -> None:
        async with Scripted() as one, Scripted() as two:
            command = [
                "serve",
                "--port",
                "0",
                "--admin-port",
                "0",
                "--upstream",
                one.url,
                "--upstream",
                f"{two.url}/v1",
            ]
            env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HEADWAY_SERVER_STATE_DIR": str(tmp_path)}
            keeper = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "router.cli", *command, stdout=PIPE, stderr=DEVNULL, env=env
            )
            assert keeper.stdout is not None
            try:
                async with asyncio.timeout(DEADLINE_S):
                    said = (await keeper.stdout.readuntil(b"Ctrl-C drains and stops.")).decode()
                url = re.search(r"Headway serves m at (http://\S+)", said)
                admin = re.search(r"dashboard: (http://\S+)/\)", said)
                assert url is not None
                assert admin is not None
                async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
                    for number in range(8):
                        path = f"{url[1]}/v1/chat/completions"
                        answer = await client.post(path, json=chat(f"{number}", stream=True))
                        assert answer.content.endswith(DONE)
                    async with asyncio.timeout(DEADLINE_S):
                        while not await all_up(client, admin[1]):  # noqa: ASYNC110  it serves once one of them is up
                            await asyncio.sleep(0.05)
                    metrics = (await client.get(f"{admin[1]}/metrics")).text
                assert metrics.count("headway_upstream_up{") == 2
                assert len(one.asked) + len(two.asked) == 8
            finally:
                keeper.terminate()
                async with asyncio.timeout(DEADLINE_S):
                    assert await keeper.wait() == 0

    run(work())
