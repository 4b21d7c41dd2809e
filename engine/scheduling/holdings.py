"""Which blocks a sequence holds: taken, adopted from others, published for others, let go.

Owns the tie between a sequence's blocks, the trie and the table. Never decides who gets a block."""

from __future__ import annotations

from engine.kv.blocks import Block, BlockTrie
from engine.kv.tiers import Tiers
from engine.scheduling.sequence import Sequence
from engine.scheduling.table import Table
from policies.api import Keep
from policies.retention import CLASS_BANDS, SpanView

Twin = tuple[Sequence, int, Block]  # (sequence, block index, who was first to hold the same tokens)


class Holdings:
    """Hot: `publish` and `adopt` run for each chunk, `publish` each block_tokens-th decode."""

    def __init__(self, trie: BlockTrie, tiers: Tiers, table: Table, keep: Keep) -> None:
        self.keep = keep
        self._trie = trie
        self._tiers = tiers
        self._table = table
        self._block_tokens = trie.block_tokens

    @property
    def block_tokens(self) -> int:
        return self._block_tokens

    def take(self, sequence: Sequence, count: int, now: float) -> None:
        """So many blocks more. There must be room for them."""
        taken = self._trie.take(count, now)
        assert taken is not None, "room was made before"
        sequence.blocks += taken
        self._table.show_blocks(sequence)

    def adopt(self, sequence: Sequence) -> bool:
        """Take over what another sequence computed meanwhile; False if one computes it in this very step."""
        if sequence.needs_all_rows:
            return True
        table, size, row = self._table, self._block_tokens, sequence.row
        context, is_ready = int(table.context[row]), True
        while context % size == 0 and context + size <= sequence.length:
            index = context // size
            parent = sequence.blocks[index - 1] if index else None
            if parent is not None and parent.edge is None:
                break
            salt = sequence.salt if index == sequence.public_blocks else b""
            found = self._trie.child(parent, sequence.ids[context : context + size].tobytes(), salt)
            if found is None or found.is_pending:
                is_ready = found is None  # what was adopted before a pending one stays adopted
                break
            assert len(sequence.blocks) == index
            self._trie.hold([found])
            sequence.blocks.append(found)
            context = min(context + size, sequence.length - 1)
            if not sequence.has_yielded:
                sequence.cached_tokens = min(sequence.cached_tokens + size, sequence.prompt_len)
        table.show_blocks(sequence)
        table.context[row] = context
        return is_ready

    def publish(self, sequence: Sequence, context: int, tokens: int) -> list[Twin]:
        """Enter the blocks that this step fills into the trie, pending. Those that others hold already are returned:
        after the step, `replace` makes them the sequence's own."""
        size = self._block_tokens
        twins: list[Twin] = []
        first, last = context // size, (context + tokens) // size
        parent = sequence.blocks[first - 1] if first else None
        for index in range(first, last):
            block = sequence.blocks[index]
            if parent is not None and parent.edge is None:
                return twins  # forgotten after a fault: nothing behind it can be found
            if block.edge is None:
                salt = sequence.salt if index == sequence.public_blocks else b""
                ids = sequence.ids[index * size : (index + 1) * size].tobytes()
                found = self._trie.publish(block, parent, ids, salt)
                if found is not block:
                    self._trie.hold([found])
                    twins.append((sequence, index, found))
                    block = found
            parent = block
        return twins

    def replace(self, sequence: Sequence, index: int, twin: Block, now: float) -> None:
        """Use the block that is in the trie in place of our own with the same tokens."""
        if twin.edge is None:  # forgotten in this very step
            self._trie.release([twin], twin.band, 0.0, now)
            return
        own, sequence.blocks[index] = sequence.blocks[index], twin
        self._table.block_table[sequence.row, index] = twin.id
        self._trie.release([own], own.band, 0.0, now)

    def drop(self, sequence: Sequence, now: float) -> None:
        """It is preempted: what is published stays cached, and lies in the tiers below as well."""
        published = sum(1 for block in sequence.blocks if block.edge is not None)
        sequence.uncached_estimate = max(1, sequence.length - published * self._block_tokens)
        self._tiers.touch(sequence.blocks)
        self._trie.release(sequence.blocks, CLASS_BANDS[sequence.request_class], 0.0, now)
        sequence.blocks, sequence.restore = [], None

    def let_go(self, sequence: Sequence, *, is_aborted: bool, now: float) -> None:
        """It ends: release its blocks in two spans: what others use too, and what is its own."""
        blocks, sequence.blocks = sequence.blocks, []
        self._tiers.touch(blocks)
        has_called = sequence.has_called
        own_from = next((at for at, block in enumerate(blocks) if not block.hits), len(blocks))
        for span, is_shared in ((blocks[own_from:], False), (blocks[:own_from], True)):
            if span:
                hits, born = span[-1].hits, span[-1].born
                view = SpanView(sequence.request_class, is_shared, is_aborted, hits, born, has_called)
                band, lease_s = self.keep(view, now)
                self._trie.release(span, band, lease_s, now)
