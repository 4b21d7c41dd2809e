"""The worker process over its socket: streams, aborts, links that come, go, stall or talk nonsense, drain, faults."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import fake, wire
from engine.__main__ import _kv_dtype
from engine.config import EngineConfig
from engine.kv import keys
from engine.wire import Abort, Drain, Sampling
from tests.engine.process import FakeWorker, Peer, fake_worker
from tests.engine.rig import order, prompt

VOCAB = 49152


def expected(ids: np.ndarray, count: int) -> list[int]:
    return [fake.token(ids, index, VOCAB, (2,)) for index in range(count)]


@pytest.fixture
def worker(tmp_path: Path) -> FakeWorker:
    with fake_worker(tmp_path) as running:
        yield running


def test_it_streams_the_right_tokens_to_their_handles(worker: FakeWorker) -> None:
    peer = worker.connect()
    peer.send(*(order(handle, prompt(handle, 100), max_tokens=20) for handle in range(1, 11)))
    peer.until_ended(*range(1, 11))

    assert peer.tokens == {handle: expected(prompt(handle, 100), 20) for handle in range(1, 11)}
    assert {end.reason for end in peer.ends.values()} == {"length"}
    assert peer.starts.keys() == peer.ends.keys()


def test_an_abort_ends_the_stream_and_frees_the_blocks(worker: FakeWorker) -> None:
    peer = worker.connect()
    peer.send(order(1, prompt(1, 100), max_tokens=3000))
    peer.until(lambda: 1 in peer.starts)
    peer.send(Abort(1, "client gone"), Abort(77, "never seen"))
    peer.until_ended(1)

    assert peer.ends[1].reason == "abort"
    load = peer.loads[-1]
    assert (load.running, load.blocks_free + load.blocks_cached) == (0, peer.hello.blocks_total)


def test_an_idle_worker_still_says_that_it_lives(worker: FakeWorker) -> None:
    peer = worker.connect()
    loads = [peer.frame().load for _ in range(3)]

    assert len({load.steps for load in loads}) == 1


def test_links_have_their_own_handles_and_see_the_common_load(worker: FakeWorker) -> None:
    first, second = worker.connect(), worker.connect()
    first.send(order(1, prompt(1, 50), max_tokens=40))
    second.send(order(1, prompt(2, 50), max_tokens=40))
    first.until_ended(1)
    second.until_ended(1)

    assert first.tokens == {1: expected(prompt(1, 50), 40)}
    assert second.tokens == {1: expected(prompt(2, 50), 40)}
    assert first.loads[-1].steps > 0


def test_a_link_that_goes_takes_its_work_along_and_leaves_its_prefix(worker: FakeWorker) -> None:
    leaving, staying = worker.connect(), worker.connect()
    leaving.send(order(1, prompt(1, 100), max_tokens=3000))
    leaving.until(lambda: 1 in leaving.starts)
    leaving.close()
    staying.until(lambda: bool(staying.loads and staying.loads[-1].steps and not staying.loads[-1].running))
    staying.send(order(1, prompt(1, 100)))
    staying.until_ended(1)

    assert staying.starts[1].cached_tokens == 96


def test_a_new_link_is_told_what_is_resident(worker: FakeWorker) -> None:
    first = worker.connect()
    first.send(order(1, prompt(1, 64), salt=b"s", max_tokens=4))
    first.until_ended(1)
    second = worker.connect()

    chain = keys.chain(keys.ChainKey(second.hello.root), prompt(1, 64), second.hello.block_tokens, b"s")
    assert set(keys.split(chain)) <= set(keys.split(second.hello.cached))
    assert second.hello.epoch == first.hello.epoch


@pytest.mark.parametrize("junk", [b"\x04\x00\x00\x00junk", b"\xff\xff\xff\xff"], ids=["undecodable", "too large"])
def test_a_link_that_talks_nonsense_is_cut_and_others_go_on(worker: FakeWorker, junk: bytes) -> None:
    good, bad = worker.connect(), worker.connect()
    bad.send_raw(junk)
    bad.until_closed()
    good.send(order(1, prompt(1, 20)))
    good.until_ended(1)

    assert good.tokens[1] == expected(prompt(1, 20), 8)


def test_a_link_must_be_welcomed_first(worker: FakeWorker) -> None:
    rude = Peer(worker.path)
    rude.send(order(1, prompt(1, 20)))
    rude.until_closed()
    rude.close()

    assert not rude.tokens


def test_a_link_that_does_not_read_is_cut_and_never_slows_the_others(tmp_path: Path) -> None:
    with fake_worker(
        tmp_path, "--send-s", "3", "--slower", "0.1", "--context", "100000", "--blocks", "20000"
    ) as worker:
        deaf, good = worker.connect(), worker.connect()
        sampling = Sampling(max_tokens=90_000)
        deaf.send(*(order(handle, prompt(handle, 20), sampling=sampling) for handle in range(1, 200)))
        good.until(lambda: bool(good.loads and good.loads[-1].running))
        good.send(order(1, prompt(1, 20)))
        good.until_ended(1)
        good.until(lambda: not good.loads[-1].running)

        assert good.tokens[1] == expected(prompt(1, 20), 8)


def test_a_drained_worker_finishes_what_it_has_refuses_more_and_leaves(worker: FakeWorker) -> None:
    peer = worker.connect()
    peer.send(order(1, prompt(1, 50), max_tokens=100), Drain(20.0), order(2, prompt(2, 50)))
    peer.until_ended(1, 2)

    assert (peer.ends[1].reason, peer.ends[2].reason) == ("length", "refused")
    assert peer.tokens[1] == expected(prompt(1, 50), 100)
    peer.until_closed()
    assert worker.exit_code() == 0
    assert not worker.path.exists()


def test_a_drain_that_runs_out_of_time_aborts(worker: FakeWorker) -> None:
    peer = worker.connect()
    peer.send(order(1, prompt(1, 50), max_tokens=5000), Drain(0.2))
    peer.until_ended(1)

    assert peer.ends[1].reason == "abort"
    assert worker.exit_code() == 0


def test_sigterm_drains(worker: FakeWorker) -> None:
    peer = worker.connect()
    peer.send(order(1, prompt(1, 50), max_tokens=60))
    peer.until(lambda: 1 in peer.starts)
    worker.process.send_signal(signal.SIGTERM)
    peer.until_ended(1)

    assert peer.ends[1].reason == "length"
    assert worker.exit_code() == 0


def test_only_its_user_can_connect(worker: FakeWorker) -> None:
    assert stat.S_IMODE(worker.path.stat().st_mode) == 0o600


def test_two_workers_never_share_a_socket(worker: FakeWorker) -> None:
    command = [sys.executable, "-m", "engine", "fake", "--socket", str(worker.path), "--calibrate-s", "0"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert second.returncode == 2
    assert (
        second.stderr.splitlines()[-1]
        == f"engine: another worker listens on {worker.path}; give this one its own socket"
    )
    worker.connect()


def test_a_dead_workers_socket_is_taken_over(tmp_path: Path) -> None:
    with fake_worker(tmp_path) as first:
        first.process.kill()
        first.exit_code()
        with fake_worker(tmp_path) as second:
            assert second.connect().hello.worker == "w0"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_socket_is_left_alone_and_said(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.mkdir() if kind == "folder" else path.write_text("a file that somebody needs")
    command = [sys.executable, "-m", "engine", "fake", "--socket", str(path), "--calibrate-s", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == f"engine: {path} is there and no socket; give this worker a path of its own"
    assert path.is_dir() if kind == "folder" else path.read_text() == "a file that somebody needs"


def test_scripted_faults_happen(tmp_path: Path) -> None:
    with fake_worker(tmp_path, "--fault", "nan@2", "--fault", "foreign@4", "--fault", "bad-frame@200") as worker:
        peer = worker.connect()
        peer.send(*(order(handle, prompt(handle, 10), max_tokens=50) for handle in range(1, 4)))
        peer.until_ended(1, 2, 3)  # at step 152 at the latest
        assert sorted(end.reason for end in peer.ends.values()) == ["error", "error", "length"]

        peer.send(order(4, prompt(4, 10), max_tokens=250))
        with pytest.raises(wire.WireError, match="undecodable"):
            peer.until_ended(4)


def test_a_scripted_death_is_sudden(tmp_path: Path) -> None:
    with fake_worker(tmp_path, "--fault", "die@3") as worker:
        peer = worker.connect()
        peer.send(order(1, prompt(1, 10), max_tokens=50))
        peer.until_closed()

        assert worker.exit_code() == 9


@pytest.mark.parametrize("case", ["path", "cut", "architecture", "memory"])
def test_a_model_that_cannot_be_served_is_one_sentence_and_exit_code_2(
    case: str, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    model = {"path": "/no/such/model", "cut": tmp_path / "cut.gguf", "architecture": tmp_path, "memory": tiny_llama}[
        case
    ]
    command = [sys.executable, "-m", "engine", "worker", "--socket", str(tmp_path / "s"), "--model", str(model)]
    command += ["--cache", str(tmp_path / "cache"), "--kv-bytes", str(2**50 if case == "memory" else 2**24)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    told = [line for line in run.stderr.splitlines() if line.startswith("engine: ")]
    assert run.returncode == 2
    assert len(told) == 1
    assert "--upstream" in told[0] or case == "cut"
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--threads", "0"), "no whole number above 0"),
        (("--kv-bytes", "-1"), "no whole number above 0"),
        (("--calibrate-s", "nan"), "no number of seconds"),
        (("--device", "tpu"), "is not cpu, cuda, cuda:N or auto"),
        (("--device", "cuda:4095"), "there is no device cuda:4095 here"),
        (("--weights", "fp8"), "need a GPU"),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence_and_exit_code_2(
    option: tuple[str, str], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "engine", "worker", "--socket", str(tmp_path / "s"), "--model", str(tiny_llama)]
    run = subprocess.run([*command, *option], capture_output=True, text=True, timeout=120, check=False)

    assert run.returncode == 2
    assert said in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_kv_by_weights_of_8_bits_has_other_keys() -> None:
    plain = EngineConfig("", device="cuda:0")
    parts = replace(plain, tensor_parallel=2)
    both = (replace(config, weights=weights) for config in (plain, parts) for weights in ("bf16", "fp8"))

    assert len({keys.root("model", kv_dtype=_kv_dtype(config)) for config in both}) == 4


@pytest.mark.parametrize(
    ("order", "code", "said"),
    [
        (("--policy", "static-512"), 0, ""),
        (("--policy", "nobody"), 2, "no engine policy is called 'nobody'"),
        (("--weights", "/tmp"), 2, "cannot change its weights"),
        (("--sleep", "1"), 2, "cannot sleep"),
        (("--wake",), 0, ""),
    ],
)
def test_a_running_worker_is_told_and_answers(order: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    with fake_worker(tmp_path) as worker:
        command = [sys.executable, "-m", "engine", "tell", "--socket", str(worker.path), *order]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert run.returncode == code
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_nobody_at_the_socket_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine", "tell", "--socket", str(tmp_path / "s"), "--policy", "headway"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert run.returncode == 2
    assert "did not answer" in run.stderr


def test_a_fault_nobody_knows_is_explained(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine", "fake", "--socket", str(tmp_path / "s"), "--fault", "fire@x"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert run.returncode == 2
    assert "KIND@STEP" in run.stderr
    assert "Traceback" not in run.stderr
