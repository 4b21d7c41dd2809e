"""Files of traces: plain, .gz or .zst, line by line or as a tar, and written the same for the same bytes.

Owns compression and its bounds. Never looks inside a line."""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

LINE_BYTES_MAX = 4 * 1024 * 1024  # a 1M-token prompt in 16-token blocks is about 0.7 MB
MEMBER_BYTES_MAX = 64 * 1024 * 1024  # of a tar: the largest public session is 4 MB
WINDOW_BYTES_MAX = 1 << 27  # `zstd --long=27`; what a hostile file may make us keep


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The plain bytes of a file, by its suffix."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif path.suffix == ".zst":
            unpack = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
            yield io.BufferedReader(unpack.stream_reader(raw), 1 << 20)
        else:
            yield raw


def lines(path: Path) -> Iterator[bytes]:
    """Line by line; one over LINE_BYTES_MAX comes cut, so that a reader refuses it and memory stays bounded."""
    with opened(path) as plain:
        while line := plain.readline(LINE_BYTES_MAX + 1):
            yield line
            while line and not line.endswith(b"\n"):
                line = plain.readline(LINE_BYTES_MAX + 1)


def members(path: Path, ending: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of a tar's members with this ending, in the tar's order; larger ones than the bound are empty."""
    with opened(path) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(ending):
                content = tar.extractfile(member) if member.size <= MEMBER_BYTES_MAX else None
                yield member.name, content.read() if content else b""


def write(plain: bytes, path: Path) -> None:
    """Compressed as the suffix says; the same bytes give the same file."""
    if path.suffix == ".zst":
        plain = zstandard.ZstdCompressor(level=10).compress(plain)
    elif path.suffix == ".gz":
        plain = gzip.compress(plain, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plain)
