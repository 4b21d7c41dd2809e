"""One property, many ways: in float32 a greedy or seeded answer is the same tokens, however its KV came to be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from engine.compute.runner import RunnerConfig, TorchRunner
from engine.kv.copies import Inline
from engine.kv.disk import Disk
from engine.kv.keys import Ids
from engine.kv.pool import EXTENT_SLOTS, PoolShape, PoolWriter, attach
from engine.scheduling.scheduler import SchedulerLimits
from engine.step import ModelFacts
from engine.wire import Sampling
from policies.step_plan import PlanLimits
from tests.engine import tiny
from tests.engine.loop import Loop
from tests.engine.rig import BATCH, CHAT, Rig, order

SIZE = 4
NEW = 40
FULL_BLOCKS = 25  # of prompt and answer: the last token's KV is never computed
SAMPLINGS = (
    Sampling(temperature=0.0, max_tokens=NEW, ignore_eos=True),
    Sampling(temperature=0.9, top_p=0.95, seed=11, max_tokens=NEW, ignore_eos=True),
)


def prompt_of(seed: int, tokens: int) -> Ids:
    return np.random.default_rng(seed).integers(6, 211, tokens).astype(np.int32)


PROMPT = prompt_of(1, 61)


def runner_of(folder: Path, blocks: int) -> TorchRunner:
    block_bytes = TorchRunner.load(folder, RunnerConfig(block_tokens=SIZE, kv_bytes=2**20)).kv.block_bytes
    return TorchRunner.load(folder, RunnerConfig(block_tokens=SIZE, kv_bytes=(blocks + 2) * block_bytes))


def facts_of(runner: TorchRunner) -> ModelFacts:
    model = runner.model
    return ModelFacts("tiny", "digest", "cpu", "float32", model.vocab_size, model.context_max, tuple(model.eos_ids))


def rig_of(folder: Path, blocks: int = 200, *, pool: int = -1, extents: int = 4, **options: Any) -> Rig:
    """A scheduler on the tiny model, with a pool below it."""
    runner = runner_of(folder, blocks)
    kv, facts = runner.kv, facts_of(runner)
    if pool < 0:
        pool = os.memfd_create("pool")
        os.ftruncate(pool, PoolShape(SIZE, kv.block_bytes, extents * EXTENT_SLOTS).total_bytes)
    host = PoolWriter(attach(pool, SIZE, kv.block_bytes), extents)
    return Rig(device=runner, facts=facts, block_tokens=SIZE, host=host, **options)


def ask(rig: Rig, handle: int, sampling: Sampling, ids: Ids = PROMPT, **options: Any) -> None:
    rig.submit(order(handle, ids, sampling=sampling, **options))


def answer(rig: Rig, handle: int, sampling: Sampling) -> list[int]:
    """Alone, to its end."""
    ask(rig, handle, sampling)
    rig.run()
    return rig.tokens[handle]


def push_out(rig: Rig, rounds: int = 1) -> None:
    """Fill the device's cache with other prompts, until nothing of PROMPT is left there."""
    for number in range(100, 100 + rounds * (rig.trie.blocks_total // 12 + 2)):
        ask(rig, number, Sampling(temperature=0.0, max_tokens=2), prompt_of(number, 60))
        rig.run()
    assert rig.trie.match(PROMPT.tobytes(), b"", 0) == []


def kv_of(rig: Rig, tokens: list[int]) -> list[bytes]:
    """The KV of all full blocks of PROMPT and an answer that lie on the device."""
    known = np.concatenate((PROMPT, np.array(tokens, dtype=np.int32)))
    found, kv = rig.trie.match(known.tobytes(), b"", 0), rig.runner.kv
    assert kv is not None
    payloads = [np.empty(kv.block_bytes, dtype=np.uint8) for _ in found]
    kv.save([block.id for block in found], payloads)()
    return [payload.tobytes() for payload in payloads]


@pytest.fixture(scope="module", params=SAMPLINGS, ids=["greedy", "seeded"])
def sampling(request: pytest.FixtureRequest) -> Sampling:
    chosen: Sampling = request.param
    return chosen


@pytest.fixture(scope="module")
def cold(tiny_llama: Path, sampling: Sampling) -> tuple[list[int], list[bytes]]:
    """The answer computed in one go, and its KV."""
    rig = rig_of(tiny_llama)
    tokens = answer(rig, 1, sampling)
    assert rig.starts[1].cached_tokens == 0
    kv = kv_of(rig, tokens)
    assert len(kv) == FULL_BLOCKS
    return tokens, kv


Cold = tuple[list[int], list[bytes]]


def test_warm(tiny_llama: Path, sampling: Sampling, cold: Cold) -> None:
    rig = rig_of(tiny_llama)
    answer(rig, 1, sampling)
    assert answer(rig, 2, sampling) == cold[0]
    assert rig.starts[2].cached_tokens == 60
    assert kv_of(rig, cold[0]) == cold[1]


def test_among_thirty_one_others(tiny_llama: Path, sampling: Sampling, cold: Cold) -> None:
    """Products and attention of 32 rows round otherwise than those of one, and still choose the same tokens."""
    rig = rig_of(tiny_llama, blocks=1000)
    for number in range(31):
        ask(rig, 10 + number, replace(sampling, max_tokens=60), prompt_of(10 + number, 20 + number))
    assert answer(rig, 1, sampling) == cold[0]
    assert max(len(step.sampled) for step in rig.steps) == 32


def test_speculated(tiny_llama: Path, sampling: Sampling, cold: Cold) -> None:
    """Words that stood in the prompt before are drafted; what of them is wrong leaves no trace."""
    runner = runner_of(tiny_llama, 200)
    facts, repeated = facts_of(runner), np.concatenate((PROMPT, np.array(cold[0], dtype=np.int32), PROMPT))
    plain, drafting = Loop(runner, facts, SIZE), Loop(runner, facts, SIZE, has_drafts=True)
    assert drafting.ask(PROMPT.tolist(), sampling).ids == cold[0]
    assert drafting.ask(repeated.tolist(), sampling).ids == plain.ask(repeated.tolist(), sampling).ids
    speculator = drafting.core._speculator
    assert speculator is not None
    assert speculator.right > 0 or sampling.temperature > 0.0  # chance repeats too little of such a short text


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 30])
def test_chunked(tiny_llama: Path, sampling: Sampling, cold: Cold, rows: int) -> None:
    rig = rig_of(tiny_llama, plan_limits=PlanLimits(rows_max=rows, quantum_tokens=1))
    assert answer(rig, 1, sampling) == cold[0]
    assert max(int(step.tokens.max()) for step in rig.steps) <= rows


