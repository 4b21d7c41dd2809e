"""The admin listener: what it shows, and to whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from router.admin import admin_app
from router.fleet import Fleet
from router.metrics import Metrics
from router.receipts import Receipts
from tests.router.frames import hello, load
from tests.router.test_fleet import Quiet, linked
from tests.router.test_metrics import receipt


def client(receipts: Receipts | None = None) -> TestClient:
    fleet = Fleet([("w0", "/a"), ("w1", "/b")], Quiet(), "{}")
    link, _ = linked(fleet, 0, hello())
    link.load = load(running=3)
    app = admin_app(Metrics(), fleet, receipts or Receipts(10), clock=lambda: 1.0)
    return TestClient(app, base_url="http://127.0.0.1:8081")


def test_workers_are_shown_as_they_are() -> None:
    up, lost = client().get("/workers").json()

    assert (up["worker"], up["is_up"], up["model"], up["silent_s"]) == ("w0", True, "tiny", 1.0)
    assert up["load"]["running"] == 3
    assert (lost["worker"], lost["is_up"], lost["lost_reason"]) == ("w1", False, "not connected yet")


def test_receipts_come_newest_first_and_as_many_as_asked_for() -> None:
    receipts = Receipts(2)
    for number in range(3):
        receipts.ended(receipt(request=f"r{number}"))

    shown = client(receipts).get("/receipts", params={"last": "5"}).json()

    assert [line["request"] for line in shown] == ["r2", "r1"]
    assert client(receipts).get("/receipts", params={"last": "-1"}).status_code == 400


def test_receipts_are_appended_to_their_file(tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    receipts = Receipts(1, path)

    receipts.ended(receipt(request="r0"))
    receipts.ended(receipt(request="r1"))
    receipts.close()

    assert [json.loads(line)["request"] for line in path.read_text().splitlines()] == ["r0", "r1"]


def test_metrics_are_for_prometheus() -> None:
    answer = client().get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    assert "headway_requests" in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1@evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ],
)
def test_a_foreign_host_or_origin_is_refused(headers: dict[str, str]) -> None:
    assert client().get("/receipts", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "headers", [{"host": "localhost:8081"}, {"host": "[::1]:8081"}, {"origin": "http://localhost:3000"}]
)
def test_this_machine_is_served(headers: dict[str, str]) -> None:
    assert client().get("/receipts", headers=headers).status_code == 200
