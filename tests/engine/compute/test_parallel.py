"""A model over several ranks says what it says on one: by threads for every family, by processes for the whole way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engine.compute import parallel, parts
from engine.compute.crew import Crew
from engine.compute.runner import RunnerConfig, TorchRunner
from engine.config import EngineConfig
from engine.kv.copies import Inline
from engine.kv.disk import Disk
from engine.kv.link import Way
from engine.kv.pool import EXTENT_SLOTS, PoolShape, PoolWriter, attach
from engine.loading import weights
from engine.models import config as model_config
from engine.models.config import ModelError
from engine.models.pages import KVPool
from engine.models.shard import Shard
from engine.step import ModelFacts
from engine.wire import Sampling
from tests.engine import test_equivalence as equivalence
from tests.engine import tiny
from tests.engine.driver import Blocks, advance, batch_of, generate
from tests.engine.process import Peer
from tests.engine.rig import Rig, order

SIZE = 4
KV_BYTES = 2**20
OPTIONS = RunnerConfig(block_tokens=SIZE, kv_bytes=KV_BYTES)
CPU = torch.device("cpu")
PROMPT = list(range(20, 61))
DEADLINE_S = 120.0
NEW = 16
GAP_MAX = 1e-3  # of two logits: sums in another order differ by 1e-5


class Meeting:
    """Ranks as threads: each waits for all, and adds their parts in the same order."""

    def __init__(self, ranks: int) -> None:
        self._parts: list[torch.Tensor] = [torch.empty(0)] * ranks
        self._barrier = threading.Barrier(ranks, timeout=DEADLINE_S)

    def summed(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(part: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = part
            self._barrier.wait()
            total = sum(self._parts[1:], self._parts[0])
            self._barrier.wait()
            return total

        return add


@contextmanager
def by_threads(folder: Path, ranks: int) -> Iterator[TorchRunner]:
    """Rank 0, whose steps the others follow."""
    meeting, part = Meeting(ranks), replace(OPTIONS, kv_bytes=KV_BYTES // ranks)
    decoders = [
        replace(weights.load(folder, torch.float32, CPU, Shard(rank, ranks)), summed=meeting.summed(rank))
        for rank in range(ranks)
    ]
    with ThreadPoolExecutor(ranks) as pool:
        others = [TorchRunner(decoder, part) for decoder in decoders[1:]]
        first = TorchRunner(decoders[0], part)
        first.lead(lambda batch: [pool.submit(other.follow, batch) for other in others])
        yield first


@pytest.mark.parametrize("family", [*tiny.FAMILIES])
def test_each_family_says_the_same_in_two_parts(family: str, tmp_path: Path) -> None:
    tiny.save(family, tmp_path)
    whole = TorchRunner.load(tmp_path, OPTIONS)
    batch = batch_of([(Blocks(whole.blocks_total, SIZE).start(PROMPT, 1), len(PROMPT))], SIZE)
    wanted = whole.logits(batch)

    with torch.inference_mode(), by_threads(tmp_path, 2) as parts:
        assert parts.blocks_total == whole.blocks_total  # a block's part is as much smaller as its memory
        torch.testing.assert_close(parts.logits(batch), wanted, rtol=1e-4, atol=1e-4)
        texts = [generate(one, Blocks(one.blocks_total, SIZE), PROMPT, 16, [7, 12]) for one in (parts, whole)]
    assert texts[0] == texts[1]


def test_the_parts_are_the_whole(tmp_path: Path) -> None:
    """q, k and v go by heads, gate and up by rows; o and down go by columns, and one rank alone adds their bias."""
    tiny.save("llama-biases", tmp_path)
    whole, first, second = (
        weights.load(tmp_path, torch.float64, CPU, shard) for shard in (Shard(), Shard(0, 2), Shard(1, 2))
    )
    layer, parts = whole.layers[1], (first.layers[1], second.layers[1])
    q, k, v = layer.qkv.weight.split([48, 16, 16])

    for rank, part in enumerate(parts):
        wanted = torch.cat([each.chunk(2)[rank] for each in (q, k, v)])
        assert torch.equal(part.qkv.weight, wanted)
    assert torch.equal(torch.cat([part.out.weight for part in parts], 1), layer.out.weight)
    assert torch.equal(torch.cat([part.mlp.down.weight for part in parts], 1), layer.mlp.down.weight)
    assert torch.equal(parts[0].out.bias, layer.out.bias)
    assert parts[1].out.bias is None


@pytest.mark.parametrize(("ranks", "said"), [(4, "6 query heads"), (3, "2 key heads"), (16, "divided by 16")])
def test_what_cannot_be_divided_is_refused(ranks: int, said: str, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=said):
        Shard(0, ranks).config(model_config.read(tiny_llama))


@contextmanager
def by_processes(folder: Path, where: Path, ranks: int, **options: int) -> Iterator[parallel.ParallelRunner]:
    config = EngineConfig(socket=str(where / "w.sock"), tensor_parallel=ranks, **options)
    with parallel.started(folder, config) as runner:
        yield runner


def story(device: TorchRunner | parallel.ParallelRunner) -> dict[int, list[int]]:
    """Twelve requests that arrive in turn, of which some must give way: more is asked for than there are blocks."""
    model = device.model
    facts = ModelFacts("tiny", "digest", "cpu", "float32", model.vocab_size, model.context_max, tuple(model.eos_ids))
    rig = Rig(device=device, facts=facts, block_tokens=SIZE)
    for handle in range(1, 13):
        ids = np.random.default_rng(handle).integers(6, 211, 20 + 9 * handle).astype(np.int32)
        heat = 0.0 if handle % 3 else 0.9
        rig.submit(order(handle, ids, sampling=Sampling(temperature=heat, seed=7, max_tokens=30, ignore_eos=True)))
        for _ in range(3):
            rig.step()
    rig.abort(5)
    rig.run()
    return rig.tokens


def test_processes_tell_the_story_of_one(tiny_llama: Path, tmp_path: Path) -> None:
    blocks = 160
    whole = TorchRunner.load(tiny_llama, OPTIONS)
    kv_bytes = (blocks + 2) * whole.kv.block_bytes
    wanted = story(TorchRunner.load(tiny_llama, replace(OPTIONS, kv_bytes=kv_bytes)))

    with by_processes(tiny_llama, tmp_path, 2, block_tokens=SIZE, kv_bytes=kv_bytes) as runner:
        assert (runner.blocks_total, runner.kv.block_bytes) == (blocks, whole.kv.block_bytes)
        assert story(runner) == wanted
    assert list(tmp_path.iterdir()) == []


def pool_of(block_bytes: int, extents: int) -> int:
    """A descriptor of a pool's memory, as the keeper makes it."""
    pool = os.memfd_create("pool")
    os.ftruncate(pool, PoolShape(SIZE, block_bytes, extents * EXTENT_SLOTS).total_bytes)
    return pool