def test_preempted_and_resumed(tiny_llama: Path, sampling: Sampling, cold: Cold) -> None:
    """Chats take the memory twice while the answer is on its way; what they leave of its KV comes from the pool."""
    limits = SchedulerLimits(preempt_cooldown_s=0.0)
    rig = rig_of(tiny_llama, blocks=32, limits=limits)
    ask(rig, 1, sampling, cls=BATCH)
    while len(rig.tokens.get(1, [])) < 13:
        rig.step()
    for number in range(2, 8):
        ask(rig, number, Sampling(temperature=0.0, max_tokens=4), prompt_of(number, 110), cls=CHAT, first_left_s=0.0)
    rig.run()
    assert rig.scheduler.room.preemptions >= 1
    assert rig.tiers.load().restored_host > 0
    assert rig.tokens[1] == cold[0]
    assert kv_of(rig, cold[0])[:15] == cold[1][:15]


def test_parked_and_back(tiny_llama: Path, sampling: Sampling, cold: Cold) -> None:
    """Nobody reads its link; a batch job, less urgent, may take its memory. Read again, the stream goes on."""
    rig = rig_of(tiny_llama, blocks=32)
    ask(rig, 1, sampling, cls=CHAT)
    while len(rig.tokens.get(1, [])) < 13:
        rig.step()
    rig.submit(order(2, prompt_of(2, 110), cls=BATCH, max_tokens=4), link=2)
    while 2 not in rig.ends:
        rig.step(full_links=frozenset({1}))
    told = rig.scheduler.load(rig.now, 0.0, 0)
    assert (told.parks, told.preemptions) == (1, 0)
    assert len(rig.tokens[1]) == 13
    rig.run()
    assert rig.tiers.load().restored_host > 0
    assert rig.tokens[1] == cold[0]
    assert kv_of(rig, cold[0])[:15] == cold[1][:15]


@pytest.mark.parametrize("level", [1, 2], ids=["kv", "weights"])
def test_slept_and_woke(tiny_llama: Path, sampling: Sampling, cold: Cold, level: int) -> None:
    """In mid-answer the device's KV goes, and the weights; the answer goes on behind its tokens, from the pool."""
    rig = rig_of(tiny_llama)
    ask(rig, 1, sampling)
    while len(rig.tokens.get(1, [])) < 13:
        rig.step()
    rig.scheduler.sleep(rig.now)
    rig.runner.sleep(level)
    assert rig.trie.counts().free == rig.trie.blocks_total
    rig.runner.wake()()
    rig.scheduler.wake()
    rig.run()
    assert rig.tiers.load().restored_host == 72 // SIZE
    assert rig.tokens[1] == cold[0]
    assert kv_of(rig, cold[0])[:15] == cold[1][:15]


