"""The benchmark of the link measures a link that is taken in: every frame's tokens reach who waits for them."""

from __future__ import annotations

import asyncio

import pytest

from bench import link


def test_frames_reach_their_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "FRAMES", 3)

    async def measured() -> float:
        return link.measure(streams=2)  # asserts that all six tokens came

    assert asyncio.run(measured()) > 0.0