def test_kv_in_parts_comes_back_from_the_pool_and_from_disk(tiny_llama: Path, tmp_path: Path) -> None:
    """Each rank copies its own part; what a disk holds lies in no memory that both have, and is sent."""
    greedy, blocks = equivalence.SAMPLINGS[0], 40
    cold = equivalence.rig_of(tiny_llama)
    wanted = equivalence.answer(cold, 1, greedy)
    block_bytes = cold.runner.kv.block_bytes
    pool, kv_bytes = pool_of(block_bytes, 2), (blocks + 2) * block_bytes
    disk = Disk(tmp_path / "disk", 1000 * block_bytes, block_bytes, Inline())
    with by_processes(tiny_llama, tmp_path, 2, block_tokens=SIZE, kv_bytes=kv_bytes, pool_fd=pool) as runner:
        memory = attach(pool, SIZE, block_bytes)
        runner.kv.share(memory.span(range(memory.shape.slots)), memory.shape.payload_offset)
        facts = ModelFacts("tiny", "digest", "cpu", "float32", 211, 512, (5,))
        rig = Rig(device=runner, facts=facts, block_tokens=SIZE, host=PoolWriter(memory, 2), disk=disk)
        texts = [equivalence.answer(rig, 1, greedy)]
        equivalence.push_out(rig)
        texts.append(equivalence.answer(rig, 2, greedy))
        restored = rig.tiers.load().restored_host
        equivalence.push_out(rig, rounds=3)
        texts.append(equivalence.answer(rig, 3, greedy))

    assert texts == [wanted] * 3
    assert (restored, rig.tiers.load().restored_disk) == (15, 15)


