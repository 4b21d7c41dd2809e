"""Kernels run under Triton's interpreter where no CUDA device is; without Triton these tests are skipped."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_CUDA = torch.cuda.is_available()

collect_ignore = (
    []
    if HAS_TRITON
    else [
        "test_attention.py",
        "test_check.py",
        "test_fp8.py",
        "test_gpu_ranks.py",
        "test_gpu_runner.py",
        "test_gpu_decoder.py",
        "test_kv_dtype.py",
        "test_linear.py",
        "test_rows.py",
        "test_sample.py",
    ]
)


def pytest_report_header() -> str:
    """Says why the numeric tests are missing where they are."""
    if not HAS_TRITON:
        return "kernels: triton is not installed, numeric tests of kernels are not collected"
    return f"kernels: on {'cuda' if HAS_CUDA else 'the interpreter'}"


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def dtype() -> torch.dtype:
    """What they compute on: the interpreter's dot knows no bfloat16."""
    return torch.bfloat16 if HAS_CUDA else torch.float16


@pytest.fixture(autouse=HAS_TRITON and not HAS_CUDA)
def rounds_to_e4m3_as_a_card_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter drops the carry of a mantissa that rounds up to a power of two: 31.9 becomes 16."""
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(data: np.ndarray[Any, Any], source: Any, target: Any, mode: Any) -> np.ndarray[Any, Any]:
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return own(data, source, target, mode)
        numbers = torch.from_numpy(np.ascontiguousarray(data))
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton 3.6's interpreter leans on a conversion that NumPy deprecates (and 2.4 refuses)."""
    for item in items:
        if "kernels" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))