def test_restored_from_the_host_pool(tiny_llama: Path, sampling: Sampling, cold: Cold) -> None:
    rig = rig_of(tiny_llama, blocks=40)
    assert answer(rig, 1, sampling) == cold[0]
    push_out(rig)
    assert answer(rig, 2, sampling) == cold[0]
    assert rig.starts[2].cached_tokens == 60
    assert rig.tiers.load().restored_host == 15
    assert kv_of(rig, cold[0])[:15] == cold[1][:15]


def test_restored_from_disk(tiny_llama: Path, sampling: Sampling, cold: Cold, tmp_path: Path) -> None:
    block_bytes = runner_of(tiny_llama, 1).kv.block_bytes
    disk = Disk(tmp_path, 1000 * block_bytes, block_bytes, Inline())
    rig = rig_of(tiny_llama, blocks=40, extents=1, disk=disk)
    answer(rig, 1, sampling)
    push_out(rig, rounds=2)
    assert answer(rig, 2, sampling) == cold[0]
    assert rig.tiers.load().restored_disk == 15
    assert kv_of(rig, cold[0])[:15] == cold[1][:15]


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen2", "qwen3", "llama3-rope"])
def test_other_families_on_the_same_ways(family: str, tmp_path: Path) -> None:
    """In chunks, among others, and from the host pool: experts, biases and norms of a row depend on that row alone."""
    tiny.save(family, tmp_path)
    greedy = SAMPLINGS[0]
    cold = answer(rig_of(tmp_path), 1, greedy)
    assert answer(rig_of(tmp_path, plan_limits=PlanLimits(rows_max=7, quantum_tokens=1)), 1, greedy) == cold

    rig = rig_of(tmp_path)
    for number in range(2, 8):
        ask(rig, number, greedy, prompt_of(number, 20 + number))
    assert answer(rig, 1, greedy) == cold

    rig = rig_of(tmp_path, blocks=40)
    answer(rig, 1, greedy)
    push_out(rig)
    assert answer(rig, 2, greedy) == cold
    assert rig.tiers.load().restored_host == 15


def test_a_turn_that_continues_an_answer_restores_the_answer_as_well(
    tiny_llama: Path, sampling: Sampling, cold: Cold
) -> None:
    """An agent's next prompt holds its last answer: decode blocks come back like prompt blocks, bit for bit."""
    rig = rig_of(tiny_llama, blocks=40)
    tokens = answer(rig, 1, sampling)
    push_out(rig)
    known = np.concatenate((PROMPT, np.array(tokens, dtype=np.int32), prompt_of(9, 10)))
    ask(rig, 2, Sampling(temperature=0.0, max_tokens=2), known)
    rig.run()
    assert rig.starts[2].cached_tokens == FULL_BLOCKS * SIZE
    assert kv_of(rig, tokens) == cold[1]


VICTIM = """
import os, signal, sys
from pathlib import Path
from tests.engine.test_equivalence import SAMPLINGS, ask, kv_of, rig_of
rig = rig_of(Path(sys.argv[1]), pool=int(sys.argv[2]))
ask(rig, 1, SAMPLINGS[int(sys.argv[3])])
while len(rig.tokens.get(1, [])) < 20:
    rig.step()
print(*rig.tokens[1])
print(*(payload.hex() for payload in kv_of(rig, rig.tokens[1])[:19]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_resumed_by_another_worker_after_the_first_was_killed(tiny_llama: Path, sampling: Sampling, cold: Cold) -> None:
    """The first dies in mid-answer; the second gets what was sent, finds the KV of it in the pool, and goes on."""
    block_bytes = runner_of(tiny_llama, 1).kv.block_bytes
    pool = os.memfd_create("pool")
    os.ftruncate(pool, PoolShape(SIZE, block_bytes, 4 * EXTENT_SLOTS).total_bytes)
    command = [sys.executable, "-c", VICTIM, str(tiny_llama), str(pool), str(SAMPLINGS.index(sampling))]
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run(command, pass_fds=[pool], stdout=subprocess.PIPE, cwd=root, timeout=240, check=False)
    assert killed.returncode == -9
    tokens, payloads = killed.stdout.decode().splitlines()
    sent, written = [int(token) for token in tokens.split()], [bytes.fromhex(payload) for payload in payloads.split()]
    assert sent == cold[0][:20]
    heir = rig_of(tiny_llama, pool=pool)
    known = np.concatenate((PROMPT, np.array(sent, dtype=np.int32)))
    heir.submit(order(1, known, sampling=sampling, prompt_len=len(PROMPT)))
    heir.run()
    assert sent + heir.tokens[1] == cold[0]
    assert heir.tiers.load().restored_host == 19  # 80 tokens had KV; the last copy was not taken in when it died
    assert kv_of(heir, cold[0])[:19] == written