def test_a_part_that_cannot_be_copied_fails_its_copy_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second rank of fewer blocks; behind the failure its answers belong to their questions again."""
    model, pool = Shard(0, 2).config(model_config.read(tiny_llama)), pool_of(0, 1)
    first, second = (KVPool(model, count, SIZE, torch.float32, CPU) for count in (9, 3))
    first.memory.fill_(1.0)
    second.memory.fill_(2.0)
    links = {way: Pipe() for way in Way}
    for way, (_, theirs) in links.items():
        threading.Thread(target=parts.serve, args=(theirs, way, second, Shard(1, 2), pool), daemon=True).start()
    lost: list[str] = []
    memory = parts.PartsMemory(first, {way: [ours] for way, (ours, _) in links.items()}, lost.append)
    payload = np.zeros(memory.block_bytes, np.uint8)  # not the pool's: parts to load are sent, and saved ones lost

    with pytest.raises(OSError, match="index 7 is out of bounds"):
        memory.load([7], [payload], None)()
    with pytest.raises(IndexError):
        memory.load([50], [payload], None)
    memory.load([2, 1], [payload, payload], memory.fence())()
    silent = Pipe()
    memory._links = {Way.UP: [silent[0]]}
    with monkeypatch.context() as patched:
        patched.setattr(parts, "ANSWER_S", 0.01)
        with pytest.raises(OSError, match="lost"):
            memory.load([2], [payload], None)()
    for ours, _ in links.values():
        ours.close()

    assert lost == ["a rank of tensor parallel copied nothing in 0 s"]
    assert not any(pool.memory[block].any() for pool in (first, second) for block in (1, 2))
    assert (first.memory[3].min(), second.memory[3].min()) == (1.0, 2.0)


def together(runner: TorchRunner | parallel.ParallelRunner, prompts: list[list[int]]) -> list[list[int]]:
    """All at once, prompts in one step."""
    blocks = Blocks(runner.blocks_total, runner.block_tokens)
    running = [blocks.start(prompt, NEW) for prompt in prompts]
    for _ in range(NEW):
        advance(runner, [(one, len(one.ids) - one.computed) for one in running])
    return [one.output for one in running]


@pytest.mark.model
def test_the_embedded_model_in_three_parts_says_what_it_says_whole(
    embedded_folder: Path, embedded_runner: TorchRunner, tmp_path: Path
) -> None:
    """It has nine heads and three of keys. Where sums in another order change a token, two were as good as equal."""
    tokenizer = Tokenizer.from_file(str(embedded_folder / "tokenizer.json"))
    texts = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village", "1, 2, 3, 4,")
    prompts = [tokenizer.encode(text).ids for text in texts]
    wanted = together(embedded_runner, prompts)
    with by_processes(embedded_folder, tmp_path, 3, block_tokens=16, kv_bytes=48 * 2**20) as runner:
        said = together(runner, prompts)

    differences = []
    for prompt, own, others in zip(prompts, said, wanted, strict=True):
        if own != others:
            at = next(at for at in range(NEW) if own[at] != others[at])
            one = Blocks(embedded_runner.blocks_total, 16).start(prompt + others[:at], 1)
            logits = embedded_runner.logits(batch_of([(one, len(one.ids))], 16))[0]
            differences.append(float(logits[others[at]] - logits[own[at]]))
    assert all(gap < GAP_MAX for gap in differences)
    assert len(differences) <= 1


# The worker and its ranks as processes -------------------------------------------------------------------------------


class Worker:
    """`python -m engine worker` over two ranks."""

    def __init__(self, model: Path, where: Path, *more: str) -> None:
        self.path = where / "w.sock"
        command = [sys.executable, "-m", "engine", "worker", "--model", str(model), "--socket", str(self.path)]
        command += ["--calibrate-s", "0", "--block-tokens", "4", "--kv-bytes", str(KV_BYTES), *more]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._peers: list[Peer] = []

    def peer(self) -> Peer:
        """A link, once it listens."""
        until = time.monotonic() + DEADLINE_S
        while not self._is_listening():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.05)
        self._peers.append(Peer(self.path).welcome())
        return self._peers[-1]

    def _is_listening(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(os.fspath(self.path)) == 0

    def ranks(self) -> list[int]:
        """Processes that it started."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def ended(self) -> tuple[int, str]:
        """Exit code and what it said."""
        for peer in self._peers:
            peer.close()
        said = self.process.communicate(timeout=DEADLINE_S)[1]
        return self.process.returncode, said


