"""KV events as vLLM and SGLang publish them: read, numbered, and heeded when a prompt is placed."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from policies.request import WorkerId
from router.settings.config import Upstream
from router.upstreams import kv_events
from router.upstreams.kv_events import KvEvents
from router.upstreams.residence import Residence
from tests.router.desk import DEADLINE_S, run
from tests.router.upstreams.scripted import Scripted, chat, upstream_desk

W0 = WorkerId(0)
KEY = bytes(16)
LATER = ["a field", "of a later version"]


def frames(number: int, *events: list[Any]) -> list[bytes]:
    return [b"topic", number.to_bytes(8, "big"), msgspec.msgpack.encode([1.5, list(events), 0, *LATER])]


def stored(*hashes: int | bytes, medium: str | None = "GPU") -> list[Any]:
    return ["BlockStored", list(hashes), None, list(range(16 * len(hashes))), 16, None, medium, *LATER]


def listening() -> KvEvents:
    events = KvEvents(Residence(64))
    events.residence.sent(W0, KEY)
    return events


def test_blocks_of_both_kinds_of_names_are_counted_and_copies_elsewhere_are_not() -> None:
    events = listening()
    assert events.take(frames(7, stored(1, 2), stored(b"a" * 32, b"b" * 32), stored(3, medium="CPU"))) == [{}, {}, {}]
    assert events.residence.resident_tokens == 64
    short = ["BlockStored", [4], 3, list(range(16)), 16]  # an older version says no more
    assert events.take(frames(8, short, ["BlockRemoved", [4]], ["BlockRemoved", [1], "CPU"])) == [{}, {}, {}]
    assert events.take(frames(9, ["BlockRemoved", [1, 2, b"a" * 32, b"b" * 32], "GPU"])) == [{W0: KEY}]
    assert (events.residence.resident_tokens, events.missed) == (0, 0)


@pytest.mark.parametrize("number", [6, 9, 0])
def test_a_number_out_of_turn_forgets_all(number: int) -> None:
    events = listening()
    events.take(frames(7, stored(1, 2, 3, 4)))
    assert events.take(frames(number, stored(5))) == [{W0: KEY}, {}]
    assert (events.residence.resident_tokens, events.missed) == (16, 1)
    assert events.take(frames(number + 1, stored(6))) == [{}]


@pytest.mark.parametrize(
    "broken",
    [
        [b"topic", bytes(8)],
        [b"topic", bytes(8), b"\xc1"],
        [b"topic", bytes(8), msgspec.msgpack.encode([1.5, [["BlockMoved", [1]]]])],
        [b"topic", bytes(8), msgspec.msgpack.encode([1.5, [["BlockRemoved", "all"]]])],
    ],
)
def test_what_cannot_be_read_is_a_gap(broken: list[bytes]) -> None:
    events = listening()
    assert events.take(broken) == [{W0: KEY}]
    assert events.missed == 1


class Publisher:
    """An engine's socket, which knows when somebody listens."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"

    async def heard(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            assert await self._socket.recv() == b"\x01"

    async def say(self, parts: list[bytes]) -> None:
        await self._socket.send_multipart(parts)

    def close(self) -> None:
        self._context.destroy(linger=0)


def test_a_batch_beyond_the_bound_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "BATCH_BYTES_MAX", 1000)
    events = listening()
    assert events.take(frames(1, stored(1))) == [{}]
    assert events.take(frames(2, stored(*range(1000)))) == [{W0: KEY}]
    assert (events.residence.resident_tokens, events.missed) == (0, 1)


def running(count: int) -> bytes:
    return b"vllm:num_requests_running %d.0\nvllm:num_requests_waiting 0\n" % count


def test_a_prompt_goes_elsewhere_once_its_engine_has_dropped_it() -> None:
    async def work() -> None:
        publisher = Publisher()
        try:
            async with Scripted() as one, Scripted() as two:
                one.metrics, two.metrics = running(3), running(4)
                configs = Upstream(url=one.url, kv_events=publisher.address), Upstream(url=two.url)
                async with upstream_desk(*configs) as d:
                    await publisher.heard()
                    first, second = d.upstreams.states
                    await d.until(lambda: first.load is not None and second.load is not None)
                    body = chat("a long beginning " * 400)
                    await d.client.post("/v1/chat/completions", json=body)
                    one.metrics = running(6)
                    await d.until(lambda: first.load is not None and first.load.running == 6)
                    await d.client.post("/v1/chat/completions", json=body)  # one is busier, and has the prompt
                    assert (len(one.asked), len(two.asked)) == (2, 0)

                    await publisher.say(frames(1, stored(1, 2)))
                    await publisher.say(frames(2, ["AllBlocksCleared"]))
                    assert first.kv is not None
                    residence = first.kv.residence
                    await d.until(lambda: residence.believed_tokens == 0)
                    await d.client.post("/v1/chat/completions", json=body)
                    assert (len(one.asked), len(two.asked)) == (2, 1)
        finally:
            publisher.close()

    run(work())
