"""The fleet: who may answer at a worker's address, what the mind hears, and that a lost worker is dialled again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from engine.wire import FrameReader, FromRouter, Hello, Message, Submit, Welcome, decode_from_router, encode
from policies.api import PolicySpec
from policies.events import WorkerLost, WorkerReport, WorkerUp
from policies.request import RequestId, WorkerId
from router.workers.fleet import Fleet, FleetLimits
from router.workers.link import Link, LinkLimits, LinkLost
from tests.router.desk import DEADLINE_S
from tests.router.frames import MODEL, Heard, Pipe, hello, load, step, submit

A, W0, W1 = RequestId("a"), WorkerId(0), WorkerId(1)


class Quiet:
    """A Watcher that keeps what it heard."""

    def __init__(self, on_event: Callable[[], None] = lambda: None) -> None:
        self.events: list[WorkerUp | WorkerReport | WorkerLost] = []
        self._on_event = on_event

    def hear(self, event: WorkerUp | WorkerReport | WorkerLost) -> None:
        self.events.append(event)
        self._on_event()

    worker_up = worker_report = worker_lost = hear


def linked(fleet: Fleet, worker: int, message: Message) -> tuple[Link, Pipe]:
    """A connection of one of the fleet's workers that opened with `message`."""
    link, pipe = Link(WorkerId(worker), fleet, Welcome(1, "router", "{}", b""), LinkLimits(), lambda: 0.0), Pipe()
    link.connection_made(pipe)
    link.data_received(encode(message))
    return link, pipe


def fleet_of_two() -> tuple[Fleet, Quiet]:
    watcher = Quiet()
    return Fleet([("w0", "/a"), ("w1", "/b")], watcher, "{}"), watcher


def test_a_hello_becomes_worker_up_and_a_model() -> None:
    fleet, watcher = fleet_of_two()

    linked(fleet, 0, hello(cached=b"k" * 16))
    linked(fleet, 1, hello(worker="w1"))

    first = watcher.events[0]
    assert isinstance(first, WorkerUp)
    assert (first.worker, first.model, first.block_tokens, first.cached) == (W0, "tiny", 16, b"k" * 16)
    assert fleet.models()["tiny"].workers == ("w0", "w1")
    assert fleet.models()["tiny"].root == b"r" * 16


@pytest.mark.parametrize("stranger", [hello(worker="w9"), hello(worker="w1", root=b"x" * 16)], ids=["name", "root"])
def test_somebody_else_at_the_address_is_turned_away(stranger: Hello) -> None:
    fleet, watcher = fleet_of_two()
    linked(fleet, 0, hello())

    _, pipe = linked(fleet, 1, stranger)

    assert pipe.is_closing()
    assert [type(event) for event in watcher.events] == [WorkerUp]
    assert fleet.models()["tiny"].workers == ("w0",)


def test_a_worker_with_another_step_policy_is_refused_by_name_and_once_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watcher = Quiet()
    fleet = Fleet([("w0", "/a")], watcher, "{}", engine=PolicySpec("static-512"))

    linked(fleet, 0, hello())
    _, pipe = linked(fleet, 0, hello())

    assert pipe.is_closing()
    assert watcher.events == []
    assert "another step policy" in fleet.workers[0].lost_reason
    assert ["another step policy" in record.message for record in caplog.records] == [True]
    assert "static-512" in fleet.workers[0].lost_reason


def test_an_attempt_reaches_its_worker_and_can_be_aborted() -> None:
    fleet, _ = fleet_of_two()
    _, pipe = linked(fleet, 0, hello())

    attempt = fleet.submit(W0, A, submit(), Heard())
    attempt.abort("client left")

    assert [type(message).__name__ for message in pipe.sent] == ["Welcome", "Submit", "Abort"]
    assert attempt.worker == W0


