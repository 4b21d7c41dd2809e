"""The admin listener: what it shows, and to whom."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from router.access.tenants import Tenants
from router.listener import admin
from router.listener.server import Listener
from router.telemetry.metrics import Metrics
from router.telemetry.receipts import Receipts
from router.workers import kv_hints
from router.workers.fleet import Fleet
from router.workers.kv_hints import KvHints
from tests.router.desk import keyless
from tests.router.frames import hello, load
from tests.router.telemetry.test_metrics import receipt
from tests.router.workers.test_fleet import Quiet, linked


@contextlib.asynccontextmanager
async def served(receipts: Receipts, tenants: Tenants | None = None) -> AsyncIterator[str]:
    """The URL of an admin listener whose fleet has one live worker and one that never came."""
    fleet = Fleet([("w0", "/a"), ("w1", "/b")], Quiet(), "{}")
    link, _ = linked(fleet, 0, hello())
    link.load = load(running=3)
    operator = admin.Admin(
        Metrics(),
        fleet,
        receipts,
        KvHints(fleet, b"salt"),
        tenants=tenants or keyless(),
        readiness=lambda: (True, {"workers": 1}),
        clock=lambda: 1.0,
    )
    listener = Listener(admin.gate, operator.answer)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        await listener.start(bound)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        await listener.close()


def ask(
    path: str,
    receipts: Receipts | None = None,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    content: bytes = b"",
) -> httpx.Response:
    """One request to an admin listener."""

    async def scene() -> httpx.Response:
        async with served(receipts or Receipts(10)) as url, httpx.AsyncClient(timeout=30) as client:
            return await client.request(method, url + path, headers=headers, content=content)

    return asyncio.run(scene())


def test_it_shows_what_tenants_took() -> None:
    async def scene() -> None:
        tenants = keyless()
        tenants.accounts.ended(receipt(tenant="alice", attempts=1, prompt_tokens=15, output_tokens=5, gpu_s=0.5))
        async with served(Receipts(10), tenants) as url, httpx.AsyncClient(timeout=30) as client:
            shown = (await client.get(f"{url}/tenants")).json()
            ready = (await client.get(f"{url}/readyz")).json()
        assert shown == {"alice": {"tokens": 20.0, "gpu_s": 0.5, "running": 0, "refused": 0}}
        assert ready == {"ready": True, "workers": 1, "needs_key": False}

    asyncio.run(scene())


CHROMIUM = shutil.which("chromium")
SWITCHES = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"""


async def browse(receipts: Receipts, profile: Path) -> str:
    """The dashboard's document after a browser has run it for three seconds."""
    assert CHROMIUM is not None
    async with served(receipts) as url:
        command = (CHROMIUM, *SWITCHES.split(), f"--user-data-dir={profile}", url)
        browser = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=DEVNULL)
        page, _ = await asyncio.wait_for(browser.communicate(), 180)
    return page.decode()


def test_workers_are_shown_as_they_are() -> None:
    up, lost = ask("/workers").json()

    assert (up["worker"], up["is_up"], up["model"], up["silent_s"]) == ("w0", True, "tiny", 1.0)
    assert (up["socket"], up["asleep"]) == ("/a", 0)
    assert (up["load"]["running"], up["load"]["tiers"]["host_blocks"]) == (3, 0)
    assert (lost["worker"], lost["is_up"], lost["lost_reason"]) == ("w1", False, "not connected yet")


def test_receipts_come_newest_first_and_as_many_as_asked_for() -> None:
    receipts = Receipts(2)
    for number in range(3):
        receipts.ended(receipt(request=f"r{number}"))

    assert [line["request"] for line in ask("/receipts?last=5", receipts).json()] == ["r2", "r1"]
    assert [line["request"] for line in ask("/receipts?last=1", receipts).json()] == ["r2"]
    assert ask("/receipts?last=-1").status_code == 400


def test_receipts_are_appended_to_their_file(tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    receipts = Receipts(1, path)

    receipts.ended(receipt(request="r0"))
    receipts.ended(receipt(request="r1"))
    receipts.close()

    assert [json.loads(line)["request"] for line in path.read_text().splitlines()] == ["r0", "r1"]


def test_metrics_are_for_prometheus() -> None:
    answer = ask("/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    assert "headway_requests" in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ],
)
def test_a_foreign_host_or_origin_is_refused(headers: dict[str, str]) -> None:
    assert ask("/receipts", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "headers", [{"host": "localhost:8081"}, {"host": "[::1]:8081"}, {"origin": "http://localhost:3000"}]
)
def test_this_machine_is_served(headers: dict[str, str]) -> None:
    assert ask("/receipts", headers=headers).status_code == 200


def test_hints_are_posted_and_bounded() -> None:
    assert ask("/kv_hints").status_code == 405
    assert ask("/kv_hints", method="POST", content=b"{}").status_code == 400
    assert ask("/kv_hints", method="POST", content=b" " * (kv_hints.BODY_BYTES_MAX + 1)).status_code == 413
    assert ask("/kv_hints", method="POST", headers={"origin": "http://evil.example"}).status_code == 403


def test_it_only_shows() -> None:
    assert ask("/workers", method="POST").status_code == 405
    assert ask("/nothing").status_code == 404


def test_the_dashboard_stands_alone() -> None:
    page = ask("/")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    outside = set(re.findall(r"https?://[^\"'\s)]+", page.text))
    assert outside == {"http://www.w3.org/2000/svg"}, "a name space, never fetched"
    assert "innerHTML" not in page.text, "receipts hold what clients sent: it is shown as text alone"


def test_every_route_forbids_guessing_its_type() -> None:
    for path in ("/", "/metrics", "/workers", "/receipts"):
        assert ask(path).headers["x-content-type-options"] == "nosniff"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_the_dashboard(tmp_path: Path) -> None:
    receipts, now = Receipts(10), time.time()
    receipts.ended(receipt(request="r1", arrived_unix_s=now - 5))
    receipts.ended(receipt(request="r2", arrived_unix_s=now - 4, ttft_s=1.5, reason="<img src=x onerror=alert(1)>"))
    receipts.ended(receipt(request="r3", arrived_unix_s=now - 3, outcome="cancelled"))

    page = asyncio.run(browse(receipts, tmp_path))

    assert "1 of 2 workers up, 3 requests ended in ten minutes" in page
    assert "1 of 2 requests in budget" in page, "who left is neither met nor missed; who waited 1.5 s of 1 s was late"
    assert page.count("<circle") == 2
    assert "not connected yet" in page
    assert "&lt;img src=x" in page
    assert "<img" not in page
