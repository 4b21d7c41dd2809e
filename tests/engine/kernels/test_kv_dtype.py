"""fp8 KV is what was asked for or a sentence, and its blocks have names of their own."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import __main__ as command
from engine.compute import gpu_build
from engine.config import EngineConfig
from engine.kv import keys
from engine.models import gpu
from engine.models.config import ModelError
from tests.engine.kernels.test_gpu_decoder import config


def test_a_worker_on_a_cpu_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_convert", lambda *_: tmp_path)

    code = command.main(["worker", "--model", "any", "--socket", str(tmp_path / "w.sock"), "--kv-dtype", "fp8"])

    assert code == 2
    assert capsys.readouterr().err == (
        "engine: fp8 KV is for GPU workers, and this one is for cpu: leave --kv-dtype out\n"
    )


def test_no_two_kinds_of_kv_have_a_root_in_common() -> None:
    kinds = [
        EngineConfig(socket="", device=device, kv_dtype=kv_dtype, tensor_parallel=ranks)
        for device, kv_dtype in (("cpu", "bf16"), ("cuda:0", "bf16"), ("cuda:0", "fp8"))
        for ranks in (1, 2)
    ]

    assert len({keys.root("digest", kv_dtype=command._kv_dtype(kind)) for kind in kinds}) == len(kinds)


def test_kernels_that_fail_their_self_check_end_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name in ("set_device", "synchronize", "get_device_name"):
        monkeypatch.setattr(gpu_build.torch.cuda, name, lambda *_: "a card")
    nothing = SimpleNamespace(begin=lambda _: None, wait=lambda: None)
    monkeypatch.setattr(gpu_build, "compilers", lambda: nullcontext(nothing))
    monkeypatch.setattr(gpu_build, "wanted", lambda *_, **__: None)
    made = gpu.random_weights(config(has_qk_norm=False), cpu, torch.bfloat16)
    monkeypatch.setattr(gpu_build, "on_device", lambda *_, **__: made)
    monkeypatch.setattr(gpu_build.check, "failures", lambda *_, **__: {"prefill": "relative error 1"})

    with pytest.raises(ModelError, match="fp8 KV needs our own kernels, which failed their self-check on cpu"):
        gpu_build.load(tmp_path, cpu, block_tokens=64, kv_bytes=0, sequences_max=8, is_kv_fp8=True)