@pytest.fixture
def worker(tiny_llama: Path, tmp_path: Path) -> Iterator[Worker]:
    running = Worker(tiny_llama, tmp_path, "--tensor-parallel", "2")
    try:
        yield running
    finally:
        running.process.kill()
        running.ended()


def gone(pid: int) -> bool:
    """Within the deadline."""
    until = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")


@needs_proc
def test_a_worker_serves_over_two_ranks_and_drains(worker: Worker, tiny_llama: Path) -> None:
    peer = worker.peer()
    ids = np.array(PROMPT, np.int32)
    peer.send(order(1, ids, sampling=Sampling(temperature=0.0, max_tokens=16, ignore_eos=True)))
    peer.until_ended(1)
    (rank,) = worker.ranks()
    worker.process.send_signal(signal.SIGTERM)

    one = TorchRunner.load(tiny_llama, OPTIONS)
    assert peer.tokens[1] == generate(one, Blocks(one.blocks_total, SIZE), PROMPT, 16)
    assert peer.hello.device == "cpu x1, 2 ranks"
    assert worker.ended()[0] == 0
    assert gone(rank)


@needs_proc
def test_a_rank_that_dies_takes_its_worker_down(worker: Worker) -> None:
    worker.peer()
    (rank,) = worker.ranks()
    os.kill(rank, signal.SIGKILL)

    code, said = worker.ended()
    assert code == 1
    assert "rank 1 of tensor parallel has ended with code -9; this worker ends with it" in said


@needs_proc
def test_a_worker_that_is_killed_takes_its_ranks_along(worker: Worker) -> None:
    worker.peer()
    (rank,) = worker.ranks()
    worker.process.kill()

    assert gone(rank)


def test_a_rank_that_does_not_answer_is_a_loss(tiny_llama: Path, tmp_path: Path) -> None:
    lost: list[str] = []
    config = EngineConfig(socket=str(tmp_path / "w.sock"), tensor_parallel=2)
    waits = parallel.Member(tiny_llama, config, Shard(1, 2), tmp_path / "meeting")  # nobody comes to meet it
    crew = Crew([waits], lost.append)
    try:
        with crew.answering(0.0):
            until = time.monotonic() + DEADLINE_S
            while not lost and time.monotonic() < until:
                time.sleep(0.01)
    finally:
        crew.close()

    assert lost == ["the ranks of tensor parallel do not answer in time"]


def test_a_rank_that_does_not_end_is_killed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.compute.crew.END_S", 0.1)
    config = EngineConfig(socket=str(tmp_path / "w.sock"), tensor_parallel=2)
    crew = Crew([parallel.Member(tiny_llama, config, Shard(1, 2), tmp_path / "meeting")])
    (process,) = crew._processes
    process.send_signal(signal.SIGSTOP)
    crew.close()

    assert process.returncode == -signal.SIGKILL


def test_a_model_that_cannot_be_divided_ends_the_command_with_a_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    code, said = Worker(tiny_llama, tmp_path, "--tensor-parallel", "4").ended()

    assert code == 2
    assert said.endswith("engine: 6 query heads cannot be divided by 4 for tensor parallel\n")


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="there are cards enough")
def test_too_few_cards_end_the_command_with_a_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    code, said = Worker(tiny_llama, tmp_path, "--device", "cuda", "--tensor-parallel", "2").ended()

    assert code == 2
    assert "engine: --tensor-parallel 2 from cuda:0 on needs more cards than the" in said
