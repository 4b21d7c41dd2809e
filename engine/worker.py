"""The worker process around the loop: a Unix socket, several links, signals; sockets have one thread, the loop another.

Owns links and their bounds. Never computes, and never lets a link's pace reach the loop: that one only fills outboxes.
A link that is gone takes its sequences with it at once; their blocks stay cached, so a retry costs no prefill."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.compute.grammar_gate import Compile, GrammarGate, no_grammars
from engine.config import EngineConfig
from engine.core import Attach, Core, Detach, Inbox, Order
from engine.outbox import Outbox
from engine.wire import (
    PROTOCOL_VERSION,
    Drain,
    FrameReader,
    FromRouter,
    Message,
    Welcome,
    WireError,
    decode_from_router,
    encode,
)

log = logging.getLogger(__name__)

WELCOME_S = 5.0  # from connect to the router's welcome
SEND_BUFFER_BYTES = 256 * 1024  # beyond what the kernel holds; then frames merge in the outbox
READ_BYTES = 256 * 1024
INBOX_FULL_WAIT_S = 0.005
FLUSH_S = 2.0  # for the last frames, when the loop has ended ...
FLUSH_POLL_S = 0.005


class StartError(Exception):
    """The worker cannot start; the message says why and what to do, in one sentence."""


@dataclass(frozen=True, slots=True)
class _Streams:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Worker:
    """Serves a core until it has drained. `serve` returns the process's exit code."""

    def __init__(
        self,
        core: Core,
        inbox: Inbox,
        config: EngineConfig,
        *,
        encode: Callable[[Message], bytearray] = encode,
        compile: Compile = no_grammars,  # noqa: A002
    ) -> None:
        self._core = core
        self._inbox = inbox
        self._config = config
        self._encode = encode
        self._compile = compile
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self._links: dict[int, Outbox] = {}
        self._opened = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> int:
        """Listen, run the loop in its own thread, and leave when it ends."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[BaseException | None] = loop.create_future()
        thread = threading.Thread(target=self._run_core, args=(loop, ended), name="core", daemon=True)
        server = await asyncio.start_unix_server(self._accept, sock=listen(self._config.socket))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain)
        thread.start()
        log.info("worker %s is ready on %s", self._config.name, self._config.socket)
        try:
            error = await ended
            thread.join()  # it has said its last word; the interpreter must not go down under it
            await self._flush()
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._config.socket)
        if error is not None:
            log.error("worker %s: the step loop failed", self._config.name, exc_info=error)
        return 1 if error is not None else 0

    def _run_core(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Future[BaseException | None]) -> None:
        error: BaseException | None = None
        try:
            self._core.run()
        except BaseException as failure:  # noqa: BLE001 -- border: the loop's fault ends the process, told by its code
            error = failure
        loop.call_soon_threadsafe(ended.set_result, error)

    def _drain(self) -> None:
        self._inbox.put(Order(0, Drain(self._config.drain_s), time.monotonic()))

    async def _flush(self) -> None:
        """Give the senders, which run beside this, time to empty the outboxes."""
        until = time.monotonic() + FLUSH_S
        for outbox in self._links.values():
            while not outbox.is_empty and time.monotonic() < until:  # noqa: ASYNC110 -- once, at the end
                await asyncio.sleep(FLUSH_POLL_S)

    # One link --------------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if len(self._links) >= self._config.links_max:
                log.warning("a link was refused: %d are open", len(self._links))
            else:
                await self._link(_Streams(reader, writer))
        except asyncio.CancelledError:
            if not task.cancelling():
                raise
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _link(self, streams: _Streams) -> None:
        loop = asyncio.get_running_loop()
        self._opened += 1
        link, has_news = self._opened, asyncio.Event()
        outbox = self._links[link] = Outbox(lambda: _wake(loop, has_news))
        self._inbox.put(Attach(link, outbox))
        try:
            async with asyncio.TaskGroup() as tasks:
                sender = tasks.create_task(self._send(streams.writer, outbox, has_news))
                gate = GrammarGate(self._compile, self._compiling, self._inbox.put, tasks)
                await self._receive(link, streams.reader, gate)
                gate.close()
                sender.cancel()
        except* (WireError, OSError, TimeoutError) as errors:
            log.warning("link %d was cut: %s", link, "; ".join(str(error) or "timeout" for error in errors.exceptions))
        finally:
            del self._links[link]
            self._inbox.put(Detach(link))

    async def _send(self, writer: asyncio.StreamWriter, outbox: Outbox, has_news: asyncio.Event) -> None:
        writer.transport.set_write_buffer_limits(high=SEND_BUFFER_BYTES)
        while True:
            await has_news.wait()
            has_news.clear()
            while message := outbox.take():
                writer.write(self._encode(message))
                async with asyncio.timeout(self._config.send_s):
                    await writer.drain()

    async def _receive(self, link: int, reader: asyncio.StreamReader, gate: GrammarGate) -> None:
        frames = FrameReader()
        async with asyncio.timeout(WELCOME_S):
            queue = await _some(frames, reader)
        if not queue:
            return
        welcome = queue.pop(0)
        if not isinstance(welcome, Welcome) or welcome.protocol != PROTOCOL_VERSION:
            raise WireError(f"the first message must be a welcome of protocol {PROTOCOL_VERSION}")
        log.debug("link %d is open: %s", link, welcome.router)
        while True:
            for message in queue:
                if isinstance(message, Welcome):
                    raise WireError("a second welcome")
                gate.put(Order(link, message, time.monotonic()))
            while self._inbox.is_full:  # noqa: ASYNC110 -- the loop must not pay for a wake-up each time it reads
                await asyncio.sleep(INBOX_FULL_WAIT_S)
            queue = await _some(frames, reader)
            if not queue:
                return


async def _some(frames: FrameReader, reader: asyncio.StreamReader) -> list[FromRouter]:
    """The next messages, at least one; none when the peer has closed."""
    while data := await reader.read(READ_BYTES):
        complete = frames.feed(data)
        if complete:
            return [decode_from_router(frame) for frame in complete]
    return []


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
        loop.call_soon_threadsafe(event.set)


def listen(path: str) -> socket.socket:
    """A listening Unix socket that only this user can connect to. Raises StartError."""
    if len(os.fsencode(path)) > 100:  # 104 on macOS, 108 on Linux
        raise StartError(f"the socket path {path} is longer than the 100 bytes that systems allow; use a shorter one")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):  # it refuses connections as well
            raise StartError(f"{path} is there and no socket; give this worker a path of its own") from None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # left behind by a worker that was killed
    except OSError as error:
        raise StartError(f"cannot use the socket {path}: {error}") from error
    else:
        raise StartError(f"another worker listens on {path}; give this one its own socket")
    finally:
        probe.close()
    return _bind(path)


def _bind(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)  # the socket is 0600 from its first moment
    try:
        listener.bind(path)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {path}: {error}") from error
    finally:
        os.umask(old_mask)
    return listener
