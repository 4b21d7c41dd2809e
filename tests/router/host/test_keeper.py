"""The keeper: what it starts, what it brings back, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.kv.pool import DISTRUSTED_MAX, EXTENT_SLOTS, PoolShape, attach
from router.host.banner import banner
from router.host.child import HEALTHY_S, RESTART_MAX_S, Child
from router.host.keeper import distrust
from tests.router.stage import DEAF_ROUTER, WORKER

DEADLINE_S = 120.0  # of each wait; nothing here takes a tenth of it on two busy cores


class Stage:
    """A running keeper, its printed lines and its children's process ids."""

    def __init__(self, directory: Path, **changes: object) -> None:
        self.directory = directory
        self._printed = (directory / "printed").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.router.stage", str(directory), json.dumps(changes)],
            stdout=self._printed,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "XDG_RUNTIME_DIR": str(directory)},
        )

    def text(self) -> str:
        return (self.directory / "printed").read_text()

    def until_said(self, words: str) -> str:
        until(lambda: words in self.text(), f"{words!r} is said in {self.text()!r}")
        return self.text()

    def pids(self, name: str) -> list[int]:
        path = self.directory / name
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def all_pids(self) -> list[int]:
        return self.pids("w0") + self.pids("router")

    def ask(self, path: str) -> None:
        address = re.search(r"http://127\.0\.0\.1:\d+", self.text())
        assert address is not None
        with urllib.request.urlopen(address[0] + path, timeout=DEADLINE_S) as answer:
            answer.read()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._printed.close()


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Killed children of a killed keeper belong to whoever reaps here; until then they are zombies.
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@contextmanager
def stage(directory: Path, **changes: object) -> Iterator[Stage]:
    running = Stage(directory, **changes)
    try:
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with stage(tmp_path) as keeper:
        text = keeper.until_said("Ctrl-C drains and stops.")
        assert list(tmp_path.glob("headway-*/config.json"))

        keeper.process.send_signal(number)

        assert keeper.process.wait(DEADLINE_S) == 0
        assert "chatbot+          first token 1.5 s" in text
        assert len(keeper.all_pids()) == 2
        assert not any(map(is_alive, keeper.all_pids()))
        assert not list(tmp_path.glob("headway-*"))
        assert keeper.text().endswith("headway: stopped\n")


@pytest.mark.parametrize("name", ["w0", "router"])
def test_a_child_that_is_killed_comes_back(tmp_path: Path, name: str) -> None:
    with stage(tmp_path) as keeper:
        keeper.until_said("Ctrl-C drains")

        os.kill(keeper.pids(name)[0], signal.SIGKILL)

        keeper.until_said(f"headway: {name} ended (SIGKILL)")
        until(lambda: len(keeper.pids(name)) == 2, f"{name} runs again")
        keeper.ask("/readyz")


def test_a_router_may_ask_for_the_death_of_a_stalled_worker(tmp_path: Path) -> None:
    with stage(tmp_path) as keeper:
        keeper.until_said("Ctrl-C drains")
        os.kill(keeper.pids("w0")[0], signal.SIGSTOP)

        keeper.ask("/stall")

        until(lambda: len(keeper.pids("w0")) == 2, "w0 runs again")
        assert not is_alive(keeper.pids("w0")[0])


def test_a_router_may_ask_for_the_death_of_a_worker_that_sends_garbage(tmp_path: Path) -> None:
    with stage(tmp_path) as keeper:
        keeper.until_said("Ctrl-C drains")

        keeper.ask("/garble")

        keeper.until_said("w0 sends garbage; killing it")
        until(lambda: len(keeper.pids("w0")) == 2, "w0 runs again")


def test_the_keeper_makes_void_what_workers_then_take_for_void() -> None:
    shape = PoolShape(block_tokens=4, slot_bytes=64, slots=EXTENT_SLOTS)
    pool = os.memfd_create("pool")
    os.ftruncate(pool, shape.total_bytes)
    memory = attach(pool, shape.block_tokens, shape.slot_bytes)

    for number in range(DISTRUSTED_MAX + 1):
        distrust(pool, 1000 + number, number)

    told = [epoch for epoch in range(990, 1100) if memory.distrusts(epoch)]
    assert told == list(range(1001, 1001 + DISTRUSTED_MAX))  # the oldest made room
    memory.close()
    os.close(pool)


