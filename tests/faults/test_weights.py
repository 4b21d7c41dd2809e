"""Other weights under a real router: who streams is resumed behind its tokens and never notices."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.tell import tell
from engine.wire import Control, Sleep, UpdateWeights, Wake
from router.settings.config import Classes, Config, Promise
from tests.faults.house import DEADLINE_S, House, Stream, house

pytestmark = pytest.mark.model

TOKENS = 300  # 2 s of stream: an order sent after its first token, without a process's start, comes long before its end

# Who waits while the only worker loads weights beside others' work; 30 s else.
PATIENT = Config(classes=Classes(chatbot=Promise(patience_s=DEADLINE_S)))


def test_streams_go_on_through_a_change_of_weights(tmp_path: Path, model_folder: Path) -> None:
    engine = ("engine", "worker", "--model", str(model_folder))

    async def scene() -> None:
        async with house(tmp_path, model_folder, PATIENT, names=("w0",), engine=engine) as built:
            stream, tokens = await changed_in_mid_stream(built, model_folder)
            await stream.end()
            after = await ask(built, tokens).end()

            assert (stream.errors, stream.is_done, stream.finish_reason) == ([], True, "length")
            assert stream.text == after.text
            assert "weights are of version 7 now" in (tmp_path / "w0.log").read_text()
            assert "its weights are others" in (tmp_path / "router.log").read_text()

    asyncio.run(scene())


def test_a_stream_outlives_its_only_workers_sleep(tmp_path: Path, model_folder: Path) -> None:
    engine = ("engine", "worker", "--model", str(model_folder))

    async def scene() -> None:
        async with house(tmp_path, model_folder, PATIENT, names=("w0",), engine=engine) as built:
            stream = await ask(built, TOKENS).until(lambda seen: len(seen.text) > 0)
            await order(built, Sleep(1, 2))
            await built.until(lambda seen: seen["w0"]["asleep"] == 2)
            said, resident = len(stream.text), resident_bytes(built.workers["w0"].pid)
            shown = (await built.admin.get("/workers")).json()[0]
            metrics = (await built.admin.get("/metrics")).text
            ready = (await built.client.get("/readyz")).status_code
            is_running = not stream.finish_reason
            await order(built, Wake(1))
            await built.until_up(1)
            woken = resident_bytes(built.workers["w0"].pid)
            await stream.end()
            after = await ask(built, TOKENS).end()

            assert is_running
            assert (shown["is_up"], ready) == (False, 503)
            assert "asleep at level 2" in shown["lost_reason"]
            assert 'headway_worker_asleep{worker="w0"} 2.0' in metrics
            assert woken - resident > 500 * 2**20  # the weights are 538 MB; KV is touched as it is used
            assert (stream.errors, stream.is_done, stream.finish_reason) == ([], True, "length")
            assert said < len(stream.text)
            assert stream.text == after.text

    asyncio.run(scene())


def ask(built: House, tokens: int) -> Stream:
    return built.ask("Count from one to fifty.", tokens=tokens, **{"x-headway-class": "chatbot+"})


async def changed_in_mid_stream(built: House, model: Path) -> tuple[Stream, int]:
    """A stream that runs on when the weights are others, and its length: as long as loading takes on this machine."""
    for version, tokens in enumerate((TOKENS, 4 * TOKENS, 16 * TOKENS), start=7):
        stream = await ask(built, tokens).until(lambda seen: len(seen.text) > 0)
        # The same weights under another version: the text must be what it would have been.
        await order(built, UpdateWeights(1, str(model), version))
        if not stream.finish_reason:
            return stream, tokens
    raise AssertionError("every stream had ended before other weights were loaded")


async def order(built: House, what: Control) -> None:
    """As `python -m engine tell` gives it, without that process's second of start."""
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.to_thread(tell, str(built.directory / "w0.sock"), what)


def resident_bytes(process: int) -> int:
    """Without files and shared memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])
