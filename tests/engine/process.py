"""A fake worker as a real process, and a router's end of its socket, both with deadlines."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine import wire
from engine.wire import FrameReader, Hello, Message, StepFrame, Welcome, decode_from_worker, encode

DEADLINE_S = 60.0


class Peer:
    """One link, blocking."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(os.fspath(path))
        self._frames = FrameReader()
        self._ready: list[wire.FromWorker] = []
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, wire.End] = {}
        self.starts: dict[int, wire.Start] = {}
        self.loads: list[wire.Load] = []
        self.stored: set[bytes] = set()
        hello = self.receive()
        assert isinstance(hello, Hello)
        self.hello = hello

    def welcome(self) -> Peer:
        self.send(Welcome(wire.PROTOCOL_VERSION, "r0", "", b""))
        return self

    def send(self, *messages: Message) -> None:
        self._socket.sendall(b"".join(map(encode, messages)))

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> wire.FromWorker:
        """The next message; EOFError when the worker has closed."""
        while not self._ready:
            data = self._socket.recv(65536)
            if not data:
                raise EOFError
            self._ready = [decode_from_worker(frame) for frame in self._frames.feed(data)]
        return self._ready.pop(0)

    def frame(self) -> StepFrame:
        """The next frame, noted."""
        frame = self.receive()
        assert isinstance(frame, StepFrame)
        ids = iter(memoryview(frame.ids).cast("i"))
        for handle, count in zip(frame.handles, frame.counts, strict=True):
            self.tokens.setdefault(handle, []).extend(itertools.islice(ids, count))
        self.starts |= {start.handle: start for start in frame.starts}
        self.ends |= {end.handle: end for end in frame.ends}
        self.loads.append(frame.load)
        assert not frame.load.repairs, "the worker lost blocks and started its cache over"
        return frame

    def until(self, is_so: Callable[[], bool]) -> None:
        """Read until what came so far is so."""
        until = time.monotonic() + DEADLINE_S
        while not is_so():
            assert time.monotonic() < until, f"started {sorted(self.starts)}, ended {sorted(self.ends)}"
            self.frame()

    def until_ended(self, *handles: int) -> None:
        """Read until all of these have ended."""
        self.until(lambda: set(handles) <= self.ends.keys())

    def until_closed(self) -> None:
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                self.receive()

    def close(self) -> None:
        self._socket.close()


class FakeWorker:
    """The process; `connect` as often as wanted."""

    def __init__(self, folder: Path, *arguments: str, fds: tuple[int, ...] = ()) -> None:
        self.path = folder / "w.sock"
        command = [sys.executable, "-m", "engine", "fake", "--socket", str(self.path), "--calibrate-s", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=fds)
        self._peers: list[Peer] = []
        until = time.monotonic() + DEADLINE_S
        while not self._is_listening():
            assert time.monotonic() < until
            assert self.process.poll() is None, self.process.communicate()[1]

    def _is_listening(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(os.fspath(self.path)) == 0:
                return True
        time.sleep(0.01)
        return False

    def connect(self) -> Peer:
        """A link that has said welcome."""
        peer = Peer(self.path).welcome()
        self._peers.append(peer)
        return peer

    def exit_code(self) -> int:
        """Once it has ended by itself."""
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=DEADLINE_S)


@contextlib.contextmanager
def fake_worker(folder: Path, *arguments: str, fds: tuple[int, ...] = ()) -> Iterator[FakeWorker]:
    worker = FakeWorker(folder, *arguments, fds=fds)
    try:
        yield worker
    finally:
        worker.close()