def test_a_second_signal_does_not_wait_for_the_drain(tmp_path: Path) -> None:
    with stage(tmp_path, drain_grace_s=3600.0, commands={"router": [DEAF_ROUTER, "router"]}) as keeper:
        keeper.until_said("Ctrl-C drains")
        keeper.process.terminate()
        keeper.until_said("draining for up to 3600 s")

        keeper.process.terminate()

        assert keeper.process.wait(DEADLINE_S) == 0
        assert not any(map(is_alive, keeper.all_pids()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a killed parent")
def test_children_die_with_a_killed_keeper(tmp_path: Path) -> None:
    with stage(tmp_path) as keeper:
        keeper.until_said("Ctrl-C drains")

        keeper.process.kill()
        keeper.process.wait()

        until(lambda: not any(map(is_alive, keeper.all_pids())), "children are gone")


@pytest.mark.parametrize(
    ("commands", "words", "code"),
    [
        ({"prepare": ["raise SystemExit(3)"]}, "the model could not be prepared (exit code 3)", 1),
        ({"prepare": ["raise SystemExit(2)"]}, "the model could not be prepared (exit code 2)", 2),
        ({"worker": ["raise SystemExit(4)"], "router": [WORKER, "router"]}, "w0 cannot start (exit code 4)", 1),
        ({"worker": ["raise SystemExit(2)"], "router": [WORKER, "router"]}, "w0 cannot start (exit code 2)", 2),
    ],
)
def test_what_cannot_start_is_said_and_nothing_is_left(tmp_path: Path, commands: object, words: str, code: int) -> None:
    with stage(tmp_path, commands=commands) as keeper:
        assert keeper.process.wait(DEADLINE_S) == code

        assert words in keeper.text()
        assert ("again in" in keeper.text()) == ("exit code 4" in words), "bad settings are not tried again"
        assert not any(map(is_alive, keeper.all_pids()))


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with stage(tmp_path, port=port) as keeper:
            assert keeper.process.wait(DEADLINE_S) == 1

    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --port" in keeper.text()
    assert keeper.all_pids() == []


def test_restarts_wait_longer_each_time_up_to_a_bound_and_forget_after_a_healthy_minute() -> None:
    child = Child("w0", [sys.executable, "-c", "pass"])
    delays, now = [], 1000.0
    for _ in range(9):
        child.start(os.environ)
        assert child.process is not None
        child.process.wait()
        child.started_at = now
        child.ended(now)
        delays.append(child.start_at - now)
    child.start(os.environ)
    assert child.process is not None
    child.process.wait()
    child.started_at = now - HEALTHY_S - 1

    code = child.ended(now)

    assert delays == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, RESTART_MAX_S, RESTART_MAX_S]
    assert code == 0
    assert child.start_at - now == 0.25


def test_it_needs_nothing_but_the_standard_library() -> None:
    root = Path(__file__).resolve().parents[3]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import router.host.keeper"

    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, timeout=DEADLINE_S)


def test_the_banner_shows_address_curl_and_budgets() -> None:
    budgets = {
        "chatbot+": {
            "ttft_s": 1.0,
            "ttft_s_per_new_token": 0.0031,
            "tpot_s": 0.05,
            "tpot_s_per_prompt_token": 25e-6,
            "deadline_s": None,
        },
        "data-processor": {"ttft_s": None, "tpot_s": None, "deadline_s": 900.0},
    }

    text = banner(("127.0.0.1", 8080), 8081, {"model": "smollm2", "budgets": budgets, "needs_key": False})

    assert "Headway serves smollm2 at http://127.0.0.1:8080" in text
    assert "curl http://127.0.0.1:8080/v1/chat/completions" in text
    assert "chatbot+          first token 1 s + 3.1 ms per new prompt token" in text
    assert "per output token 50 ms + 25 us per prompt token" in text
    assert "data-processor    whole answer 900 s" in text
