"""The disk tier: blocks that the host pool had no room for any more, one checksummed file each.

Owns one worker's folder and its bound. Any file may be deleted or damaged by anyone at any time: that is a miss, and a
file that does not prove itself is removed. Never makes a request wait: writes queue, and what does not fit is lost."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import xxhash

from engine.kv.pool import Content
from engine.step import Bytes

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
QUEUE_MAX = 16  # blocks that wait to be written, copied out of the pool: 128 MB of 8 MiB blocks
_HEADER = struct.Struct("<8sIIQ16s16sQ")  # magic, version, tokens, payload bytes, key, parent, xxh3 of all else
_MAGIC = b"headway\n"
_SUFFIX = ".kv"


class DiskError(Exception):
    """The folder cannot be used; the message says why in one sentence."""


class Disk:
    """Thread-safe. `holds` is a promise that only `read` redeems."""

    def __init__(
        self,
        folder: Path,
        bytes_max: int,
        payload_bytes: int,
        run: Executor,
        *,
        epoch: int = 0,
        distrusts: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """`folder` is made, and locked for this process; what a distrusted epoch had there is removed.
        Raises DiskError."""
        self._folder = folder
        self._files_max = bytes_max // payload_bytes
        self._payload_bytes = payload_bytes
        self._run = run
        self._guard = threading.Lock()
        self._files: OrderedDict[bytes, None] = OrderedDict()  # oldest first
        self._queued = 0
        self.written = 0
        self.dropped = 0  # not written: the queue was full, or the disk refused
        self.corrupt = 0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_over(epoch, distrusts)
            self._scan()
        except OSError as error:
            raise DiskError(
                f"{folder} cannot be used for KV ({error.strerror}); another process may hold it"
            ) from error

    def _take_over(self, epoch: int, distrusts: Callable[[int], bool]) -> None:
        """The folder says whose it was last."""
        mark = self._folder / "epoch"
        last = mark.read_text(encoding="ascii", errors="replace") if mark.exists() else ""
        if last.isascii() and last.isdigit() and distrusts(int(last)):
            for path in self._folder.glob(f"*{_SUFFIX}"):
                path.unlink(missing_ok=True)
        mark.write_text(str(epoch), encoding="ascii")

    def _scan(self) -> None:
        found = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in found:
            with contextlib.suppress(ValueError):  # not a name of ours: not ours to touch
                self._files[bytes.fromhex(path.stem)] = None
        for stray in self._folder.glob("*.part"):  # a worker was killed while it wrote
            stray.unlink(missing_ok=True)
        self._shrink()

    def __len__(self) -> int:
        return len(self._files)

    def holds(self, key: bytes) -> bool:
        """Whether a file of this block was there when last looked."""
        return key in self._files

    def write(self, content: Content, payload: Bytes) -> None:
        """Queue a block; its payload is copied now. From any thread."""
        with self._guard:
            if content.key in self._files:
                self._files.move_to_end(content.key)
                return
            if self._queued >= QUEUE_MAX:
                self.dropped += 1
                return
            self._queued += 1
        self._run.submit(self._write, content, payload.tobytes())

    def _write(self, content: Content, payload: bytes) -> None:
        path = self._path(content.key)
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                file.write(_header(content, payload))
                file.write(content.tokens.tobytes())
                file.write(payload)
            part.replace(path)  # whole or not at all; not synced, as a torn file fails its checksum
        except OSError as error:
            log.warning("KV was not written to disk: %s", error)
            part.unlink(missing_ok=True)
            self._finish(None)
        else:
            self._finish(content.key)

    def _finish(self, key: bytes | None) -> None:
        with self._guard:
            self._queued -= 1
            if key is None:
                self.dropped += 1
                return
            self.written += 1
            self._files[key] = None
        self._shrink()

    def _shrink(self) -> None:
        while True:
            with self._guard:
                if len(self._files) <= self._files_max:
                    return
                key, _ = self._files.popitem(last=False)
            self._path(key).unlink(missing_ok=True)

    def read(self, content: Content, into: Callable[[Bytes], None]) -> bool:
        """Let `into` take the payload; False, and the file is forgotten, unless it proves to be this block."""
        try:
            data = self._path(content.key).read_bytes()
        except OSError:
            self.drop(content.key)
            return False
        if not self._proves(data, content):
            self.corrupt += 1
            self.drop(content.key)
            return False
        into(np.frombuffer(bytearray(memoryview(data)[-self._payload_bytes :]), np.uint8))
        with self._guard:
            if content.key in self._files:
                self._files.move_to_end(content.key)
        return True

    def _proves(self, data: bytes, content: Content) -> bool:
        tokens = content.tokens.tobytes()
        if len(data) != _HEADER.size + len(tokens) + self._payload_bytes:
            return False
        payload = data[_HEADER.size + len(tokens) :]
        return data[: _HEADER.size] == _header(content, payload) and data[_HEADER.size : -len(payload)] == tokens

    def drop(self, key: bytes) -> None:
        """Forget a block and remove its file."""
        with self._guard:
            self._files.pop(key, None)
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}{_SUFFIX}"


def _header(content: Content, payload: bytes) -> bytes:
    tokens = content.tokens.tobytes()
    digest = xxhash.xxh3_64()
    named = (_MAGIC, FORMAT_VERSION, len(content.tokens), len(payload), content.key, content.parent)
    digest.update(_HEADER.pack(*named, 0))
    digest.update(tokens)
    digest.update(payload)
    return _HEADER.pack(*named, digest.intdigest())
