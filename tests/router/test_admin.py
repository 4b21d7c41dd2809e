"""The admin listener: what it shows, and to whom."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import httpx
import pytest

from router import admin
from router.fleet import Fleet
from router.metrics import Metrics
from router.receipts import Receipts
from router.server import Listener
from tests.router.frames import hello, load
from tests.router.test_fleet import Quiet, linked
from tests.router.test_metrics import receipt


def ask(
    path: str, receipts: Receipts | None = None, method: str = "GET", headers: dict[str, str] | None = None
) -> httpx.Response:
    """One request to an admin listener whose fleet has one live worker and one that never came."""
    fleet = Fleet([("w0", "/a"), ("w1", "/b")], Quiet(), "{}")
    link, _ = linked(fleet, 0, hello())
    link.load = load(running=3)
    operator = admin.Admin(Metrics(), fleet, receipts or Receipts(10), clock=lambda: 1.0)

    async def scene() -> httpx.Response:
        listener = Listener(admin.gate, operator.answer)
        bound = socket.create_server(("127.0.0.1", 0))
        await listener.start(bound)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}{path}"
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.request(method, url, headers=headers)
        await listener.close()
        bound.close()
        return answer

    return asyncio.run(scene())


def test_workers_are_shown_as_they_are() -> None:
    up, lost = ask("/workers").json()

    assert (up["worker"], up["is_up"], up["model"], up["silent_s"]) == ("w0", True, "tiny", 1.0)
    assert up["load"]["running"] == 3
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


def test_it_only_shows() -> None:
    assert ask("/workers", method="POST").status_code == 405
    assert ask("/").status_code == 404
