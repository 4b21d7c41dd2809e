"""Puts a worker together: trie, scheduler, fit, core and socket around a runner.

Owns the wiring alone. Never imports torch: the runner is handed in."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from engine import energy
from engine.compute.grammar_gate import Compile, no_grammars
from engine.config import GPU_PRIOR, GPU_ROWS_MAX, PRIOR, EngineConfig
from engine.control import Control
from engine.core import Core, Inbox, Wake, parts
from engine.kv import keys
from engine.kv.blocks import BlockTrie
from engine.kv.copies import Hands
from engine.kv.disk import Disk, DiskError
from engine.kv.pinning import Pinning
from engine.kv.pool import EXTENT_SLOTS, PoolError, PoolWriter, attach
from engine.kv.tiers import Tiers
from engine.phases import Phases
from engine.scheduling import guard
from engine.scheduling.scheduler import Scheduler, SchedulerLimits
from engine.scheduling.speculate import Speculator
from engine.step import ModelFacts, Pinner, Runner, Sharer
from engine.wire import PROTOCOL_VERSION, Hello, Message, encode
from engine.worker import Worker
from policies.api import PolicySpec
from policies.costs import StepFit
from policies.step_plan import PlanLimits

log = logging.getLogger(__name__)

# How long a thread that runs Python keeps others waiting. The loop's thread comes back from the device and finds the
# socket's at work: Python's own 5 ms are six steps of a small model. Its own turn, under 1 ms, is not cut in two.
SWITCH_S = 1e-3


def build(
    runner: Runner,
    facts: ModelFacts,
    config: EngineConfig,
    inbox: Inbox,
    clock: Callable[[], float] = time.monotonic,
    *,
    is_strict: bool = False,
) -> Core:
    """A core that is ready to run. In a strict one a leaked block is a crash; else it is mended and counted."""
    root = keys.root(facts.digest, kv_dtype=facts.kv_dtype)
    trie = BlockTrie(runner.blocks_total, config.block_tokens, root)
    epoch = time.time_ns() // 1_000_000
    tiers = _tiers(trie, runner, config, epoch, lambda: inbox.put(Wake()))
    limits = SchedulerLimits(config.sequences_max, config.waiting_max, ahead_tokens=config.ahead_tokens)
    is_gpu = config.device.startswith("cuda")
    prior = GPU_PRIOR if is_gpu else PRIOR
    plan_limits = PlanLimits(quantum_tokens=config.block_tokens)
    if is_gpu:
        plan_limits = replace(plan_limits, rows_max=GPU_ROWS_MAX)
    policy = guard.load(config.policy, plan_limits)
    scheduler = Scheduler(trie, facts, limits, plan_limits, tiers, policy=policy, is_strict=is_strict)
    hello = Hello(
        protocol=PROTOCOL_VERSION,
        worker=config.name,
        epoch=epoch,
        model=facts.name,
        model_digest=facts.digest,
        device=facts.device,
        block_tokens=config.block_tokens,
        blocks_total=runner.blocks_total,
        context_max=scheduler.context_max,
        vocab_size=facts.vocab_size,
        root=root,
        policy_digest=PolicySpec(config.policy).digest,
        step_model=parts(prior),
        cached=b"",
        nonce=b"",
    )
    # A captured GPU step has one row a decode; drafts are for runners that take any rows.
    can_draft = config.has_drafts and facts.device.startswith("cpu")
    return Core(
        runner,
        scheduler,
        trie,
        tiers=tiers,
        fit=StepFit(prior),
        hello=hello,
        inbox=inbox,
        clock=clock,
        control=Control(runner, facts, scheduler, lambda: inbox.put(Wake())),
        energy=energy.opened(config.device, clock, config.tensor_parallel),
        speculator=Speculator(config.block_tokens, facts.vocab_size) if can_draft else None,
    )


def _tiers(trie: BlockTrie, runner: Runner, config: EngineConfig, epoch: int, wake: Callable[[], None]) -> Tiers:
    """What lies below the device. A pool or folder that cannot be used is said and done without: it is only a cache."""
    memory = runner.kv
    if config.pool_fd < 0 or memory is None:
        return Tiers(trie)
    try:
        pool = attach(config.pool_fd, trie.block_tokens, memory.block_bytes)
    except (PoolError, OSError) as error:
        log.warning("worker %s runs without the host pool: %s", config.name, error)
        return Tiers(trie)
    if isinstance(memory, Sharer):
        memory.share(pool.span(range(pool.shape.slots)), pool.shape.payload_offset)
    extents = pool.shape.slots // EXTENT_SLOTS
    writer = PoolWriter(pool, extents // config.pool_share, epoch=epoch)
    log.info(
        "worker %s: %d of %d pool slots, %d hold KV", config.name, writer.slots, pool.shape.slots, len(writer.slot_of)
    )
    disk = _disk(trie, writer, config, epoch) if config.disk_dir else None
    hands = Hands(ThreadPoolExecutor(1, "store"), ThreadPoolExecutor(1, "restore"), wake)
    pinning = Pinning(pool, writer.extents, memory) if isinstance(memory, Pinner) else None
    return Tiers(trie, memory, writer, disk, hands=hands, pinning=pinning)


def _disk(trie: BlockTrie, writer: PoolWriter, config: EngineConfig, epoch: int) -> Disk | None:
    # KV of another model or dtype has other keys, and a folder of its own: it is never read, and can be deleted.
    folder = Path(config.disk_dir).expanduser() / trie.root_key.hex() / config.name
    try:
        pool, thread = writer.memory, ThreadPoolExecutor(1, "disk")
        return Disk(folder, config.disk_bytes, pool.shape.slot_bytes, thread, epoch=epoch, distrusts=pool.distrusts)
    except DiskError as error:
        log.warning("worker %s runs without its disk tier: %s", config.name, error)
        return None


def settle() -> None:
    """What a process does once it has all it will serve with."""
    gc.collect()
    gc.freeze()  # what was made at start lives for ever; no collection walks it again
    sys.setswitchinterval(SWITCH_S)


def serve(
    runner: Runner,
    facts: ModelFacts,
    config: EngineConfig,
    *,
    encode: Callable[[Message], bytearray] = encode,
    compile: Compile = no_grammars,  # noqa: A002
    phases: Phases | None = None,
) -> int:
    """Calibrate, listen, serve until drained; the exit code."""
    phases = phases or Phases()
    inbox = Inbox()
    core = build(runner, facts, config, inbox)
    phases.end("memory below")
    model = core.calibrate(config.calibrate_s)
    log.info(
        "worker %s: %s on %s, %d blocks of %d tokens, step %.1f ms, prefill %.0f tokens/s",
        config.name,
        facts.name,
        facts.device,
        runner.blocks_total,
        config.block_tokens,
        1e3 * model.decode_s(1, 0),
        512 / model.prefill_s(512),
    )
    settle()
    phases.end("calibration")
    log.info("worker %s started in %s", config.name, phases)
    return asyncio.run(Worker(core, inbox, config, encode=encode, compile=compile).serve())
