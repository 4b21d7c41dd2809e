"""Our own product on a CPU: right, the same whatever stands beside a row, and done without where it must be."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from engine.models import linear, panels

WIDTH, DEPTH = 96, 70


@pytest.fixture
def weight() -> torch.Tensor:
    if panels.compiled() is None:
        pytest.skip("no AVX-512 or no C compiler here")
    return torch.randn(WIDTH, DEPTH, generator=torch.Generator().manual_seed(1))


def rows_of(count: int) -> torch.Tensor:
    return torch.randn(count, DEPTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("count", [0, *range(1, 27), 128, 130])
def test_it_is_the_product(weight: torch.Tensor, count: int) -> None:
    x = rows_of(count)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(panels.product(x, panels.arrange(weight)), exact.float(), atol=1e-4, rtol=0)


def test_a_row_is_the_same_bit_for_bit_whatever_rows_stand_beside_it(weight: torch.Tensor) -> None:
    arranged, x = panels.arrange(weight), rows_of(40)
    alone = torch.cat([panels.product(row[None], arranged) for row in x])
    for count in range(1, 41):
        assert torch.equal(panels.product(x[:count], arranged), alone[:count])


def test_a_linear_takes_rows_that_are_not_contiguous_and_adds_its_bias(weight: torch.Tensor) -> None:
    bias, x = torch.arange(float(WIDTH)), rows_of(6)
    made = linear.pack(weight, bias)
    assert made.product is panels.product
    assert torch.equal(made(x.T.contiguous().T), made(x))
    assert torch.allclose(made(x), x @ weight.T + bias, atol=1e-4)


def test_a_width_that_is_no_multiple_of_a_panel_is_not_for_it(weight: torch.Tensor) -> None:
    made, x = linear.pack(weight[:50]), rows_of(3)
    assert made.product is not panels.product
    assert torch.allclose(made(x), x @ weight[:50].T, atol=1e-4)


@pytest.mark.parametrize(
    ("compiler", "said"), [("/no/such/cc", "no C compiler"), ("", "no C compiler"), ("false", "exit status 1")]
)
def test_without_a_compiler_onednn_computes_and_the_log_says_so(
    compiler: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with caplog.at_level(logging.INFO):
        assert panels.compiled.__wrapped__() is None
    assert said in caplog.text
    assert [path.name for path in tmp_path.rglob("*.so")] == []


def test_a_compiler_that_never_ends_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "sh -c 'exec sleep 60'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(panels, "COMPILE_S", 0.05)
    with caplog.at_level(logging.INFO):
        assert panels.compiled.__wrapped__() is None
    assert "timed out" in caplog.text


def test_on_another_cpu_or_with_more_threads_onednn_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert panels.compiled.__wrapped__() is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert panels.compiled.__wrapped__() is None
    assert "does not have" in caplog.text
    assert "this worker has 4" in caplog.text


def test_it_is_compiled_once(weight: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del weight
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert panels.compiled.__wrapped__() is not None
    monkeypatch.setenv("CC", "/no/such/cc")
    assert panels.compiled.__wrapped__() is not None
    assert len(list(tmp_path.rglob("*.so"))) == 1
