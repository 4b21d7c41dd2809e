"""The fault proxy does to a connection what its script says, and the same again for the same seed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from loadgen.cli import main
from loadgen.faults import Fault, FaultProxy, read_script


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def through(proxy: FaultProxy, sent: bytes) -> bytes:
    """What comes back; an empty answer when the connection is reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(sent)
        writer.write_eof()
        return await reader.read(-1)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def with_proxy(work: Any, *, script: tuple[Fault, ...] = (), seed: int = 0) -> Any:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    async with server, FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1], script, seed) as proxy:
        return await asyncio.wait_for(work(proxy), 60)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def test_without_faults_everything_passes_unchanged() -> None:
    async def work(proxy: FaultProxy) -> bytes:
        return await through(proxy, b"hello" * 10_000)

    assert run(with_proxy(work)) == b"hello" * 10_000


def test_a_corrupted_stream_differs_in_single_bits_and_repeats_by_seed() -> None:
    async def work(proxy: FaultProxy) -> bytes:
        proxy.set(Fault(at_s=0, corrupt_rate=1.0))
        return await through(proxy, bytes(4))

    first, again, other = (run(with_proxy(work, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert sum(byte.bit_count() for byte in first) in {0, 2}  # one flip each way; the same bit twice restores it
    assert {first, other} != {bytes(4)}


def test_a_cut_resets_running_connections_and_refuses_new_ones() -> None:
    async def work(proxy: FaultProxy) -> tuple[int, int, bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        proxy.set(Fault(at_s=0, cut=True))
        rest = await asyncio.gather(reader.read(1), return_exceptions=True)
        writer.close()
        refused = await through(proxy, b"y")
        return proxy.passed.cut, proxy.passed.refused, b"" if isinstance(rest[0], OSError) else rest[0], refused

    assert run(with_proxy(work)) == (2, 1, b"", b"")


def test_half_open_swallows_everything_and_stays_connected() -> None:
    async def work(proxy: FaultProxy) -> int:
        proxy.set(Fault(at_s=0, half_open=True))
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        writer.close()
        return proxy.passed.bytes

    assert run(with_proxy(work)) == 0


def test_delay_and_rate_hold_a_chunk_back_in_order() -> None:
    async def work(proxy: FaultProxy) -> tuple[bytes, float]:
        proxy.set(Fault(at_s=0, delay_s=0.05, jitter_s=0.01, bytes_per_s=100_000))
        loop = asyncio.get_running_loop()
        start = loop.time()
        answer = await through(proxy, bytes(range(200)) * 10)
        return answer, loop.time() - start

    answer, took_s = run(with_proxy(work))
    assert answer == bytes(range(200)) * 10
    assert took_s >= 0.1  # at least the delay, both ways: a lower bound holds on any machine


def test_a_script_changes_the_fault_with_time() -> None:
    async def work(proxy: FaultProxy) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        answered = await through(proxy, b"")
        writer.write(b"lost")
        answer = asyncio.create_task(reader.read(100))
        while not answer.done():
            writer.write(b"heard")
            await asyncio.wait([answer], timeout=0.01)
        writer.close()
        return answered + answer.result()[:5]

    script = (Fault(at_s=0, half_open=True), Fault(at_s=1.0))
    assert run(with_proxy(work, script=script)) == b"heard"


@pytest.mark.parametrize(
    ("text", "names"),
    [("{", "wrong"), ('[{"at_s": 1, "lag_s": 2}]', "lag_s"), ('[{"at_s": 2}, {"at_s": 1}]', "ascend")],
)
def test_a_wrong_script_says_what_is_wrong(text: str, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        read_script(text)


def test_the_command_says_what_will_be_wrong_and_afterwards_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "faults.json"
    script.write_text('[{"at_s": 0, "delay_s": 0.01}, {"at_s": 0.05, "cut": true}]')
    assert main(["faults", "--target", "127.0.0.1:9", "--script", str(script), "--duration", "0.1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("relaying 127.0.0.1:")
    assert [line.strip() for line in said[1:3]] == ["from 0 s: delay_s 0.01", "from 0.05 s: cut True"]
    assert said[3] == "0 connections relayed, 0 refused, 0 cut; 0 bytes passed, 0 chunks corrupted"


def test_a_target_that_is_no_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", "--target", "nowhere"]) == 1
    assert "not of the form host:port" in capsys.readouterr().err
