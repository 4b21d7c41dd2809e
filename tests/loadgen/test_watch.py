"""What a router tells of its workers is seen, said once, and shown where it happened; it is never needed."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from loadgen import watch
from loadgen.judge import judge
from loadgen.records import Incident
from loadgen.report import text
from loadgen.report_html import page
from loadgen.watch import State, changes, read
from tests.loadgen.fixture import BUDGETS, RUN, TWENTY
from tests.loadgen.server import Asked, scripted

UP = {"worker": "w0", "is_up": True, "losses": 0, "device": "cpu"}
DOWN = {"worker": "w0", "is_up": False, "losses": 1, "lost_reason": "it closed the link"}
BACK = UP | {"losses": 1}


def states(*shown: dict[str, object]) -> dict[str, State]:
    return dict(read(list(shown)))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (UP, UP, []),
        (UP, DOWN, ["worker w0 lost (it closed the link)"]),
        (DOWN, DOWN, []),
        (DOWN, BACK, ["worker w0 up again"]),
        (UP | {"is_up": False}, UP, ["worker w0 joined"]),  # it was starting
        (UP, BACK, ["worker w0 lost", "worker w0 up again"]),  # both between two looks
    ],
)
def test_a_loss_and_a_return_are_each_said_once(
    before: dict[str, object], after: dict[str, object], said: list[str]
) -> None:
    assert changes(states(before), states(after)) == said


def test_workers_that_come_and_go_are_named() -> None:
    assert changes(states(UP), states(UP, UP | {"worker": "w1"})) == ["worker w1 joined"]
    assert changes(states(UP, UP | {"worker": "w1"}), states(UP)) == ["worker w1 gone"]


def test_a_run_is_watched_and_silence_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.watch.POLL_S", 0.01)
    shown: list[object] = [[UP], [DOWN], {"not": "workers"}, [BACK]]

    async def tell(asked: Asked) -> None:
        body = shown[min(asked.number, len(shown) - 1)]
        asked.json(200, body, connection="close")
        asked.transport.close()

    async def run() -> tuple[str, list[Incident]]:
        found: list[Incident] = []
        async with scripted(tell) as server:
            task = asyncio.ensure_future(watch.watch(server.url, lambda: 7.04, found))
            while len(found) < 4:  # noqa: ASYNC110  another task appends to a list
                await asyncio.sleep(0.005)
            task.cancel()
            return server.url, found

    url, found = asyncio.run(run())
    assert [one.text for one in found] == [
        "worker w0 lost (it closed the link)",
        f"{url} stopped telling of its workers",
        f"{url} tells again",
        "worker w0 up again",
    ]
    assert {one.at_s for one in found} == {7.0}


def test_a_fleet_that_flaps_is_told_up_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.watch.POLL_S", 0.0)
    monkeypatch.setattr("loadgen.watch.INCIDENTS_MAX", 3)

    async def flap(asked: Asked) -> None:
        asked.json(200, [{"worker": "w0", "losses": asked.number}], connection="close")
        asked.transport.close()

    async def run() -> list[Incident]:
        found: list[Incident] = []
        async with scripted(flap) as server:
            await asyncio.wait_for(watch.watch(server.url, lambda: 1.0, found), 60.0)  # ends by itself
        return found

    assert [one.text for one in asyncio.run(run())] == ["worker w0 lost", "worker w0 up again", "worker w0 lost"]


def test_what_is_no_admin_listener_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="is it a Headway router's admin listener"):
        watch.check("http://127.0.0.1:9")


def test_both_reports_tell_it_where_it_happened() -> None:
    run = msgspec.structs.replace(RUN, incidents=[Incident(41.2, "worker w1 lost (<killed>)")])
    verdict = judge(run, TWENTY, BUDGETS)
    assert "at 41 s: worker w1 lost (<killed>)" in text(verdict)
    drawn = page(verdict, TWENTY, BUDGETS)
    assert drawn.count('class="event"') == 3  # in every picture of the time
    assert "worker w1 lost (&lt;killed&gt;)" in drawn
    assert 'class="event"' not in page(judge(RUN, TWENTY, BUDGETS), TWENTY, BUDGETS)
