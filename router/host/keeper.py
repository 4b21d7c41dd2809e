"""The keeper: `headway serve` itself. Starts, watches and restarts router and workers of this host, and dies last.

Owns their processes, the listening sockets (a restarted router misses no connection) and the workers' shared KV memory.
Never speaks HTTP, never loads a model: standard library only, so nothing takes it down."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router.host.banner import ask_ready, banner
from router.host.child import Child, ending
from router.host.run_folder import run_folder

BAD_SETTINGS = 2  # a child's exit code: it said in one sentence what cannot be had, and trying again will not help
START_DEATHS_MAX = 3  # of one child before anything was ever ready: a wrong model or no memory, so say it and stop
READY_POLL_S = 0.1
COMPLETE_S = 5.0  # so long the banner waits for the other workers once the first one serves
ERROR_S = 3.0  # beyond the grace: the router ends what is left with errors and leaves
REREAD_S = 20.0  # for reading the configuration again: imports of the policy's libraries take the most
STOP_WORKERS_S = 5.0  # a worker whose router is gone has nothing to finish
BACKLOG = 2048  # connections that wait while a router restarts
ASK_MAX_BYTES = 4096  # names of workers to kill, from the router
# Where the pool's header page has the epochs of workers whose KV is void (engine/kv/pool.py; a test holds them equal).
DISTRUSTED_OFFSET, DISTRUSTED_MAX = 64, 32


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. In commands, {run} is the run folder, {model} what `prepare` printed last, and {pool} the
    descriptor of the workers' shared KV memory, -1 without."""

    host: str
    port: int
    admin_port: int
    drain_grace_s: float
    config: bytes  # goes to {run}/config.json
    prepare: Sequence[str]
    workers: Mapping[str, Sequence[str]]  # by name; each listens on {run}/NAME.sock
    router: Sequence[str]  # gets --listen-fd, --admin-fd, --keeper-fd and a --worker for each beside it
    env: Mapping[str, str]
    pool_bytes: int = 0
    reread: Sequence[str] = ()  # on SIGHUP: writes {run}/config.json again, or says what is wrong and fails
    serving: int = 1  # so many workers or upstreams are all of them


