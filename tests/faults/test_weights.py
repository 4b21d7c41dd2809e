"""Other weights under a real router: who streams is resumed behind its tokens and never notices."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.faults.house import DEADLINE_S, house

pytestmark = pytest.mark.model


def test_streams_go_on_through_a_change_of_weights(tmp_path: Path, model_folder: Path) -> None:
    engine = ("engine", "worker", "--model", str(model_folder))

    async def scene() -> None:
        async with house(tmp_path, model_folder, names=("w0",), engine=engine) as built:
            stream = await built.ask("Count from one to fifty.", tokens=100).until(lambda seen: len(seen.text) > 0)
            # The same weights under another version: the text must be what it would have been.
            order = ("--socket", str(tmp_path / "w0.sock"), "--weights", str(model_folder), "--version", "7")
            tell = await asyncio.create_subprocess_exec(sys.executable, "-m", "engine", "tell", *order)
            assert await asyncio.wait_for(tell.wait(), DEADLINE_S) == 0
            is_running = not stream.finish_reason
            await stream.end()
            after = await built.ask("Count from one to fifty.", tokens=100).end()

            assert is_running
            assert (stream.errors, stream.is_done, stream.finish_reason) == ([], True, "length")
            assert stream.text == after.text
            assert "weights are of version 7 now" in (tmp_path / "w0.log").read_text()
            assert "its weights are others" in (tmp_path / "router.log").read_text()

    asyncio.run(scene())
