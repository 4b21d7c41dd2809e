"""A scheduler on a fake device in virtual time, with everything that came out of it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.fake import FAKE_SPEED, FakeRunner, Fault, token
from engine.kv import keys
from engine.kv.blocks import BlockTrie
from engine.kv.copies import CopyLimits, Hands
from engine.kv.disk import Disk
from engine.kv.pool import PoolMemory, PoolShape, PoolWriter, attach
from engine.kv.tiers import Tiers
from engine.scheduling.launch import Launch
from engine.scheduling.outcome import Outcome
from engine.scheduling.scheduler import Scheduler, SchedulerLimits
from engine.step import ModelFacts, Runner
from engine.wire import End, Sampling, Scored, Start, Submit
from policies.costs import StepModel
from policies.request import RequestClass
from policies.step_plan import PlanLimits

CHAT, AGENT, BATCH = RequestClass
VOCAB = 1000
FACTS = ModelFacts("fake", "digest", "fake", "ids", VOCAB, 4096, (2,))
SIZE = 16
FAKE_BLOCK_BYTES = SIZE * 4

Ids = npt.NDArray[np.int32]


def prompt(seed: int, tokens: int) -> Ids:
    return np.random.default_rng(seed).integers(3, VOCAB, tokens).astype(np.int32)


def order(
    handle: int,
    ids: Ids,
    *,
    cls: RequestClass = CHAT,
    max_tokens: int = 8,
    first_left_s: float = 1.0,
    tpot_s: float = 0.04,
    salt: bytes = b"",
    sampling: Sampling | None = None,
    prompt_len: int | None = None,
    session: str = "",
) -> Submit:
    is_batch = cls == BATCH
    return Submit(
        handle=handle,
        ids=ids.tobytes(),
        prompt_len=len(ids) if prompt_len is None else prompt_len,
        salt=salt,
        public_blocks=0,
        request_class=int(cls),
        first_left_s=math.inf if is_batch else first_left_s,
        tpot_s=math.inf if is_batch else tpot_s,
        deadline_left_s=3600.0 if is_batch else math.inf,
        session=session,
        sampling=sampling or Sampling(temperature=0.0, max_tokens=max_tokens),
    )


def expected(ids: Ids, count: int) -> list[int]:
    return [token(ids, index, VOCAB, FACTS.eos_ids) for index in range(count)]


def pool_of(slots: int) -> PoolMemory:
    """Memory for so many fake blocks, as the keeper makes it; gone with its last user."""
    descriptor = os.memfd_create("pool")
    os.ftruncate(descriptor, PoolShape(SIZE, FAKE_BLOCK_BYTES, slots).total_bytes)
    return attach(descriptor, SIZE, FAKE_BLOCK_BYTES)


@dataclass
class Rig:
    """`now` moves only by steps and by hand."""

    blocks: int = 256
    speed: StepModel = FAKE_SPEED
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    faults: tuple[Fault, ...] = ()
    now: float = 0.0
    host: PoolWriter | None = None  # its slots hold FAKE_BLOCK_BYTES
    disk: Disk | None = None
    hands: Hands = field(default_factory=Hands)
    copy_limits: CopyLimits = field(default_factory=CopyLimits)
    plan_limits: PlanLimits = field(default_factory=lambda: PlanLimits(quantum_tokens=SIZE))
    device: Runner | None = None  # a real one in place of the fake, with the facts and block size of its model
    facts: ModelFacts = FACTS
    block_tokens: int = SIZE

    def __post_init__(self) -> None:
        fake = FakeRunner(self.facts, (self.blocks, self.block_tokens), self.speed, self._sleep, self.faults)
        self.runner: Runner = self.device or fake
        self.trie = BlockTrie(self.runner.blocks_total, self.block_tokens, keys.root("digest"))
        self.tiers = Tiers(self.trie, self.runner.kv, self.host, self.disk, hands=self.hands, limits=self.copy_limits)
        self.scheduler = Scheduler(self.trie, self.facts, self.limits, self.plan_limits, self.tiers)
        self.tokens: dict[int, list[int]] = {}
        self.times: dict[int, list[float]] = {}
        self.starts: dict[int, Start] = {}
        self.ends: dict[int, End] = {}
        self.steps: list[Launch] = []
        self.scored: list[Scored] = []

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def submit(self, *orders: Submit, link: int = 1) -> None:
        for each in orders:
            self._note(self.scheduler.submit(link, each, self.now))

    def abort(self, handle: int, link: int = 1) -> None:
        self._note(self.scheduler.abort(link, handle, self.now))

    def step(self, full_links: frozenset[int] = frozenset()) -> Launch | None:
        launch = self.scheduler.launch(self.speed, self.now, full_links)
        if launch is not None:
            self.steps.append(launch)
            result = self.runner.run(launch.batch)
            self.now += 0.0 if self.device is None else self.speed.step_s(launch.features)
            self._note(self.scheduler.collect(launch, result, self.speed, self.now))
        return launch

    def run(self, steps_max: int = 5000) -> None:
        """Until nothing is left to do."""
        for _ in range(steps_max):
            if self.step() is None:
                if self.scheduler.is_idle:
                    break
                self.now += 0.001  # it waits for a copy
        assert self.scheduler.is_idle
        self.tiers.wait(self.now)
        self.scheduler.check_idle()
        self.trie.check()

    def _note(self, outcome: Outcome) -> None:
        for link, handles in outcome.handles.items():
            for handle, each in zip(handles, outcome.ids[link], strict=True):
                self.tokens.setdefault(handle, []).append(each)
                self.times.setdefault(handle, []).append(self.now)
        self.scored += [told for _, told in outcome.scored]
        self.starts |= {start.handle: start for _, start in outcome.starts}
        self.ends |= {end.handle: end for _, end in outcome.ends}
