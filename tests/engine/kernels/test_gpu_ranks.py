"""Two GPU runners over a half each say what one says over the whole: same launches, and sums over both between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.compute import ranks
from engine.compute.crew import Crew
from engine.compute.gpu_runner import GpuRunner
from engine.compute.runner import RunnerConfig, TorchRunner
from tests.engine.kernels import conftest, second_rank
from tests.engine.kernels.test_gpu_decoder import BLOCK, on_cpu
from tests.engine.kernels.test_gpu_runner import story

pytestmark = pytest.mark.skipif(conftest.HAS_CUDA, reason="on cards bench/gpu_parallel.py compares one rank and two")


def test_two_halves_tell_the_story_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, decodes ahead of what is asked for, newcomers beside them, ends: all told to the other rank."""
    cpu = TorchRunner(on_cpu(second_rank.whole()), RunnerConfig(block_tokens=BLOCK, kv_bytes=2**21))
    launched = []
    launch = GpuRunner._launch
    monkeypatch.setattr(GpuRunner, "_launch", lambda self, *what: launched.append(what) or launch(self, *what))
    lost: list[str] = []
    crew = Crew([tmp_path / "meeting"], lost.append, module="tests.engine.kernels.second_rank")
    try:
        with crew.answering(ranks.START_S):
            first = second_rank.half(0, tmp_path / "meeting")
            first.lead(crew.tell)
            told = story(first)
    finally:
        crew.close()
        ranks.leave()

    assert [len(output) for output in told] == [7, 9, 7, 7]
    assert told[:3] == story(cpu)[:3]  # the fourth draws: the GPU walks tokens by id, the CPU by rank
    assert any(sources is not None for _, sources, *_ in launched)
    assert lost == []


def test_a_sum_is_added_to_the_stream_once() -> None:
    """Rank 0 has the stream as its term, others zeros: what all write sums to the stream and all their products."""
    from engine.compute.device_sum import DeviceSum
    from engine.models.shard import Shard

    stream = torch.randn(3, 8)
    first, second = (DeviceSum(Shard(rank, 2), 4, 8, stream) for rank in range(2))

    assert first.term(stream) is stream
    assert torch.equal(second.term(stream), torch.zeros(3, 8))
    assert second.part(stream) is stream  # no card: no memory that others read