def test_a_lost_worker_takes_no_attempt_and_its_sinks_hear_after_the_mind() -> None:
    fleet, watcher = fleet_of_two()
    link, _ = linked(fleet, 0, hello())
    heard: list[str] = []
    sink = Heard()
    sink.lost = lambda reason: heard.append(type(watcher.events[-1]).__name__ + " " + reason)  # type: ignore[method-assign]
    fleet.submit(W0, A, submit(), sink)

    link.connection_lost(None)

    assert heard == ["WorkerLost connection closed by the worker"]
    assert fleet.models()["tiny"].workers == ()
    with pytest.raises(LinkLost):
        fleet.submit(W0, A, submit(), Heard())


def test_the_fleet_is_ready_when_a_worker_has_proved_a_step() -> None:
    fleet, _ = fleet_of_two()
    link, _ = linked(fleet, 0, hello(step_model=msgspec.structs.replace(MODEL, version=0)))
    assert not fleet.is_ready()

    link.data_received(encode(step(load=load(steps=0))))
    assert not fleet.is_ready()
    link.data_received(encode(step(load=load(steps=1))))

    assert fleet.is_ready()


def test_a_worker_that_measured_itself_is_ready_at_once() -> None:
    fleet, _ = fleet_of_two()

    linked(fleet, 0, hello())

    assert fleet.is_ready()


def test_a_model_whose_workers_are_away_may_come_back_as_another() -> None:
    fleet, _ = fleet_of_two()
    link, _ = linked(fleet, 0, hello())
    link.connection_lost(None)

    linked(fleet, 1, hello(worker="w1", root=b"x" * 16))

    assert fleet.models()["tiny"].root == b"x" * 16
    assert fleet.models()["tiny"].workers == ("w1",)


class Worker:
    """The far end of one connection: says hello, keeps what it hears."""

    def __init__(self, message: Message) -> None:
        self.hello = message
        self.heard: list[FromRouter] = []
        self.connections = 0
        self.writer: asyncio.StreamWriter | None = None
        self.changed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writer = writer
        writer.write(encode(self.hello))
        frames = FrameReader()
        try:
            while data := await reader.read(65536):
                self.heard += [decode_from_router(frame) for frame in frames.feed(data)]
                self.changed.set()
        except ConnectionResetError:
            self.changed.set()
        finally:
            writer.close()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():
                await self.changed.wait()
                self.changed.clear()


def test_a_lost_worker_is_dialled_again(tmp_path: Path) -> None:
    async def scene() -> None:
        worker = Worker(hello())
        watcher = Quiet(on_event=worker.changed.set)
        address = str(tmp_path / "w0.sock")
        fleet = Fleet([("w0", address)], watcher, "{}", limits=FleetLimits(retry_first_s=0.01))
        running = asyncio.create_task(fleet.run())
        server = await asyncio.start_unix_server(worker.serve, address)
        await worker.until(lambda: len(worker.heard) == 1)
        assert worker.writer is not None

        worker.writer.close()
        await worker.until(lambda: worker.connections == 2 and len(watcher.events) == 3)

        assert [type(event) for event in watcher.events] == [WorkerUp, WorkerLost, WorkerUp]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert isinstance(watcher.events[-1], WorkerLost)
        server.close()
        await server.wait_closed()

    asyncio.run(scene())


def test_a_worker_that_sends_garbage_is_named_to_the_keeper_with_the_epoch_that_is_void(tmp_path: Path) -> None:
    async def scene() -> None:
        worker, asked = Worker(hello()), asyncio.get_running_loop().create_future()
        watcher = Quiet(on_event=worker.changed.set)
        address = str(tmp_path / "w0.sock")
        limits = FleetLimits(retry_first_s=60.0)
        fleet = Fleet([("w0", address)], watcher, "{}", limits=limits, restart=lambda *ask: asked.set_result(ask))
        server = await asyncio.start_unix_server(worker.serve, address)
        running = asyncio.create_task(fleet.run())
        await worker.until(lambda: bool(fleet.models()))

        assert worker.writer is not None
        worker.writer.write(b"\x04\x00\x00\x00\xff\xff\xff\xff")

        async with asyncio.timeout(DEADLINE_S):
            assert await asked == ("w0", hello().epoch)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        server.close()
        await server.wait_closed()

    asyncio.run(scene())


