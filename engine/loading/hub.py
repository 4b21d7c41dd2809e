"""A model by its hub name, org/name[@revision], as a folder: downloaded once at start, then found in the hub's cache.

Owns which files are taken: weights as safetensors, configs, tokenizer; never pickle, never code. Respects HF_HOME,
HF_TOKEN and HF_HUB_OFFLINE, and shows progress on stderr."""

from __future__ import annotations

import re
from pathlib import Path

from engine.models.config import ELSEWHERE, ModelError

FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*token*", "*.jinja")
NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "original/*", "*/*")
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_name(model: str) -> bool:
    """Whether a model's name is one of the hub's rather than a path."""
    return _NAME.fullmatch(model) is not None


def fetch(model: str) -> Path:
    """The model's folder. Raises ModelError when it cannot be had."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ModelError(f"to download {model}, pip install huggingface_hub; or {ELSEWHERE}") from None
    name, _, revision = model.partition("@")
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=[*FILES], ignore_patterns=[*NEVER])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = re.split(r"\n|\. ", str(error).strip(), maxsplit=1)[0][:200]  # its first sentence
        raise ModelError(f"the model {model} cannot be downloaded ({said}); name a folder, or {ELSEWHERE}") from error
    return Path(folder)
