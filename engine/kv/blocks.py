"""The block trie: who holds which KV block, what it contains, and which one goes when another is needed.

Owns every block of the device: free, cached or held, and nothing in between. Never touches KV memory, never matches by
hash alone (the walk compares tokens), and never refuses while any block is unheld: leases only order eviction."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from engine.kv.keys import ChainKey
from engine.step import Int32
from policies.retention import Band

ROOT = -1
LEASES_S = (10.0, 30.0)  # leases up to each of these queue apart from longer ones: each queue ends about in order

Edge = tuple[int, bytes, bytes]  # (the parent's serial, this block's tokens, salt)


class Block:
    """One KV block. `serial` names its content and is never used twice, so no edge outlives what it points from."""

    __slots__ = (
        "band",
        "born",
        "busy_children",
        "children",
        "edge",
        "hits",
        "id",
        "is_pending",
        "key",
        "lease_until",
        "parent",
        "queue",
        "refs",
        "serial",
    )

    def __init__(self, number: int) -> None:
        self.id = number
        self.serial = ROOT
        self.refs = 0
        self.edge: Edge | None = None  # None: not in the trie
        self.parent: Block | None = None
        self.children = 0  # in the trie; while there are any, this one stays
        self.busy_children = 0  # of them, those in use: while there are any, this one is in use as well
        self.key = b""
        self.is_pending = False  # published by a step that has not been collected
        self.band = Band.EXPIRED
        self.lease_until = 0.0
        self.queue: OrderedDict[int, Block] | None = None  # where it waits for eviction; None: free or in use
        self.hits = 0
        self.born = 0.0


class Reach(NamedTuple):
    """How far a prompt was found in the trie."""

    depth: int = 0  # blocks
    serial: int = ROOT  # of the last


@dataclass(frozen=True, slots=True)
class Counts:
    """Where all blocks are."""

    free: int
    cached: int
    held: int


class BlockTrie:
    """An exact prefix tree over full blocks. Hot: a walk of 142k tokens is 2,218 dict probes, about 0.5 ms."""

    def __init__(self, blocks_total: int, block_tokens: int, root_key: ChainKey) -> None:
        assert blocks_total > 0
        assert block_tokens > 0
        self.blocks_total = blocks_total
        self.block_tokens = block_tokens
        self._bytes = block_tokens * 4
        self.root_key = root_key
        self._blocks = [Block(number) for number in range(blocks_total)]
        self._free = self._blocks[::-1]
        self._nodes: dict[Edge, Block] = {}
        self._keys: dict[bytes, Block] = {}  # the same blocks by chain key, for orders from outside
        self._bands: tuple[OrderedDict[int, Block], ...] = tuple(OrderedDict() for _ in range(Band.LEASED))
        self._leases: tuple[OrderedDict[int, Block], ...] = tuple(OrderedDict() for _ in range(len(LEASES_S) + 1))
        self._pending: list[Block] = []
        self._changes: dict[bytes, bool] = {}  # key -> is resident, since the last take_events
        self._cached = 0
        self._serial = 0

    # Finding ---------------------------------------------------------------------------------------------------------

    def match(self, ids: bytes, salt: bytes, public_blocks: int) -> list[Block]:
        """The longest chain of blocks that hold exactly `ids` (int32 bytes), whole blocks only, oldest first."""
        found: list[Block] = []
        serial, get, step = ROOT, self._nodes.get, self._bytes
        salted = public_blocks * step
        for at in range(0, len(ids) - step + 1, step):
            block = get((serial, ids[at : at + step], salt if at == salted else b""))
            if block is None:
                break
            found.append(block)
            serial = block.serial
        return found

    def reach(self, ids: Int32, salt: bytes, public_blocks: int, known: Reach) -> Reach:
        """How far the chain of `ids` goes by now, from an earlier answer for the same ids: one probe where no further.
        What was evicted meanwhile still counts: an estimate. `match` tells what can be held."""
        depth, serial = known
        step = self.block_tokens
        while depth < len(ids) // step:
            tokens = ids[depth * step : (depth + 1) * step].tobytes()
            block = self._nodes.get((serial, tokens, salt if depth == public_blocks else b""))
            if block is None:
                break
            depth, serial = depth + 1, block.serial
        return Reach(depth, serial)

    def child(self, parent: Block | None, tokens: bytes, salt: bytes = b"") -> Block | None:
        """The block that holds `tokens` right behind `parent` (None: at the start)."""
        return self._nodes.get((ROOT if parent is None else parent.serial, tokens, salt))

    def by_key(self, key: bytes) -> Block | None:
        """The block of this name, if it can be hit."""
        block = self._keys.get(key)
        return None if block is None or block.is_pending else block

    # Holding ---------------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that `take` can give now."""
        return len(self._free) + self._cached

    def take(self, count: int, now: float) -> list[Block] | None:
        """So many fresh blocks, each held once; what is cached goes band by band. None, and no change, if too few."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict(now)
            self._serial += 1
            block.serial, block.refs, block.hits, block.born, block.lease_until = self._serial, 1, 0, now, 0.0
            block.band = Band.EXPIRED
            taken.append(block)
        return taken

    def hold(self, blocks: Iterable[Block]) -> None:
        """One more sequence uses these published blocks."""
        for block in blocks:
            assert block.edge is not None, "only what is in the trie can be found"
            self._rouse(block)
            block.refs += 1
            block.hits += 1

    def release(self, blocks: Sequence[Block], band: Band, lease_s: float, now: float) -> None:
        """One sequence less uses these, given root first. Published ones become cached, the tail first to go."""
        for block in reversed(blocks):
            assert block.refs > 0, "double free"
            block.refs -= 1
            # A parent outranks its children; and what others hold or continue is worth what it was worth to them.
            band = max(block.band, band) if block.refs or block.children > 1 else band
            block.band = band
            block.lease_until = max(block.lease_until, now + lease_s)
            self._settle(block, now)

    def pin(self, block: Block) -> None:
        """Keep a published block while a copy from it, or behind it, is under way: a hold that is no hit."""
        assert block.edge is not None
        self._rouse(block)
        block.refs += 1

    def unpin(self, block: Block, now: float) -> None:
        """End what `pin` began; the block's worth is what it was."""
        assert block.refs > 0, "double free"
        block.refs -= 1
        self._settle(block, now)

    def rank(self, block: Block, band: Band, lease_until: float, now: float) -> None:
        """Give a published block another worth: where it stands among those to be evicted follows."""
        block.band, block.lease_until = band, lease_until
        if block.queue is not None:
            self._unqueue(block)
            self._enqueue(block, now)

    def drop(self, block: Block) -> bool:
        """Free a cached block at once, if nothing holds it or stands behind it."""
        if block.queue is None or block.children:
            return False
        self._unqueue(block)
        self._unpublish(block)
        self._free.append(block)
        return True

    # Publishing ------------------------------------------------------------------------------------------------------

    def publish(self, block: Block, parent: Block | None, tokens: bytes, salt: bytes = b"") -> Block:
        """Enter a held, full block behind `parent`, pending until `commit`. Returns the block that is in the trie for
        these tokens: another one if a sequence was first."""
        assert block.refs > 0
        assert block.edge is None
        assert parent is None or parent.edge is not None
        edge = (ROOT if parent is None else parent.serial, tokens, salt)
        found = self._nodes.setdefault(edge, block)
        if found is block:
            parent_key = self.root_key if parent is None else parent.key
            block.edge, block.key, block.is_pending = edge, xxhash.xxh3_128_digest(parent_key + salt + tokens), True
            block.parent = parent
            if parent is not None:
                parent.children += 1
                parent.busy_children += 1
            self._keys[block.key] = block
            self._pending.append(block)
        return found

    def commit(self) -> list[Block]:
        """The step that wrote all pending blocks is done: others may read them, and the router may know. They are
        returned, parents first."""
        committed = [block for block in self._pending if block.is_pending]  # else it was forgotten meanwhile
        for block in committed:
            block.is_pending = False
            self._changes[block.key] = True
        self._pending.clear()
        return committed

    def forget(self, blocks: Sequence[Block], now: float) -> list[bytes]:
        """Take blocks, and all behind them, out of the trie: what they hold is not to be believed. Who holds them keeps
        them. Returns their keys. O(blocks), for faults."""
        doubted = {block.serial for block in blocks if block.edge is not None}
        level = doubted
        while level:
            level = {b.serial for b in self._nodes.values() if b.edge is not None and b.edge[0] in level} - doubted
            doubted |= level
        gone = [b for b in self._nodes.values() if b.serial in doubted]
        forgotten, parents = [block.key for block in gone], [block.parent for block in gone]
        for block in gone:
            if block.parent is not None and block.queue is None:
                block.parent.busy_children -= 1
            if block.queue is not None:
                self._unqueue(block)
            self._unpublish(block)
        for block in gone:
            self._settle(block, now)
        for parent in parents:
            if parent is not None and parent.edge is not None:
                self._settle(parent, now)
        return forgotten

    def reset(self, held: Iterable[Block]) -> None:
        """Start over, with nothing cached and only these blocks held, each once: the way out when `check` fails."""
        for block in self._nodes.values():
            self._changes[block.key] = False
        self._nodes.clear()
        self._keys.clear()
        self._pending.clear()
        for queue in (*self._bands, *self._leases):
            queue.clear()
        self._cached = 0
        for block in self._blocks:
            block.refs, block.children, block.busy_children, block.is_pending = 0, 0, 0, False
            block.edge, block.parent, block.queue = None, None, None
        for block in held:
            block.refs += 1
        self._free = [block for block in reversed(self._blocks) if not block.refs]

    # Telling ---------------------------------------------------------------------------------------------------------

    def take_events(self) -> tuple[bytes, bytes]:
        """Keys (stored, evicted) since the last call, 16 bytes each; a key is in one of them at most."""
        if not self._changes:
            return b"", b""
        changes, self._changes = self._changes, {}
        stored = b"".join(key for key, is_resident in changes.items() if is_resident)
        return stored, b"".join(key for key, is_resident in changes.items() if not is_resident)

    def resident_keys(self) -> bytes:
        """Keys of all blocks that can be hit, 16 bytes each: the snapshot for a new link."""
        return b"".join(block.key for block in self._nodes.values() if not block.is_pending)

    def counts(self) -> Counts:
        """Where all blocks are."""
        free = len(self._free)
        return Counts(free, self._cached, len(self._blocks) - free - self._cached)

    def check(self) -> None:
        """Assert that no block is lost or in two places. O(blocks): for tests and idle moments."""
        queues = (*self._bands, *self._leases)
        cached = sum(len(queue) for queue in queues)
        held = sum(1 for block in self._blocks if block.refs or block.busy_children)
        assert cached == self._cached, f"{cached} blocks are queued, {self._cached} counted as cached"
        assert len(self._free) + cached + held == len(self._blocks), "a block is lost or in two places"
        assert all(b.refs == 0 and b.edge is None and b.queue is None for b in self._free), "a free block is in use"
        queued = [(block, queue) for queue in queues for block in queue.values()]
        assert all(b.refs == b.busy_children == 0 and b.edge and b.queue is q for b, q in queued), "a queue is wrong"
        assert all(self._keys[b.key] is b for b in self._nodes.values()), "a key names another block"
        assert len(self._keys) == len(self._nodes), "a key outlived its block"
        published = sum(1 for block in self._blocks if block.edge is not None)
        assert published == len(self._nodes), "a block is in the trie twice, or an edge outlived it"
        assert all(self._nodes[b.edge] is b for b in self._blocks if b.edge is not None), "an edge points elsewhere"
        parents = Counter(b.edge[0] for b in self._blocks if b.edge is not None and b.edge[0] != ROOT)
        assert all(b.children == parents.pop(b.serial, 0) for b in self._blocks if b.edge), "children are miscounted"
        assert not parents, "a child outlived its parent"
        busy = Counter(b.parent.serial for b in self._blocks if b.parent is not None and b.queue is None)
        assert all(b.busy_children == busy.get(b.serial, 0) for b in self._blocks), "children in use are miscounted"

    # Inside ----------------------------------------------------------------------------------------------------------

    def _rouse(self, block: Block) -> None:
        """A cached block comes into use, and with it those before it: none is evicted from under what needs it."""
        while block.queue is not None:
            self._unqueue(block)
            if block.parent is None:
                return
            block = block.parent
            block.busy_children += 1

    def _settle(self, block: Block, now: float) -> None:
        """Free or cache a block, if nothing holds it or what stands behind it; and so with those before it."""
        while block.refs == 0 and block.busy_children == 0 and block.queue is None:
            if block.edge is None:
                self._free.append(block)
                return
            self._enqueue(block, now)
            if block.parent is None:
                return
            block = block.parent
            block.busy_children -= 1

    def _enqueue(self, block: Block, now: float) -> None:
        left_s = block.lease_until - now
        queue = self._leases[bisect_left(LEASES_S, left_s)] if left_s > 0.0 else self._bands[block.band]
        queue[block.id] = block
        block.queue = queue
        self._cached += 1

    def _unqueue(self, block: Block) -> None:
        assert block.queue is not None
        del block.queue[block.id]
        block.queue = None
        self._cached -= 1

    def _evict(self, now: float) -> Block:
        """The least valuable cached leaf, out of the trie. O(1): tails are queued first, so the front is one, but for a
        parent whose lease has less left than its child's had when it was queued."""
        self._end_leases(now)
        for queue in (*self._bands, *self._leases):
            for _ in range(len(queue)):
                block = next(iter(queue.values()))
                if not block.children:
                    self._unqueue(block)
                    self._unpublish(block)
                    return block
                queue.move_to_end(block.id)
        raise AssertionError("blocks are cached, but none is a leaf")

    def _end_leases(self, now: float) -> None:
        for queue in self._leases:
            while queue and (block := next(iter(queue.values()))).lease_until <= now:
                self._unqueue(block)
                self._enqueue(block, now)

    def _unpublish(self, block: Block) -> None:
        assert block.edge is not None
        del self._nodes[block.edge]
        del self._keys[block.key]
        if not block.is_pending:
            self._changes[block.key] = False
        if block.parent is not None:
            block.parent.children -= 1
        block.edge, block.parent, block.is_pending = None, None, False