def test_a_worker_that_stays_stalled_is_named_to_the_keeper(tmp_path: Path) -> None:
    async def scene() -> None:
        worker, asked = Worker(hello()), asyncio.get_running_loop().create_future()
        watcher = Quiet(on_event=worker.changed.set)
        limits = FleetLimits(
            retry_first_s=60.0, check_s=0.01, kill_after_s=0.05, link=LinkLimits(stall_s=0.05, stall_steps=0.0)
        )
        address = str(tmp_path / "w0.sock")
        fleet = Fleet([("w0", address)], watcher, "{}", limits=limits, restart=lambda *ask: asked.set_result(ask))
        server = await asyncio.start_unix_server(worker.serve, address)
        running = asyncio.create_task(fleet.run())
        await worker.until(lambda: bool(fleet.models()))

        sink = Heard()
        fleet.submit(W0, A, submit(), sink)

        async with asyncio.timeout(DEADLINE_S):
            assert await asked == ("w0", 0)
        await worker.until(lambda: len(worker.heard) == 2)
        assert isinstance(worker.heard[1], Submit)
        assert str(sink.events[0]).startswith("stalled: no step for")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        server.close()
        await server.wait_closed()

    asyncio.run(scene())


class Clock:
    """Stands until it is moved; tells whenever somebody reads it."""

    def __init__(self, on_look: Callable[[], None]) -> None:
        self.now, self.looks = 0.0, 0
        self._on_look = on_look

    def __call__(self) -> float:
        self.looks += 1
        self._on_look()
        return self.now


def test_a_pause_of_the_whole_machine_costs_no_worker(tmp_path: Path) -> None:
    async def scene() -> None:
        worker = Worker(hello())
        clock = Clock(worker.changed.set)
        watcher = Quiet(on_event=worker.changed.set)
        limits = FleetLimits(check_s=0.01)
        address = str(tmp_path / "w0.sock")
        fleet = Fleet([("w0", address)], watcher, "{}", limits=limits, clock=clock)
        server = await asyncio.start_unix_server(worker.serve, address)
        running = asyncio.create_task(fleet.run())
        await worker.until(lambda: bool(fleet.models()))
        fleet.submit(W0, A, submit(), Heard())

        clock.now += 3600.0
        looks = clock.looks + 5
        await worker.until(lambda: clock.looks > looks)
        assert [type(event) for event in watcher.events] == [WorkerUp]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        server.close()
        await server.wait_closed()

    asyncio.run(scene())


def test_a_worker_that_sleeps_is_linked_and_said_but_never_placed_on() -> None:
    fleet, watcher = fleet_of_two()
    state = fleet.workers[0]
    link, pipe = linked(fleet, 0, hello())
    link.data_received(encode(step(load=load(asleep=2))))
    assert pipe.is_closing()
    assert [type(event) for event in watcher.events] == [WorkerUp, WorkerLost]

    state.dialled, pipe = linked(fleet, 0, hello(asleep=2))
    assert not pipe.is_closing()
    assert (state.asleep, state.link) == (2, None)
    assert "asleep at level 2" in state.lost_reason
    assert fleet.models()["tiny"].workers == ()
    assert not fleet.is_ready()
    assert len(watcher.events) == 2
    with pytest.raises(LinkLost, match="lost"):
        fleet.submit(W0, A, submit(), Heard())

    state.dialled.data_received(encode(step(load=load(asleep=0))))
    assert pipe.is_closing()
    linked(fleet, 0, hello())
    assert type(watcher.events[-1]) is WorkerUp
