"""Puts a worker together: trie, scheduler, fit, core and socket around a runner.

Owns the wiring alone. Never imports torch: the runner is handed in."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable

from engine import keys
from engine.blocks import BlockTrie
from engine.config import PRIOR, EngineConfig
from engine.core import Core, Inbox, parts
from engine.grammar_gate import Compile, no_grammars
from engine.scheduler import Scheduler, SchedulerLimits
from engine.step import ModelFacts, Runner
from engine.wire import PROTOCOL_VERSION, Hello, Message, encode
from engine.worker import Worker
from policies.api import PolicySpec
from policies.costs import StepFit
from policies.step_plan import PlanLimits

log = logging.getLogger(__name__)


def build(
    runner: Runner, facts: ModelFacts, config: EngineConfig, inbox: Inbox, clock: Callable[[], float] = time.monotonic
) -> Core:
    """A core that is ready to run."""
    root = keys.root(facts.digest, kv_dtype=facts.kv_dtype)
    trie = BlockTrie(runner.blocks_total, config.block_tokens, root)
    limits = SchedulerLimits(sequences_max=config.sequences_max, waiting_max=config.waiting_max)
    scheduler = Scheduler(trie, facts, limits, PlanLimits(quantum_tokens=config.block_tokens))
    hello = Hello(
        protocol=PROTOCOL_VERSION,
        worker=config.name,
        epoch=time.time_ns() // 1_000_000,
        model=facts.name,
        model_digest=facts.digest,
        device=facts.device,
        block_tokens=config.block_tokens,
        blocks_total=runner.blocks_total,
        context_max=scheduler.context_max,
        vocab_size=facts.vocab_size,
        root=root,
        policy_digest=PolicySpec().digest,
        step_model=parts(PRIOR),
        cached=b"",
        nonce=b"",
    )
    return Core(runner, scheduler, trie, fit=StepFit(PRIOR), hello=hello, inbox=inbox, clock=clock)


def serve(
    runner: Runner,
    facts: ModelFacts,
    config: EngineConfig,
    *,
    encode: Callable[[Message], bytes] = encode,
    compile: Compile = no_grammars,  # noqa: A002
) -> int:
    """Calibrate, listen, serve until drained; the exit code."""
    inbox = Inbox()
    core = build(runner, facts, config, inbox)
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
    gc.collect()
    gc.freeze()  # decision 18: what was made at start lives for ever; no collection walks it again
    return asyncio.run(Worker(core, inbox, config, encode=encode, compile=compile).serve())
