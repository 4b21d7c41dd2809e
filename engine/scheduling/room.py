"""Room for a step: whether a newcomer's KV fits, and who gives way to whom where blocks or rows are short.

Owns preemption and its counts. Never plans, and never takes a block for anybody."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.kv.blocks import Block, BlockTrie
from engine.kv.tiers import Tiers
from engine.scheduling.holdings import Holdings
from engine.scheduling.launch import Launch
from engine.scheduling.memory import PeakMemory
from engine.scheduling.sequence import Sequence
from engine.scheduling.table import Table
from engine.scheduling.waiting import WaitingQueue
from policies.request import RequestClass
from policies.step_plan import victims


@dataclass(frozen=True, slots=True)
class GivingWay:
    """How often one sequence does, in favour of more urgent ones."""

    preemptions_max: int
    cooldown_s: float


class Room:
    """The scheduler's; called inside a launch, except `give_up_all`."""

    def __init__(
        self, trie: BlockTrie, tiers: Tiers, table: Table, holdings: Holdings, *,
        waiting: WaitingQueue, memory: PeakMemory, giving_way: GivingWay,
    ) -> None:  # fmt: skip
        self._trie = trie
        self._tiers = tiers
        self._table = table
        self._waiting = waiting
        self._holdings = holdings
        self._memory = memory
        self._giving_way = giving_way
        self.preemptions = 0
        self.parks = 0

    def fits(self, sequence: Sequence, found: list[Block]) -> bool:
        """Whether KV suffices at the coming peak; what sequences share counts for each of them."""
        if self._memory.fits_surely(self._table, sequence, self._trie.blocks_total):
            return True
        held = self._trie.counts().held - self._tiers.lent
        shared = int(self._table.blocks[self._table.is_used].sum()) - held + sum(1 for block in found if block.refs)
        return self._memory.fits(self._table, sequence, self._trie.blocks_total + shared)

    def victims(self, urgent: RequestClass, step: Launch) -> list[Sequence]:
        """Residents that may give way, first victim first: those that nobody reads, then less urgent ones."""
        parked = [sequence for sequence in step.preemptable() if sequence.link in step.full_links]
        since, most = step.now - self._giving_way.cooldown_s, self._giving_way.preemptions_max
        allowed = {s.serial for s in step.preemptable() if s.preempted_at <= since and s.preemptions < most}
        rows = victims(step.view, urgent, step.now).tolist()
        return parked + [s for s in map(step.sequence, rows) if s.serial in allowed and s not in parked]

    def make(self, blocks: int, urgent: RequestClass, step: Launch) -> bool:
        """Have so many blocks available, at the cost of less urgent sequences if need be."""
        if self._trie.available >= blocks:
            return True
        for victim in self.victims(urgent, step):
            self.preempt(victim, step)
            if self._trie.available >= blocks:
                return True
        return False

    def preempt(self, sequence: Sequence, step: Launch) -> None:
        """Drop its KV and let it wait again; what the cache keeps of it, it finds again."""
        now, step.has_preempted = step.now, True
        if sequence.link in step.full_links:
            self.parks += 1  # until its link is read again it is shown to no planner; then it goes on
            sequence.parks += 1
        else:
            self.preemptions += 1
            sequence.preemptions += 1
            sequence.preempted_at = now
        self._let_wait(sequence, now)

    def give_up_all(self, now: float) -> None:
        """Every resident waits again: the KV of all goes."""
        for sequence in self._table.at(np.flatnonzero(self._table.is_used)):
            sequence.parks += 1
            self._let_wait(sequence, now)

    def _let_wait(self, sequence: Sequence, now: float) -> None:
        self._holdings.drop(sequence, now)
        self._table.remove(sequence)
        self._waiting.add(sequence)
