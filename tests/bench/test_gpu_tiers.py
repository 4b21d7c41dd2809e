"""The benchmark of a GPU's host pool does what it says, under Triton's interpreter: every row, and KV unchanged."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from bench import gpu_tiers
from engine.compute.gpu_runner import GpuRunner
from engine.kernels import tuned
from tests.engine.kernels.test_gpu_decoder import BLOCK, config, weights

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def bench_of(monkeypatch: pytest.MonkeyPatch, decodes: int) -> gpu_tiers.Bench:
    monkeypatch.setattr(gpu_tiers, "CONTEXTS", (16, 40))
    small = replace(config(has_qk_norm=False), hidden=64, layers=1, heads=2, kv_heads=1, ffn=64)
    is_cuda = torch.cuda.is_available()
    made = weights(small, torch.bfloat16 if is_cuda else torch.float16, torch.device("cuda" if is_cuda else "cpu"))
    runner = GpuRunner(made, BLOCK, 32, 8, tuned.Table.empty("none"))
    return gpu_tiers.Bench(runner, 8 * BLOCK, decodes)


def test_every_row_is_measured_and_kv_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(monkeypatch, 2)

    def steps(name: str, count: int) -> gpu_tiers.Row:
        return gpu_tiers.Bench.steps(bench, name, min(count, 2))

    monkeypatch.setattr(bench, "steps", steps)
    rows = gpu_tiers.measure(bench, 1, warm_steps=2)
    bench.close()

    names = [row.name for row in rows]
    assert [names.count(f"restore, {memory}, decodes") for memory in ("pageable", "pinned")] == [1, 1]
    assert all(row.ms > 0 for row in rows)
    assert all(row.gb_s > 0 for row in rows if row.name.startswith(("store", "restore")))
    assert bench.pinning.pinned_bytes == 0


def test_a_block_that_comes_back_changed_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(monkeypatch, 1)
    bench.compute()
    bench.publish()
    bench.store("store", gpu_tiers.alone)
    bench.host.memory.payloads[next(iter(bench.host.slot_of.values()))][0] ^= 1

    with pytest.raises(AssertionError, match="came back changed"):
        bench.restore("restore", gpu_tiers.alone)
    bench.close()