class StartError(Exception):
    """Nothing can be served. The message is for the person who typed `headway serve`, `code` for what waits on it."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = BAD_SETTINGS if code == BAD_SETTINGS else 1


@dataclass(slots=True)
class Keeper:
    """Runs a plan until a signal says stop. `say` is where people read."""

    plan: Plan
    say: Callable[[str], None] = field(default=lambda line: print(line, flush=True))
    _children: list[Child] = field(default_factory=list)
    _signals: int = 0  # SIGINT and SIGTERM so far: the second one ends the patience
    _hangups: int = 0  # SIGHUPs not obeyed yet
    _serves_since: float = 0.0
    _is_ready: bool = False  # the banner was said
    _pool: int = -1  # descriptor of the workers' shared KV memory
    _distrusted: int = 0  # epochs so far

    def run(self) -> int:
        """Serve until stopped. Returns the exit code; no child is left."""
        with contextlib.ExitStack() as stack:
            wake = stack.enter_context(self._signals_to_a_socket())
            try:
                run = stack.enter_context(run_folder())
                listen = stack.enter_context(_listen(self.plan.host, self.plan.port, "--port"))
                admin = stack.enter_context(_listen("127.0.0.1", self.plan.admin_port, "--admin-port"))
                asks, ask = os.pipe()
                stack.callback(os.close, asks)
                stack.callback(os.close, ask)
                (run / "config.json").write_bytes(self.plan.config)
                stack.callback(self._kill_all)
                model = self._prepare(wake) if self.plan.prepare else ""
                pool = stack.enter_context(_pool(self.plan.pool_bytes))
                self._pool = pool
                self._plan_children(run, model, pool, (listen.fileno(), admin.fileno(), ask))
                self._serve(wake, asks, run, (listen.getsockname(), admin.getsockname()[1]))
                listen.close()  # from here on a connection is refused, not left waiting for nobody
                self._drain(wake)
            except StartError as error:
                self.say(f"headway: {error}")
                return error.code
        return 0

    # Start ------------------------------------------------------------------------------------------------------------

    def _prepare(self, wake: socket.socket) -> str:
        """Run the conversion and return the last line that it printed: where the model is."""
        self.say("headway: preparing the model")
        child = Child("prepare", self.plan.prepare)
        self._children = [child]
        with tempfile.TemporaryFile() as printed:
            child.start(self.plan.env, stdout=printed)
            assert child.process is not None, "it was started"
            while child.process.poll() is None and not self._signals:
                _wait(wake, (), None)
            self._children = []
            if self._signals:
                child.kill()
                return ""
            printed.seek(0)
            lines = printed.read().decode(errors="replace").split("\n")
        model = next((line for line in reversed(lines) if line), "")
        if child.process.returncode != 0 or not model:
            raise StartError(
                f"the model could not be prepared ({ending(child.process.returncode)})", child.process.returncode
            )
        return model

    def _plan_children(self, run: Path, model: str, pool: int, fds: tuple[int, int, int]) -> None:
        def filled(command: Sequence[str]) -> list[str]:
            parts = [part.replace("{run}", str(run)).replace("{model}", model) for part in command]
            return [part.replace("{pool}", str(pool)) for part in parts]

        shared = (pool,) if pool >= 0 else ()
        workers = [Child(name, filled(command), shared) for name, command in self.plan.workers.items()]
        command = filled(self.plan.router)
        for flag, fd in zip(("--listen-fd", "--admin-fd", "--keeper-fd"), fds, strict=True):
            command += [flag, str(fd)]
        for worker in workers:
            command += ["--worker", f"{worker.name}={run / worker.name}.sock"]
        self._children = [*workers, Child("router", command, fds)]

    # Watch ------------------------------------------------------------------------------------------------------------

    def _serve(self, wake: socket.socket, asks: int, run: Path, addresses: tuple[Any, int]) -> None:
        address, admin_port = addresses
        while not self._signals:
            now = time.monotonic()
            for child in self._children:
                self._watch(child, now)
            if not self._is_ready:
                self._announce(address, admin_port, now)
            due = [child.start_at - now for child in self._children if child.process is None]
            pause = min([*due, READY_POLL_S] if not self._is_ready else due, default=None)
            for asked in _wait(wake, (asks,), pause):
                name, _, epoch = asked.partition("=")
                self._restart(name, int(epoch or 0))
            if self._hangups:
                self._reread(wake, run)

    def _announce(self, address: Any, admin_port: int, now: float) -> None:
        """Say the banner once all workers serve, or some do and the others take long."""
        answer = ask_ready(("127.0.0.1", admin_port))
        if answer is None:
            return
        self._serves_since = self._serves_since or now
        if answer["workers"] >= self.plan.serving or now - self._serves_since > COMPLETE_S:
            self._is_ready = True
            self.say(banner(address, admin_port, answer))

    def _watch(self, child: Child, now: float) -> None:
        if child.process is None:
            if now >= child.start_at:
                child.start(self.plan.env)
            return
        lived_s = now - child.started_at
        code = child.ended(now)
        if code is None:
            return
        if not self._is_ready and (code == BAD_SETTINGS or child.deaths >= START_DEATHS_MAX):
            raise StartError(f"{child.name} cannot start ({ending(code)}); see its lines above", code)
        again_s = child.start_at - now
        self.say(f"headway: {child.name} ended ({ending(code)}) after {lived_s:.0f} s; again in {again_s:g} s")

    def _restart(self, name: str, epoch: int) -> None:
        """The router asks for this when a worker stays stalled, or sent garbage: then nobody may use what `epoch`
        left in the pool. Only its parent can kill it without a mistake."""
        for child in self._children:
            if child.name == name:
                if epoch and self._pool >= 0:
                    distrust(self._pool, epoch, self._distrusted)
                    self._distrusted += 1
                self.say(f"headway: {name} {'sends garbage' if epoch else 'makes no step'}; killing it")
                child.kill()

    def _reread(self, wake: socket.socket, run: Path) -> None:
        """The operator changed the configuration: write it anew, and let the router look."""
        self._hangups = 0
        reader = Child("reread", [part.replace("{run}", str(run)) for part in self.plan.reread])
        reader.start(self.plan.env)
        assert reader.process is not None, "it was started"
        deadline = time.monotonic() + REREAD_S
        while reader.process.poll() is None and not self._signals and time.monotonic() < deadline:
            _wait(wake, (), READY_POLL_S)
        reader.kill()
        is_good = reader.process.returncode == 0
        self.say(f"headway: SIGHUP: the configuration was {'read again' if is_good else 'not changed'}")
        for child in self._children:
            if is_good and child.name == "router" and child.process is not None:
                child.process.send_signal(signal.SIGHUP)

    # Stop -------------------------------------------------------------------------------------------------------------

    def _drain(self, wake: socket.socket) -> None:
        """The router finishes what runs, then workers stop. A second Ctrl-C does not wait."""
        if self._is_ready:
            self.say(f"headway: draining for up to {self.plan.drain_grace_s:g} s; Ctrl-C again to stop now")
        routers = [child for child in self._children if child.name == "router"]
        workers = [child for child in self._children if child.name != "router"]
        self._stop(routers, self.plan.drain_grace_s + ERROR_S, wake)
        self._stop(workers, STOP_WORKERS_S, wake)
        self._kill_all()
        self.say("headway: stopped")

    def _stop(self, children: Sequence[Child], grace_s: float, wake: socket.socket) -> None:
        processes = [child.process for child in children if child.process is not None]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + grace_s
        while any(process.poll() is None for process in processes) and self._signals < 2:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            _wait(wake, (), left_s)

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()

    @contextlib.contextmanager
    def _signals_to_a_socket(self) -> Iterator[socket.socket]:
        """Every signal wakes select(); SIGINT and SIGTERM are counted."""

        def count(*_: object) -> None:
            self._signals += 1

        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

        def hang_up(*_: object) -> None:
            self._hangups += bool(self.plan.reread)

        stops = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        old_hangup = signal.signal(signal.SIGHUP, hang_up)
        old_child = signal.signal(signal.SIGCHLD, lambda *_: None)  # the default would not wake us
        try:
            with reader, writer:
                yield reader
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in {**stops, signal.SIGHUP: old_hangup, signal.SIGCHLD: old_child}.items():
                signal.signal(number, handler)


# The system -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pool(size: int) -> Iterator[int]:
    """Memory that all workers map and that outlives each of them; -1 for none. It has no name, so nothing can leak: it
    is gone with the last process that holds it."""
    if not size:
        yield -1
        return
    if sys.platform == "linux":
        pool = os.memfd_create("headway-pool", os.MFD_CLOEXEC)
    else:
        pool, path = tempfile.mkstemp(prefix="headway-pool-")
        os.unlink(path)
    try:
        os.ftruncate(pool, size)
        yield pool
    finally:
        os.close(pool)


def distrust(pool: int, epoch: int, number: int) -> None:
    """Make void what a worker wrote there; before its kill, which lets others adopt it."""
    os.pwrite(pool, struct.pack("<Q", epoch), DISTRUSTED_OFFSET + 8 * (number % DISTRUSTED_MAX))


def _listen(host: str, port: int, key: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with {key}") from error
    listener.listen(BACKLOG)
    return listener


def _wait(wake: socket.socket, asks: Sequence[int], timeout_s: float | None) -> list[str]:
    """Sleep until a signal, an ask or the timeout; the workers that the router wants restarted."""
    sources: list[socket.socket | int] = [wake, *asks]
    readable, _, _ = select.select(sources, (), (), None if timeout_s is None else max(0.0, timeout_s))
    if wake in readable:
        with contextlib.suppress(BlockingIOError):
            wake.recv(4096)
    return [name for fd in asks if fd in readable for name in os.read(fd, ASK_MAX_BYTES).decode().split()]
