"""Sequences that hold no KV yet, or none any more: by class, earliest line first.

Owns their order. Never decides who runs; it only shows the heads."""

from __future__ import annotations

from bisect import bisect_left, insort

from engine.kv.blocks import BlockTrie
from engine.scheduling.sequence import Sequence
from policies.request import RequestClass

Entry = tuple[float, int, Sequence]  # (line, or arrival for batch; serial; sequence): the serial decides every tie


class WaitingQueue:
    """Bounded: `add` must not be called when `is_full`, save for a preempted sequence, which was in before."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: tuple[list[Entry], ...] = tuple([] for _ in RequestClass)
        self.uncached_tokens = 0  # as estimated when they came, or came to a head

    def __len__(self) -> int:
        return sum(map(len, self._entries))

    @property
    def is_full(self) -> bool:
        return len(self) >= self._capacity

    def add(self, sequence: Sequence) -> None:
        """Wait until admitted."""
        insort(self._entries[sequence.request_class], _entry(sequence))
        self.uncached_tokens += sequence.uncached_estimate

    def remove(self, sequence: Sequence) -> None:
        """Admitted or aborted."""
        entries, entry = self._entries[sequence.request_class], _entry(sequence)
        at = bisect_left(entries, entry)
        assert entries[at][2] is sequence
        del entries[at]
        self.uncached_tokens -= sequence.uncached_estimate

    def look_again(self, sequence: Sequence, trie: BlockTrie) -> None:
        """Count what others have computed of its prompt since it came: a step that planned for all of it would hold
        two of the siblings of one prefix where there is room for sixteen. Hot: a probe a head."""
        if sequence.needs_all_rows:
            return
        known, ids = sequence.reach, sequence.ids[: sequence.length]
        sequence.reach = trie.reach(ids, sequence.salt, sequence.public_blocks, known)
        if sequence.reach != known:
            uncached = max(1, sequence.length - sequence.reach.depth * trie.block_tokens)
            uncached = min(uncached, sequence.uncached_estimate)
            self.uncached_tokens += uncached - sequence.uncached_estimate
            sequence.uncached_estimate = uncached

    def heads(self, count: int, skip_links: frozenset[int]) -> list[Sequence]:
        """Up to `count` of each class, most urgent first, none of the links to skip."""
        if not skip_links:
            return [entry[2] for entries in self._entries for entry in entries[:count]]
        heads = []
        for entries in self._entries:
            allowed = (entry[2] for entry in entries if entry[2].link not in skip_links)
            heads += [sequence for sequence, _ in zip(allowed, range(count), strict=False)]
        return heads


def _entry(sequence: Sequence) -> Entry:
    # A data-processor's line is hours away and the same for a whole job; its arrival order keeps siblings together.
    is_batch = sequence.request_class == RequestClass.DATA_PROCESSOR
    return (sequence.submitted_at if is_batch else sequence.first_due, sequence.serial, sequence)
