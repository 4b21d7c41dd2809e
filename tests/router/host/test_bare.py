"""The wheel without its [engine] part: no torch, GGUF reader or grammar library, and what is served all the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.router.desk import TEMPLATE, tokenizer_json

DEADLINE_S = 120.0
LEFT_OUT = ("torch", "gguf", "llguidance", "safetensors", "triton", "transformers")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 258,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which the libraries of [engine] are not there, in children of children neither."""
    blocks = "\n".join(f"sys.modules[{name!r}] = None" for name in LEFT_OUT)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocks}\n")
    places = {"PYTHONPATH": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    return {**os.environ, **places, "XDG_RUNTIME_DIR": str(tmp_path)}


def served(tmp_path: Path, *flags: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "router.cli", "serve", "--port=0", "--admin-port=0", *flags]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=bare(tmp_path)), log


def test_a_folder_is_served_with_made_up_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    process, log = served(tmp_path, "--device=fake", "--workers=1", f"--model={folder}")
    try:
        until = time.monotonic() + DEADLINE_S
        while (found := re.search(r"Headway serves tiny at (\S+)", log.read_text())) is None:
            assert time.monotonic() < until, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        answer = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=DEADLINE_S)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 5
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)


def test_what_must_be_installed_first_is_one_sentence(tmp_path: Path) -> None:
    process, log = served(tmp_path)
    assert process.wait(DEADLINE_S) != 0
    assert "is not installed: pip install 'headway[engine]'" in log.read_text()
    assert "Traceback" not in log.read_text()
