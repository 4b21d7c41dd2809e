"""A name for the weights in a folder: part of every chain key, so it must differ when KV would.

Owns no file. Never reads all of a large one: names, sizes, heads and tails tell two checkpoints apart."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

EDGE_BYTES = 1024 * 1024  # the head holds all tensor names and shapes; the tail is weights


def folder_digest(folder: Path) -> str:
    """32 hex digits of config.json and every safetensors file in `folder`."""
    digest = xxhash.xxh3_128((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}|{size}|".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES), os.SEEK_SET)
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()
