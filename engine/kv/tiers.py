"""The tiers below the device: every full block is written through to the host pool, what that evicts goes to disk, and
blocks come back when that is quicker than computing them. So eviction and preemption only drop a reference.

Owns what is known of those tiers. Never copies (copies.py does) and never believes a tier before it was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from engine.kv.blocks import Block, BlockTrie
from engine.kv.carrier import Arrived, Below, Tier
from engine.kv.copies import Copies, CopyLimits, Hands, Restore
from engine.kv.disk import Disk
from engine.kv.keys import ChainKey, split
from engine.kv.pinning import Pinning
from engine.kv.pool import Content, PoolWriter
from engine.step import HOST_BYTES_PER_S, KVMemory
from engine.wire import TierLoad
from policies.costs import StepModel
from policies.retention import Band

SPEED_WEIGHT = 0.2  # of the newest copies in what bringing a block up takes
DISK_BYTES_PER_S = 0.5e9  # until files were timed: an ordinary SSD
ON_DISK = -1  # in place of a slot
WAIT_S_MIN = 0.05  # a request waits for its blocks as long as computing them would take, and at least so long


def tier_of(slot: int) -> Tier:
    """Where such a slot lies."""
    return Tier.DISK if slot == ON_DISK else Tier.HOST


@dataclass(frozen=True, slots=True)
class Lower:
    """What lower tiers say they have right behind blocks of the device: names and places alone. Records are made of
    those that are to be copied: made of all that is found, they were six sevenths of finding it."""

    ids: bytes  # the prompt's, from its start
    first: int  # block
    parent: ChainKey
    salt: bytes
    public_blocks: int
    size: int  # bytes of a block's ids
    keys: list[bytes] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # of the pool, or ON_DISK

    def records(self, count: int) -> list[Below]:
        """The first ones, as copies need them."""
        return [self._record(at) for at in range(count)]

    def _record(self, at: int) -> Below:
        number = self.first + at
        tokens = np.frombuffer(self.ids, np.int32, self.size // 4, number * self.size)
        content = Content(self.keys[at], self.keys[at - 1] if at else self.parent, tokens)
        salt = self.salt if number == self.public_blocks else b""
        return Below(content, salt, tier_of(self.slots[at]), self.slots[at])


class Tiers:
    """Called by the loop's thread alone, between steps. Without a host pool it knows nothing and does nothing."""

    def __init__(
        self,
        trie: BlockTrie,
        memory: KVMemory | None = None,
        host: PoolWriter | None = None,
        disk: Disk | None = None,
        *,
        hands: Hands | None = None,
        limits: CopyLimits = CopyLimits(),  # noqa: B008
        pinning: Pinning | None = None,
    ) -> None:
        self._trie = trie
        self._host = host
        self._disk = disk
        self._pinning = pinning
        self._pinned_bytes = 0  # when last looked
        self._copies: Copies | None = None
        self._block_bytes, self._load_bytes_per_s = 0, HOST_BYTES_PER_S
        if memory is not None and host is not None:
            self._block_bytes, self._load_bytes_per_s = memory.block_bytes, memory.first_bytes_per_s
            self._copies = Copies(trie, memory, host, disk, hands or Hands(), limits=limits)
        self._block_s = [self._block_bytes / rate for rate in (self._load_bytes_per_s, DISK_BYTES_PER_S)]
        self.is_asleep = False  # the device has no memory: nothing is brought up

    # Copies, if there are any ----------------------------------------------------------------------------------------

    @property
    def held(self) -> list[Block]:
        """Blocks that copies hold, each once for every hold."""
        return self._copies.held if self._copies is not None else []

    @property
    def lent(self) -> int:
        """Blocks in use for copies alone: those they hold, and those before them."""
        holds = Counter(block.id for block in self.held)
        lent: set[int] = set()
        for held in self.held:
            block: Block | None = held
            while block is not None and block.id not in lent and block.refs == holds[block.id]:
                lent.add(block.id)
                block = block.parent
        return len(lent)

    def store(self, blocks: Sequence[Block]) -> None:
        """Write blocks through that have just become readable."""
        if self._copies is not None:
            self._copies.store(blocks)

    def poll(self, now: float) -> None:
        """Take in what copies have brought."""
        if self._copies is not None:
            self._copies.poll(now)
            self._learn(self._copies)
        if self._pinning is not None and self._pinning.pinned_bytes != self._pinned_bytes:
            self._unlearn(self._pinning)

    def reclaim(self, now: float) -> None:
        """Have copies let go of all blocks; takes milliseconds."""
        if self._copies is not None:
            self._copies.reclaim(now)

    def wait(self, now: float) -> None:
        """Until no copy is under way."""
        if self._copies is not None:
            self._copies.wait(now)

    def pin(self) -> None:
        """The first token is out: have the pool registered with the device, if that helps. May be called again."""
        if self._pinning is not None:
            self._pinning.begin()

    def close(self) -> None:
        """Give back what `pin` took, after the last copy."""
        if self._pinning is not None:
            self._pinning.close()

    def _unlearn(self, pinning: Pinning) -> None:
        """More of the pool is registered: what restores took before says nothing of what they will take."""
        self._pinned_bytes = pinning.pinned_bytes
        share = self._pinned_bytes / pinning.total_bytes
        byte_s = share / pinning.bytes_per_s + (1.0 - share) / self._load_bytes_per_s
        self._block_s[Tier.HOST] = self._block_bytes * byte_s

    def _learn(self, copies: Copies) -> None:
        arrived: list[Arrived] = copies.arrived
        for each in arrived:
            for tier, (seconds, count) in enumerate(zip(each.seconds, each.counts, strict=True)):
                if count:
                    self._block_s[tier] += SPEED_WEIGHT * (seconds / count - self._block_s[tier])
        arrived.clear()

    # Up --------------------------------------------------------------------------------------------------------------

    # Hot: at submit and again at admission, over all that a prompt has below the device; bench/tiers.py.
    def find(self, found: list[Block], ids: bytes, salt: bytes, public_blocks: int) -> Lower:
        """What lower tiers have of `ids` (int32 bytes) right behind the blocks that were found on the device."""
        key, size = ChainKey(found[-1].key) if found else self._trie.root_key, self._trie.block_tokens * 4
        lower = Lower(ids, len(found), key, salt, public_blocks, size)
        if self._copies is None or self._host is None:
            return lower
        digest, own, keys, slots = xxhash.xxh3_128_digest, self._host.slot_of, lower.keys, lower.slots
        salted, chained = public_blocks * size, bytes(key)
        for at in range(len(found) * size, len(ids) - size + 1, size):
            parent = chained + salt if at == salted else chained
            chained = digest(parent + ids[at : at + size])
            slot = own.get(chained)
            if slot is None:
                slot = self._elsewhere(chained)
            if slot is None:
                break
            keys.append(chained)
            slots.append(slot)
        return lower

    def _elsewhere(self, key: bytes) -> int | None:
        """The slot, of another worker's, that says it has a block, or ON_DISK."""
        assert self._host is not None
        slot = self._host.memory.lookup(key)
        return ON_DISK if slot is None and self._disk is not None and self._disk.holds(key) else slot

    def bring_up(
        self,
        found: list[Block],
        lower: Lower,
        band: Band,
        *,
        make_room: Callable[[int], bool],
        model: StepModel,
        now: float,
    ) -> Restore | None:
        """Have what was found below copied to the device, as far as that is quicker than computing it; else None."""
        if self._copies is None or self.is_asleep or not lower.keys:
            return None
        coming = self._copies.coming(lower.keys[0])
        if coming is not None:
            return coming
        context = len(found) * self._trie.block_tokens
        count = min(self._worth(lower, context, model), self._copies.restores_left)
        if not make_room(count):
            count = self._trie.available
        if not count:
            return None
        wait_s = max(WAIT_S_MIN, model.prefill_s(count * self._trie.block_tokens, context))
        return self._copies.restore(found[-1] if found else None, lower.records(count), band, now + wait_s, now)

    def _worth(self, lower: Lower, context: int, model: StepModel) -> int:
        """How many of these blocks, from the front, save most time if they are brought up rather than computed."""
        best, best_s, seconds = 0, 0.0, 0.0
        tiers = [tier_of(slot) for slot in lower.slots]
        for at, tier in enumerate(tiers, 1):
            seconds += self._block_s[tier]
            if at == len(tiers) or tiers[at] != tier:  # between changes the sum is as good as straight
                saved_s = model.prefill_s(at * self._trie.block_tokens, context) - seconds
                if saved_s > best_s:
                    best, best_s = at, saved_s
        return best

    def touch(self, blocks: Sequence[Block]) -> None:
        """A sequence used this chain: in the host pool, too, its head is to outlive its tail."""
        if self._host is not None:
            self._host.touch([block.key for block in reversed(blocks) if block.edge is not None])

    def age(self, blocks: Sequence[Block]) -> None:
        """Nobody will ask for these again: the pool gives them up first, the first of them first of all."""
        if self._host is not None:
            self._host.age([block.key for block in blocks])

    def forget(self, keys: Sequence[bytes]) -> None:
        """These blocks are not to be believed, nor what was stored behind them. O(slots), for faults."""
        if self._copies is None or self._host is None or not keys:
            return
        doubted, size = set(keys), 0
        contents = [self._host.memory.content(slot) for slot in self._host.slot_of.values()]
        while size != len(doubted):
            size = len(doubted)
            doubted |= {content.key for content in contents if content.parent in doubted}
        for key in sorted(doubted):
            if self._host.drop(key):
                self._copies.gone.append(key)
            if self._disk is not None:
                self._disk.drop(key)

    # Telling ---------------------------------------------------------------------------------------------------------

    def holds(self, key: bytes) -> bool:
        """Whether a tier of our own has a block."""
        if self._host is None:
            return False
        return key in self._host.slot_of or (self._disk is not None and self._disk.holds(key))

    def take_events(self) -> tuple[bytes, bytes]:
        """Keys (stored, evicted) since the last call: a block is gone when no tier of ours has it."""
        stored, evicted = self._trie.take_events()
        if self._copies is None:
            return stored, evicted
        lost = dict.fromkeys([*split(evicted), *self._copies.gone])
        self._copies.gone.clear()
        return stored, b"".join(key for key in lost if self._trie.by_key(key) is None and not self.holds(key))

    def resident_keys(self) -> bytes:
        """Keys of all blocks that need not be computed again: the snapshot for a new link."""
        keys = dict.fromkeys(split(self._trie.resident_keys()))
        if self._host is not None:
            keys |= dict.fromkeys(self._host.slot_of)
        return b"".join(keys)

    def load(self) -> TierLoad:
        """As frames carry it."""
        if self._copies is None or self._host is None:
            return TierLoad()
        counts, disk = self._copies.counts, self._disk
        return TierLoad(
            block_bytes=self._block_bytes,
            host_blocks=len(self._host.slot_of),
            host_blocks_max=self._host.slots,
            stored=counts.stored,
            skipped=counts.skipped,
            restored_host=counts.restored[Tier.HOST],
            restored_disk=counts.restored[Tier.DISK],
            missed=counts.missed,
            disk_blocks=len(disk) if disk is not None else 0,
            disk_written=disk.written if disk is not None else 0,
            disk_dropped=disk.dropped if disk is not None else 0,
            disk_corrupt=disk.corrupt if disk is not None else 0,
            pinned_bytes=self._pinning.pinned_bytes if self._pinning is not None else 0,
        )
